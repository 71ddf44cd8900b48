"""A few real steps of an update, to see that it is compiled once and that its batches have one shape."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxops.audit.finding import Finding
from jaxops.core.compiles import Compiles
from jaxops.core.state import State
from jaxops.core.step import TrainStep
from jaxops.run.task import Task

STEPS = 4


def batches_finding(task: Task, rows: int) -> Finding:
    """Checks that batches from all over an epoch have the same entries, shapes and dtypes."""
    examples = task.source.examples
    starts = [0, rows, max(examples // 2 - rows // 2, 0), max(examples - rows // 2, 0)]
    kinds = {}
    for start in starts:
        batch = task.source.batch(start, rows)
        kinds[start] = {
            name: (np.shape(x), np.asarray(x).dtype.name) for name, x in jax.tree_util.tree_leaves_with_path(batch)
        }
    first = kinds[0]
    for start, kind in kinds.items():
        names = [jax.tree_util.keystr(name) for name in {**first, **kind} if first.get(name) != kind.get(name)]
        if names:
            problem = f"batches differ in {', '.join(names)} (at example {start}): each kind is compiled anew"
            return Finding("batches", "failed", problem, len(names), 0)
    return Finding("batches", "passed", f"{len(first)} entries have the same shapes and dtypes all over an epoch")


def recompiles_finding(
    update: TrainStep, state: State, batches: list[Mapping[str, Any]], mesh: Mesh, name: str = "train_step"
) -> Finding:
    """Checks that after the first step nothing is traced or compiled again; the state is donated.

    Args:
      update: the update.
      state: a state of arrays.
      batches: the batches of its steps.
      mesh: the mesh of both.
      name: the name of the update's program.
    """
    compiled = Compiles()
    with jax.set_mesh(mesh), compiled.watching(), _without_cache():
        for at, batch in enumerate(batches):
            state, sums = update(state, batch)
            jax.block_until_ready(sums)
            if at == 0:
                compiled.warm()
    again = compiled.again([name])
    count = sum(again.values())
    problem = f"{name} was compiled {count} more times in {len(batches) - 1} steps: a type, shape or sharding changes"
    why = f"{name} was compiled once for {len(batches)} steps"
    return Finding.of("recompiles", problem if count else None, why, count, 0)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Turns the persistent cache off, whose hits are no compiles that one could count."""
    old = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", old)
