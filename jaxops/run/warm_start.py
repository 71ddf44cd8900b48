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
from jaxops.data.idmaps import Range, Vocabulary
from jaxops.data.ids import Ids
from jaxops.run.task import Task
from jaxops.run.trained import Trained, load
from jaxops.tables.average import AVERAGE
from jaxops.tables.spec import TableSpec, places, stack
from jaxops.tables.tables import evaluated


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
    source = load(config.run, config.step)
    theirs = {path: np.asarray(leaf) for path, leaf in named_leaves(source.params)}
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
    tables, rows = _tables(state.tables, source, task, specs, config.match)
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


def _tables(
    state: Any, source: Trained, task: Task, ours: Mapping[str, TableSpec], match: str
) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The tables with the rows that both runs have, and how many those are."""
    stacks = stack(source.asks.tables)
    known = {name: (whole, of) for whole, spec in stacks.items() for name, of in places(whole, spec).items()}
    evaluated_rows: dict[str, np.ndarray] = {}
    taken: dict[str, tuple[int, int]] = {}
    tables = dict(state)
    for whole, spec in ours.items():
        for name, stored in places(whole, spec).items():
            if name not in known or not re.search(match, f"tables/{name}"):
                continue
            there, stored_there = known[name]
            here_ids, there_ids = _shared(name, task, source)
            if len(here_ids) == 0 or stacks[there].dim != spec.dim:
                continue
            if there not in evaluated_rows:
                local = {slot: jnp.asarray(x) for slot, x in source.tables[there].items()}
                evaluated_rows[there] = np.asarray(evaluated(stacks[there], local))
            new = evaluated_rows[there][stored_there(there_ids)]
            for slot in {"rows", AVERAGE} & set(tables[whole]):
                old = tables[whole][slot]
                write = jax.sharding.auto_axes(
                    lambda x, at, y: x.at[at].set(y), out_sharding=jax.typeof(old).sharding.spec
                )
                written = jax.jit(write)(old, stored(here_ids), new.astype(old.dtype))
                tables[whole] = {**tables[whole], slot: written}
            taken[f"tables/{name}"] = (len(here_ids), task.tables[name].rows)
    return tables, taken


def _shared(name: str, task: Task, source: Trained) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a table that are of the same id here and there, the unknown's among them."""
    here, there = task.config.tables[name], source.config.tables.get(name)
    if there is None or source.transform is None or here.ids.kind != there.ids.kind:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if not isinstance(here.ids, Vocabulary):
        rows = min(here.rows, there.rows) if here.ids == there.ids else 0
        same = isinstance(here.ids, Range) or here.rows == there.rows
        return np.arange(rows if same else 0), np.arange(rows if same else 0)
    theirs = Ids.of(source.transform(f"map.{name}.ids"), first=1)
    mine = Ids.of(task.transform[f"map.{name}.ids"], first=1)
    at = theirs.rows(mine.originals(np.arange(1, len(mine) + 1))) if len(mine) and len(theirs) else np.zeros(0, int)
    found = np.flatnonzero(at > 0)
    return np.concatenate([[0], found + 1]), np.concatenate([[0], at[found]])
