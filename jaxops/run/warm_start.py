"""Warm start: parameters of another run by path, rows of its tables by id, with a report of what became of them."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxops.core.failures import UserError
from jaxops.core.rows import put
from jaxops.core.sharding import map_named, named_leaves
from jaxops.core.state import State
from jaxops.run.load import open_saved_run
from jaxops.run.task import Task
from jaxops.tables.spec import TableSpec


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Paths of parameters: taken over, of another shape there (with both shapes), and not asked for or not there.

    `rows` are of tables: how many were taken over, and how many there are.
    """

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    left: tuple[str, ...]
    rows: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} parameters loaded"]
        parts += [f"{name}: {taken:,} of {rows:,} rows" for name, (taken, rows) in self.rows.items()]
        if self.skipped:
            parts.append(f"skipped for their shape: {', '.join(self.skipped)}")
        if self.left:
            parts.append(f"left fresh: {', '.join(self.left)}")
        return "; ".join(parts)


def warm_start(state: State, task: Task, specs: Mapping[str, TableSpec]) -> tuple[State, WarmStart]:
    """The state with what of the run of `init_from` matches: parameters by path, rows of `tables/NAME` by their ids.

    A row goes to the row here that has its id, wherever that lies; ids that are new stay fresh, and so do optimizer and
    step. Hashed rows are taken over where salt and number of rows are the same.

    Args:
      specs: the tables of the state.

    Raises:
      UserError: the run cannot be read, or nothing of it fits.
    """
    config = task.config.init_from
    source = open_saved_run(config.run, config.step)
    theirs = {path: np.asarray(leaf) for path, leaf in named_leaves(source.weights.params)}
    loaded, skipped, left = [], [], []

    def take(path: str, leaf: Any) -> Any:
        if not re.search(config.match, path) or path not in theirs:
            left.append(path)
            return leaf
        value = theirs[path]
        if value.shape != leaf.shape:
            skipped.append(f"{path} {value.shape} there, {leaf.shape} here")
            return leaf
        loaded.append(path)
        return put(value.astype(leaf.dtype), leaf)

    params, frozen = map_named(take, state.params), map_named(take, state.frozen)
    tables, rows = state.tables, dict[str, tuple[int, int]]()
    if task.carry_rows is not None:
        tables, rows = task.carry_rows(state.tables, specs, source, config.match)
    if not loaded and not rows:
        raise UserError(
            f"init_from: nothing of {config.run} fits {config.match!r}: it has {', '.join(sorted(theirs)[:12])}"
            + (f"; skipped {'; '.join(skipped)}" if skipped else "")
        )
    extra = dict(state.extra)
    if "ema" in extra:
        extra["ema"] = jax.tree.map(lambda p: jnp.copy(p).astype(jnp.float32), params)
    report = WarmStart(tuple(loaded), tuple(skipped), tuple(left), rows)
    return dataclasses.replace(state, params=params, frozen=frozen, extra=extra, tables=tables), report
