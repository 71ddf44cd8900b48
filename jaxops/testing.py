"""Checks that users run on their own tasks: every layout and microbatch must agree with one device."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jaxops.core.accumulate import Objective
from jaxops.core.failures import UserError
from jaxops.core.mesh import make_mesh, use_cpu_devices
from jaxops.core.sharding import named_leaves
from jaxops.core.step import build_step, init_state
from jaxops.core.sums import Sums
from jaxops.run.fence import require_constrained_kernels
from jaxops.run.task import Task
from jaxops.run.training import tables_on

LAYOUTS: tuple[dict[str, int], ...] = (
    {"data": 1},
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"replica": 2, "fsdp": 4},
)


BFLOAT16 = 2.0**-3
"""How far gradients in bfloat16 may be from those in float32: the norm of the difference over the norm.

A bfloat16 has eight bits, so a rounding is off by 2^-9 at most: next to nothing, were it not for ReLUs. An input within
a rounding of zero, as about one of 2^-8 is, switches its unit on or off; where a share of 2^-8 of a gradient is another
one, that is 2^-4 of its norm, in every such layer. (So the largest entry tells nothing: it may be one that switched.)
Four such layers make 2^-3; shipped losses measured 2^-4.5 at most. Sums over a batch or a catalogue that are kept in
bfloat16 go beyond."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far one layout is from one device with one microbatch in float32.

    `gradient` is the largest difference of any gradient entry over the largest entry; `parameter` the largest
    difference of any parameter after five steps of gradient descent, relative to the largest parameter; rows of tables
    are held to it too, and the slots of their optimizers, each relative to the largest of its name. `compute` is the
    dtype that the objective saw its parameters in; in bfloat16 `gradient` is the norm of the difference of all
    gradients over their norm.
    """

    layout: dict[str, int]
    accumulation: int
    reduction: str
    gradient: float
    parameter: float
    compute: str = "float32"


def compare_layouts(
    task: Task,
    layouts: Sequence[dict[str, int]] = LAYOUTS,
    accumulations: Sequence[int] = (1, 4),
    *,
    batch_size: int = 32,
    steps: int = 5,
    bfloat16: bool = False,
) -> list[Agreement]:
    """Gradients and parameters of every layout against one device with one microbatch; dropout and draws are on.

    What `optimizer.frozen` names is frozen. It runs on virtual CPU devices, whatever accelerator is here.

    Args:
      bfloat16: every layout, with the first of the accumulations, is tried in bfloat16 as well.

    Raises:
      RuntimeError: fewer than eight devices (ask for them before the first computation: `use_cpu_devices(8)`).
      UserError: the objective asks its batch for what is not there.
    """
    if len(jax.devices("cpu")) < 8:
        raise RuntimeError("comparing layouts needs 8 CPU devices: call jaxops.use_cpu_devices(8) first")
    batches = [task.source.batch(i * batch_size, batch_size) for i in range(steps)]
    one = _run(task, LAYOUTS[0], 1, batches, batch_size)
    cases = [(layout, accumulation, "float32") for layout in layouts for accumulation in accumulations]
    if bfloat16:
        cases += [(layout, accumulation, "bfloat16") for layout in layouts for accumulation in accumulations[:1]]
    out = []
    for layout, accumulation, compute in cases:
        alone = (layout, accumulation, compute) == (LAYOUTS[0], 1, "float32")
        found = one if alone else _run(task, layout, accumulation, batches, batch_size, compute)
        gradient = (_distance if compute == "bfloat16" else _difference)(found.grads, one.grads)
        tables = [_difference(found.slots[slot], one.slots[slot]) for slot in one.slots]
        parameter = float(np.max([_difference(found.params, one.params), *tables]))
        out.append(Agreement(layout, accumulation, found.reduction, gradient, parameter, compute))
    return out


def check(
    task: Task,
    layouts: Sequence[dict[str, int]] = LAYOUTS,
    accumulations: Sequence[int] = (1, 4),
    *,
    gradient: float = 1e-6,
    parameter: float = 1e-5,
    batch_size: int = 32,
    steps: int = 5,
    bfloat16: bool | None = None,
) -> list[Agreement]:
    """`compare_layouts`, and an error that names the layouts which do not agree.

    First it refuses parameters that are multiplied as they lie over fsdp: there a small batch may agree and a large one
    not (core/fence.py).

    Args:
      gradient: how far a gradient may be off, over the largest entry; `BFLOAT16` in bfloat16.
      parameter: how far a parameter may be off, over the largest; `BFLOAT16` in bfloat16.
      bfloat16: whether to try it as well; by default where the task's config computes in it (`precision.compute`).

    Raises:
      UserError: parameters are multiplied as they lie over fsdp, or the objective asks its batch for what is not there.
      AssertionError: a gradient differs by more than `gradient` of the largest entry, or a parameter by more than
        `parameter`.
    """
    with contextlib.suppress(RuntimeError):  # jax is in use already: then the devices are what they are
        use_cpu_devices(8)
    if bfloat16 is None:
        bfloat16 = task.config is not None and task.config.precision.compute == "bfloat16"
    for layout in layouts:
        if layout.get("fsdp", 1) > 1:
            mesh = _mesh(layout)
            tables = tables_on(task, mesh, batch_size)
            batch = task.source.batch(0, batch_size)
            require_constrained_kernels(task, mesh, tables, tables.plan(batch) if tables else batch)
    found = compare_layouts(task, layouts, accumulations, batch_size=batch_size, steps=steps, bfloat16=bfloat16)
    bad = []
    for case in found:
        most = (BFLOAT16, BFLOAT16) if case.compute == "bfloat16" else (gradient, parameter)
        if not (case.gradient <= most[0] and case.parameter <= most[1]):
            bad.append(case)
    if bad:
        lines = [
            f"  {a.layout} x {a.accumulation}{' in bfloat16' if a.compute == 'bfloat16' else ''}:"
            f" gradient {a.gradient:.1e}, parameter {a.parameter:.1e}"
            for a in bad
        ]
        why = "Terms must be Sums over examples, and randomness must come from jaxops.example_keys(key, batch['id'])."
        if all(a.compute == "bfloat16" for a in bad):
            why = "In float32 all is well: cast to float32 before what adds up over examples, positions or items."
        raise AssertionError("the objective's update depends on the layout:\n" + "\n".join([*lines, why]))
    return found


class _Update(NamedTuple):
    """Gradients of the first step; parameters and rows, and the other arrays of tables by name, after the last."""

    grads: PyTree
    params: PyTree
    slots: dict[str, PyTree]
    reduction: str


def _mesh(layout: dict[str, int]) -> Mesh:
    return make_mesh(**layout, devices=jax.devices("cpu")[: int(np.prod(list(layout.values())))])


def _run(
    task: Task,
    layout: dict[str, int],
    accumulation: int,
    batches: list[Any],
    batch_size: int,
    compute: str = "float32",
) -> _Update:
    """Steps of gradient descent over these batches; NaN gradients of a skipped step."""
    mesh = _mesh(layout)
    remember = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, old, params=None: (grads, grads)
    )
    tx = optax.chain(remember, optax.sgd(0.1))
    frozen = () if task.config is None else task.config.optimizer.frozen
    with jax.set_mesh(mesh):
        tables = tables_on(task, mesh, batch_size)
        extras = dict(task.extras)
        state = init_state(
            task.model.init, jax.random.key(0), tx, mesh, task.rules, frozen=frozen, tables=tables, extras=extras
        )
        step = build_step(
            _told(task),
            tx,
            mesh,
            seed=1,
            rules=task.rules,
            accumulation=accumulation,
            block=task.block,
            loss_weights=task.loss_weights,
            compute_dtype=jnp.bfloat16 if compute == "bfloat16" else None,
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
        held: dict[str, Any] = {}
        for name, table in jax.device_get(state.tables).items():
            for slot, x in table.items():
                held.setdefault(slot, {})[name] = np.asarray(x, np.float64)
        params = {"params": jax.device_get(state.params), "tables": held.pop("rows", {})}
        return _Update(grads, params, held, step.reduction)


def _told(task: Task) -> Objective:
    """The objective, which says in words what it misses in its batch."""

    def objective(params: PyTree, batch: Any, key: Array | None) -> Sums:
        try:
            return task.objective(params, batch, key)
        except KeyError as error:
            name = error.args[0] if error.args else None
            if name in batch or name in params:
                raise
            raise UserError(
                f"objective: it asks for {name!r}, which its batch has not (there are: {', '.join(sorted(batch))}), nor"
                f" its parameters ({', '.join(sorted(params))}). What is neither data nor a parameter comes from the"
                f" `read` of an Extra in Task.extras (there are: {', '.join(sorted(task.extras)) or 'none'})"
            ) from error

    return objective


def _difference(a: PyTree, b: PyTree) -> float:
    """The largest difference of any entry, over the largest entry of `b` if any is not zero; NaN if one is NaN."""
    pairs = [(x, y) for (_, x), (_, y) in zip(named_leaves(a), named_leaves(b), strict=True)]
    largest = float(np.max([np.max(np.abs(y)) for _, y in pairs]))
    return float(np.max([np.max(np.abs(x - y)) for x, y in pairs])) / (largest or 1.0)


def _distance(a: PyTree, b: PyTree) -> float:
    """The norm of the difference over the norm of `b`, of all entries together; NaN if one is NaN."""
    norm = lambda trees: float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in trees)))
    of_both = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return norm(x - y for x, y in of_both) / (norm(y for _, y in of_both) or 1.0)
