"""Checks of updates by running them: one device against the mesh, microbatches, and packed against separate rows.

Tested in tests/audit/test_updates.py.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxops.audit.contract import ObjectiveCase
from jaxops.audit.finding import Finding
from jaxops.audit.layouts import BFLOAT16, Agreement, compare_layouts, mesh_of, rounding, told
from jaxops.core.accumulate import loss_counts, weighted_loss
from jaxops.core.failures import UserError
from jaxops.core.fresh_state import init_state
from jaxops.core.mesh import batch_axes
from jaxops.core.sharding import logical_axes, named_leaves
from jaxops.core.state import join
from jaxops.run.task import Task
from jaxops.run.training import tables_on

GRADIENT = 1e-6
PARAMETER = 1e-5
DEEP, BITS = 1e-3, 8
"""A difference beyond the bound but below DEEP may be the rounding of a deep model. Each parameter is then moved by its
last bit, and the difference may be BITS times what that does."""
PACKED = 1e-5
"""Another number of rows rounds otherwise: gradients of packed and separate rows differ by up to 1e-6 where right."""
MICROBATCHES = 2
ROWS = 8
"""The least number of examples of an audited batch."""
PACKED_ROWS = 2
"""The number of packed rows that are taken apart."""


@dataclasses.dataclass
class UpdateBatches:
    """The source of a task whose updates have batches of their own: the first rows of one, each time the same."""

    task: Task
    examples: int

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Returns the first `size` rows of an update's batch; leaves with more rows than examples in proportion."""
        assert self.task.update_batch is not None
        whole = dict(self.task.update_batch(self.task.config.batch.global_))
        rows = len(whole["id"])
        found: dict[str, np.ndarray] = jax.tree.map(lambda x: np.asarray(x)[: len(x) * size // rows], whole)
        return found


def with_update_batches(task: Task) -> Task:
    """Returns the task as its updates see it: its source gives what the objective reads, and a step is an update."""
    if task.update_batch is None:
        return task
    rows = len(task.update_batch(task.config.batch.global_)["id"])
    return dataclasses.replace(task, source=UpdateBatches(task, rows), update_batch=None, step=None)


def audited_rows(task: Task, shards: int, most: int) -> int:
    """Returns the number of examples of an audited batch: a few for each microbatch, device and block, at most `most`.

    Where `most` does not have room for several microbatches, it is the least number that the mesh and blocks divide.
    """
    unit = shards * task.block * MICROBATCHES
    if unit > most:
        unit = int(np.lcm(shards, task.block))
    return min(max(ROWS // unit * unit, unit), max(most // unit * unit, unit))


def seen_by_objective(task: Task, rows: int) -> tuple[PyTree, dict[str, Any]]:
    """Returns fresh parameters, and the first batch as the objective sees it: with rows of tables, and extras."""
    mesh = mesh_of({"data": 1})
    with jax.set_mesh(mesh):
        tables = tables_on(task, mesh, rows)
        state = init_state(
            task.model.init, jax.random.key(0), optax.identity(), mesh, task.rules, tables=tables, extras=task.extras
        )
        batch = dict(task.source.batch(0, rows))
        given = tables.plan(batch) if tables else batch

        def seen(batch: dict[str, Any]) -> dict[str, Any]:
            batch = jax.tree.map(lambda x: jax.sharding.reshard(x, P(batch_axes(mesh))), batch)
            for name, extra in task.extras.items():
                if extra.read is not None:
                    read = jax.sharding.auto_axes(extra.read, out_sharding=P(batch_axes(mesh)))
                    batch = {**batch, **read(state.extra[name], batch)}
            if tables is not None:
                looked_up = tables.lookup(state.tables, batch)
                batch = {name: x for name, x in batch.items() if name != "plan"} | {
                    "rows": tables.expand(looked_up, batch)
                }
            return batch

        found: tuple[PyTree, dict[str, Any]] = jax.device_get((state.params, jax.jit(seen)(given)))
    return found


def case_of(task: Task, rows: int) -> ObjectiveCase:
    """Returns the task's objective with fresh parameters and its first batch, on one device."""
    params, batch = seen_by_objective(task, rows)
    objective = told(task)

    def logical(params: PyTree, batch: Any, key: Any) -> Any:
        with logical_axes(task.logical):
            return objective(params, batch, key)

    logical.__dict__.update(objective.__dict__)
    frozen = (*task.frozen, *(() if task.config is None else task.config.optimizer.frozen))
    return ObjectiveCase(logical, params, batch, block=task.block, frozen=frozen, weights=task.loss_weights)


def update_findings(task: Task, layout: Mapping[str, int], rows: int, *, steps: int = 2) -> Iterator[Finding]:
    """Yields whether an update on the mesh, and one in microbatches, equals that of one device with one microbatch.

    Args:
      task: the task, as its updates see it.
      layout: sizes of the mesh axes above one.
      rows: examples of a batch.
      steps: steps of gradient descent.
    """
    devices = int(np.prod(list(layout.values())))
    shards = int(np.prod([layout.get(axis, 1) for axis in ("replica", "data", "fsdp")]))
    cut = rows % (shards * task.block * MICROBATCHES) == 0
    bfloat16 = task.config is not None and task.config.precision.compute == "bfloat16"
    compared = lambda counts: compare_layouts(
        task, [dict(layout)], counts, batch_size=rows, steps=steps, bfloat16=bfloat16
    )
    refused = ""
    try:
        found = compared((1, MICROBATCHES) if cut else (1,))
    except UserError:
        raise
    except Exception as error:  # an objective may refuse the shapes of a microbatch in any way
        if not cut:
            raise
        refused = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        found = compared((1,))
    bounds = {"gradient": GRADIENT, "parameter": PARAMETER}
    exact = [one for one in found if one.compute == "float32"]
    if any(GRADIENT < one.gradient < DEEP or PARAMETER < one.parameter < DEEP for one in exact):
        measured = rounding(task, batch_size=rows, steps=steps)
        bounds = {name: max(bounds[name], BITS * moved) for name, moved in zip(bounds, measured, strict=True)}
    whole = [one for one in found if one.accumulation == 1]
    axes = " x ".join(f"{axis} {size}" for axis, size in layout.items()) or "one device"
    if devices == 1:
        yield Finding.skipped("one device", "the mesh is one device (--cpu-devices 8 stands eight in)")
    else:
        yield _agreement("one device", whole, bounds, f"an update on {axes} is that of one device")
    if refused:
        yield Finding("accumulation", "failed", f"microbatches cannot be computed: {refused}")
    elif cut:
        parts = [one for one in found if one.accumulation > 1]
        yield _agreement(
            "accumulation", parts, bounds, f"{MICROBATCHES} microbatches make the update of the whole batch"
        )
    else:
        yield Finding.skipped("accumulation", f"an update of {rows} examples has no parts (blocks of {task.block})")


def _agreement(check: str, cases: list[Agreement], bounds: Mapping[str, float], why: str) -> Finding:
    """Judges agreements by the bounds of float32, and of bfloat16 where they are in it."""
    measured = {
        f"{name}{' in bfloat16' if one.compute == 'bfloat16' else ''}": getattr(one, name)
        for one in cases
        for name in ("gradient", "parameter")
    }
    bad = [
        f"{name} by {value:.1e} (at most {most:.1e})"
        for name, value in measured.items()
        if not value <= (most := bounds.get(name, BFLOAT16))
    ]
    problem = f"the update differs: {', '.join(bad)} of the largest entry"
    told = ", ".join(f"{name} {value:.1e}" for name, value in measured.items())
    return Finding.of(check, problem if bad else None, f"{why}: {told}", measured)


def packing_finding(case: ObjectiveCase) -> Finding:
    """Checks that texts which share a row have the loss and the gradients that they have in rows of their own."""
    batch = case.batch
    segment = batch.get("segment")
    if segment is None or np.ndim(segment) != 2:
        return Finding.skipped("packing", "rows hold one example each: there is no `segment` [batch, length]")
    if int(np.max(segment)) < 2:
        return Finding.skipped("packing", "no row of the batch holds more than one example")
    if case.block > 1:
        return Finding.skipped("packing", f"the objective couples blocks of {case.block} rows")
    fullest = np.argsort(-segment.max(axis=1), kind="stable")[:PACKED_ROWS]
    packed = case.pick(fullest)
    apart = _taken_apart(packed)
    run = jax.jit(jax.value_and_grad(lambda p, b: _loss(case, p, b)))
    both = case.on_mesh(lambda: [jax.device_get(run(case.trained[0], one)) for one in (packed, apart)])
    leaves = [named_leaves(grads) for _, grads in both]
    largest = max(float(np.max(np.abs(x), initial=0)) for _, x in leaves[1])
    gaps = {path: float(np.max(np.abs(x - y), initial=0)) for (path, x), (_, y) in zip(*leaves, strict=True)}
    worst = max(gaps, key=lambda path: np.nan_to_num(gaps[path], nan=np.inf))
    measured = max(
        gaps[worst] / (largest or 1.0), abs(float(both[0][0] - both[1][0])) / (abs(float(both[1][0])) or 1.0)
    )
    problem = (
        f"examples that share a row are not trained as they are alone (loss {both[0][0]:.6g} packed, {both[1][0]:.6g}"
        f" apart; gradient of {worst}): attention, positions or means must not leave a segment"
    )
    why = f"{int((segment[fullest] > 0).any(1).sum())} packed rows are trained as {len(apart['segment'])} separate ones"
    return Finding.of("packing", None if measured <= PACKED else problem, why, measured, PACKED)


def _loss(case: ObjectiveCase, params: PyTree, batch: Any) -> Any:
    sums = case.whole(join(params, case.trained[1]), batch, None)
    return weighted_loss(sums, loss_counts(sums), case.weights)


def _taken_apart(packed: dict[str, Any]) -> dict[str, Any]:
    """Returns a row for each segment of each row, in which the places of all other segments are empty."""
    segment = packed["segment"]
    pairs = [(row, one) for row in range(len(segment)) for one in np.unique(segment[row]) if one > 0]
    rows, own = (np.array(numbers) for numbers in zip(*pairs, strict=True))
    keep = segment[rows] == own[:, None]

    def one(x: np.ndarray) -> np.ndarray:
        x = x[rows]
        if x.shape[:2] != keep.shape:
            return x
        return np.where(keep.reshape(*keep.shape, *(1,) * (x.ndim - 2)), x, np.zeros((), x.dtype))

    found: dict[str, Any] = jax.tree.map(one, packed)
    return found | {"segment": np.where(keep, np.ones((), segment.dtype), np.zeros((), segment.dtype))}
