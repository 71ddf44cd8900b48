"""Checks that users run on their own tasks: every layout and microbatch must agree with one device."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxops.core.mesh import make_mesh, use_cpu_devices
from jaxops.core.sharding import named_leaves
from jaxops.core.step import build_step, init_state
from jaxops.run.task import Task
from jaxops.run.training import tables_on

LAYOUTS: tuple[dict[str, int], ...] = (
    {"data": 1},
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"replica": 2, "fsdp": 4},
)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far one layout is from one device with one microbatch.

    `gradient` is the largest difference of any gradient entry over the largest entry; `parameter` the largest
    difference of any parameter after five steps of gradient descent, relative to the largest parameter; rows of tables
    are held to it too.
    """

    layout: dict[str, int]
    accumulation: int
    reduction: str
    gradient: float
    parameter: float


def compare(
    task: Task,
    layouts: Sequence[dict[str, int]] = LAYOUTS,
    accumulations: Sequence[int] = (1, 4),
    *,
    batch_size: int = 32,
    steps: int = 5,
) -> list[Agreement]:
    """Gradients and parameters of every layout against one device with one microbatch; dropout and draws are on.

    It runs on virtual CPU devices, whatever accelerator is here.

    Raises:
      RuntimeError: fewer than eight devices (ask for them before the first computation: `use_cpu_devices(8)`).
    """
    if len(jax.devices("cpu")) < 8:
        raise RuntimeError("comparing layouts needs 8 CPU devices: call jaxops.use_cpu_devices(8) first")
    batches = [task.source.batch(i * batch_size, batch_size) for i in range(steps)]
    one = _run(task, LAYOUTS[0], 1, batches)
    out = []
    for layout in layouts:
        for accumulation in accumulations:
            alone = layout == LAYOUTS[0] and accumulation == 1
            grads, params, reduction = one if alone else _run(task, layout, accumulation, batches)
            gradient, parameter = _difference(grads, one[0]), _difference(params, one[1])
            out.append(Agreement(layout, accumulation, reduction, gradient, parameter))
    return out


def check(task: Task, *, gradient: float = 1e-6, parameter: float = 1e-5, **kwargs: Any) -> list[Agreement]:
    """`compare`, and an error that names the layouts which do not agree.

    Raises:
      AssertionError: a gradient differs by more than `gradient` of the largest entry, or a parameter by more than
        `parameter`.
    """
    with contextlib.suppress(RuntimeError):  # jax is in use already: then the devices are what they are
        use_cpu_devices(8)
    found = compare(task, **kwargs)
    bad = [a for a in found if not (a.gradient <= gradient and a.parameter <= parameter)]
    if bad:
        lines = [
            f"  {a.layout} x {a.accumulation}: gradient {a.gradient:.1e}, parameter {a.parameter:.1e}" for a in bad
        ]
        raise AssertionError(
            "the objective's update depends on the layout:\n" + "\n".join(lines) + "\nTerms must be Sums over"
            " examples, and randomness must come from jaxops.example_keys(key, batch['id'])."
        )
    return found


def _run(task: Task, layout: dict[str, int], accumulation: int, batches: list[Any]) -> tuple[PyTree, PyTree, str]:
    """(gradients of the first step, parameters and rows after the last, reduction); NaN gradients of a skipped step."""
    count = int(np.prod(list(layout.values())))
    mesh = make_mesh(**layout, devices=jax.devices("cpu")[:count])
    remember = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, old, params=None: (grads, grads)
    )
    tx = optax.chain(remember, optax.sgd(0.1))
    with jax.set_mesh(mesh):
        tables = tables_on(task, mesh, len(batches[0]["id"]))
        extras = dict(task.extras)
        state = init_state(task.model.init, jax.random.key(0), tx, mesh, task.rules, tables=tables, extras=extras)
        step = build_step(
            task.objective,
            tx,
            mesh,
            seed=1,
            rules=task.rules,
            accumulation=accumulation,
            block=task.block,
            loss_weights=task.loss_weights,
            tables=tables,
            extras=extras,
            logical=task.logical,
        )
        grads: PyTree = None
        for batch in map(tables.plan, batches) if tables else batches:
            state, sums = jax.block_until_ready(step(state, batch))
            seen = jax.device_get(state.opt_state[0]) if grads is None else grads
            skipped = float(sums["nonfinite"].total) > 0
            grads = jax.tree.map(lambda g: np.full_like(g, np.nan), seen) if skipped else seen
        rows = {name: jax.device_get(table["rows"]) for name, table in state.tables.items()}
        return grads, {"params": jax.device_get(state.params), "tables": rows}, step.reduction


def _difference(a: PyTree, b: PyTree) -> float:
    """The largest difference of any entry, over the largest entry of `b` if any is not zero; NaN if one is NaN."""
    pairs = [(x, y) for (_, x), (_, y) in zip(named_leaves(a), named_leaves(b), strict=True)]
    largest = float(np.max([np.max(np.abs(y)) for _, y in pairs]))
    return float(np.max([np.max(np.abs(x - y)) for x, y in pairs])) / (largest or 1.0)
