"""Updates of a task on several mesh layouts, compared with one device: no layout may change an update.

Tested in tests/property/.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jaxops.core.accumulate import Objective
from jaxops.core.failures import UserError
from jaxops.core.fresh_state import init_state
from jaxops.core.mesh import make_mesh, use_cpu_devices
from jaxops.core.sharding import named_leaves
from jaxops.core.step import build_step
from jaxops.core.sums import Sums
from jaxops.run.fence import require_constrained_kernels
from jaxops.run.task import Model, Task
from jaxops.run.training import tables_on

LAYOUTS: tuple[dict[str, int], ...] = (
    {"data": 1},
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"replica": 2, "fsdp": 4},
)


BFLOAT16 = 2.0**-3
"""The bound on the difference of gradients in bfloat16 and in float32: the norm of the difference over the norm.

A bfloat16 has eight bits of precision, so the relative error of a rounding is at most 2^-9, which alone would be
negligible. With ReLUs it is not: an input within a rounding error of zero switches its unit on or off, and that happens
to a share of about 2^-8 of the inputs. If a share of 2^-8 of a gradient's entries differs, the difference is 2^-4 of
its norm, for each such layer. (So the largest entry is no measure: it may be one that switched.) Four such layers make
2^-3. The shipped losses measured at most 2^-4.5. Sums over a batch or a catalogue that are accumulated in bfloat16
exceed the bound."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The difference between one layout and one device with one microbatch in float32.

    Attributes:
      layout: sizes of the mesh axes.
      accumulation: number of microbatches.
      reduction: the reduction that the step used.
      gradient: in float32 the largest difference of a gradient entry, over the largest entry; in bfloat16 the norm of
        the difference of all gradients, over their norm.
      parameter: the largest difference of a parameter after the steps of gradient descent, over the largest parameter.
        Rows of tables count as parameters. Slots of table optimizers count too, over the largest entry of their name.
      compute: dtype in which the objective received its parameters.
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
    """Compares gradients and parameters of every layout with one device and one microbatch; dropout and draws are on.

    Parameters that the task or `optimizer.frozen` names are frozen. It runs on CPU devices, even where there is an
    accelerator.

    Args:
      task: the task.
      layouts: mesh layouts, each with the sizes of its axes.
      accumulations: numbers of microbatches to try with each layout.
      batch_size: examples per step.
      steps: steps of gradient descent.
      bfloat16: also try every layout in bfloat16, with the first of the accumulations.

    Raises:
      RuntimeError: there are fewer CPU devices than the layouts need (call `use_cpu_devices(8)` before the first
        computation).
      UserError: the objective reads an entry that its batch does not have.
    """
    needed = max(int(np.prod(list(layout.values()))) for layout in layouts)
    if len(jax.devices("cpu")) < needed:
        raise RuntimeError(f"comparing layouts needs {needed} CPU devices: call jaxops.use_cpu_devices({needed}) first")
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
    """Runs `compare_layouts`, and raises an error that names the layouts which do not agree.

    First it refuses parameters that are multiplied while they are sharded over fsdp: there a small batch may agree
    where a large one does not (core/fence.py).

    Args:
      task: the task.
      layouts: mesh layouts, each with the sizes of its axes.
      accumulations: numbers of microbatches to try with each layout.
      gradient: largest allowed difference of a gradient in float32, over the largest entry; in bfloat16 the bound is
        `BFLOAT16`.
      parameter: largest allowed difference of a parameter in float32, over the largest; in bfloat16 it is `BFLOAT16`.
      batch_size: examples per step.
      steps: steps of gradient descent.
      bfloat16: also try bfloat16; None does so if the task's config computes in it (`precision.compute`).

    Raises:
      UserError: parameters are multiplied while sharded over fsdp, or the objective reads an entry that its batch does
        not have.
      AssertionError: a gradient or a parameter differs by more than its bound.
    """
    with contextlib.suppress(RuntimeError):  # jax is in use already, so its devices cannot change
        use_cpu_devices(8)
    if bfloat16 is None:
        bfloat16 = task.config is not None and task.config.precision.compute == "bfloat16"
    for layout in layouts:
        if layout.get("fsdp", 1) > 1:
            mesh = mesh_of(layout)
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


class _Nudged:
    """A model whose fresh parameters are moved by their last bit, up or down."""

    def __init__(self, model: Model) -> None:
        self.rules, self.shapes, self._model = model.rules, model.shapes, model
        self.padding: dict[str, str] = {}

    def init(self, key: Array) -> PyTree:
        leaves, structure = jax.tree.flatten(self._model.init(key))

        def moved(at: int, x: Array) -> Array:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            sign = jax.random.rademacher(jax.random.fold_in(key, at), x.shape, x.dtype)
            return x * (1 + sign * jnp.asarray(jnp.finfo(x.dtype).eps, x.dtype))

        return jax.tree.unflatten(structure, [moved(at, x) for at, x in enumerate(leaves)])


def rounding(task: Task, *, batch_size: int, steps: int) -> tuple[float, float]:
    """Measures how far an update on one device moves when every parameter moves by its last bit.

    A deep model multiplies rounding errors: no two orders of additions can be expected to agree better than that.
    Returns the difference of gradients and of parameters, as in `Agreement`.

    Args:
      task: the task.
      batch_size: examples per step.
      steps: steps of gradient descent.
    """
    batches = [task.source.batch(i * batch_size, batch_size) for i in range(steps)]
    one = _run(task, LAYOUTS[0], 1, batches, batch_size)
    other = _run(dataclasses.replace(task, model=_Nudged(task.model)), LAYOUTS[0], 1, batches, batch_size)
    return _difference(other.grads, one.grads), _difference(other.params, one.params)


class _Update(NamedTuple):
    """The first step's gradients, and the parameters, table rows and table slots (by name) after the last step."""

    grads: PyTree
    params: PyTree
    slots: dict[str, PyTree]
    reduction: str


def mesh_of(layout: Mapping[str, int]) -> Mesh:
    """Returns a mesh over as many CPU devices as the sizes of its axes multiply to."""
    return make_mesh(**layout, devices=jax.devices("cpu")[: int(np.prod(list(layout.values())))])


def _run(
    task: Task,
    layout: dict[str, int],
    accumulation: int,
    batches: list[Any],
    batch_size: int,
    compute: str = "float32",
) -> _Update:
    """Runs gradient descent over these batches; a skipped step makes the gradients NaN, so that no bound holds."""
    mesh = mesh_of(layout)
    remember = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, old, params=None: (grads, grads)
    )
    tx = optax.chain(remember, optax.sgd(0.1))
    frozen = (*task.frozen, *(() if task.config is None else task.config.optimizer.frozen))
    with jax.set_mesh(mesh):
        tables = tables_on(task, mesh, batch_size)
        extras = dict(task.extras)
        state = init_state(
            task.model.init, jax.random.key(0), tx, mesh, task.rules, frozen=frozen, tables=tables, extras=extras
        )
        step = build_step(
            told(task),
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


def told(task: Task) -> Objective:
    """Returns the task's objective, wrapped so that a missing batch entry raises an error with advice."""

    @functools.wraps(task.objective)
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
    """Returns the largest difference of an entry, over the largest entry of `b` unless that is zero; NaN if one is."""
    pairs = [(x, y) for (_, x), (_, y) in zip(named_leaves(a), named_leaves(b), strict=True)]
    largest = float(np.max([np.max(np.abs(y)) for _, y in pairs]))
    return float(np.max([np.max(np.abs(x - y)) for x, y in pairs])) / (largest or 1.0)


def _distance(a: PyTree, b: PyTree) -> float:
    """Returns the norm of the difference over the norm of `b`, of all entries together; NaN if any is NaN."""
    norm = lambda trees: float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in trees)))
    of_both = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return norm(x - y for x, y in of_both) / (norm(y for _, y in of_both) or 1.0)
