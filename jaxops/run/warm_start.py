"""Warm starts: a fresh state takes parameters (read straight onto their devices) and table rows (by id) from others."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int64, Shaped

from jaxops.core.failures import UserError
from jaxops.core.sharding import named_leaves
from jaxops.core.state import Params, State, join
from jaxops.core.weights import WeightSource, load_weights, targets_of, with_arrays
from jaxops.data.ids import Ids
from jaxops.run.config import InitFrom
from jaxops.run.load import open_saved_run
from jaxops.run.saved_run import SavedRun
from jaxops.run.task import CarriedRows, Task
from jaxops.run.weights import AVERAGED
from jaxops.tables.spec import TableSpec


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """The report of a warm start.

    `rows` are those of tables, and of parameters with a row for each id: taken over by id, new here, gone since.
    """

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    left: tuple[str, ...]
    rows: dict[str, CarriedRows] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} parameters loaded"]
        for name, (taken, new, gone) in self.rows.items():
            parts.append(f"{name} by ids: {taken:,} rows taken, {new:,} new, {gone:,} gone")
        if self.skipped:
            parts.append(f"skipped for their shape: {', '.join(self.skipped)}")
        if self.left:
            parts.append(f"left fresh: {', '.join(self.left)}")
        return "; ".join(parts)


def first_state(state: State, task: Task, specs: Mapping[str, TableSpec], say: Callable[[str], None]) -> State:
    """Returns the state before the first step: a fresh one with all weights that the task takes from elsewhere.

    Args:
      state: the fresh state.
      task: the task.
      specs: the specs of its tables.
      say: tells a person where the weights come from.

    Raises:
      UserError: weights cannot be read, or do not fit.
    """
    if task.start is not None:
        state, report = begin_with(state, task.start(), copied_paths(state, task.copies))
        say(f"begins with: {report}")
    if task.config.init_from:
        state, report = init_from(state, task, specs, task.config.init_from)
        say(f"init_from {task.config.init_from.run}: {report}")
    return with_copies(state, task.copies)


def begin_with(state: State, sources: Sequence[WeightSource], done: Collection[str] = ()) -> tuple[State, WarmStart]:
    """Returns the fresh state with the parameters that the sources have for it; each device reads its own slices.

    The optimizer's state and the step stay fresh; a moving average begins where the parameters do. Parameters whose
    paths are `done` have their beginning already and stay as they are.

    Raises:
      UserError: nothing of a source fits, or two sources have the same parameter.
    """
    targets = targets_of(join(state.params, state.frozen))
    arrays, plan = load_weights({path: x for path, x in targets.items() if path not in done}, sources)
    skipped = tuple(f"{path}: {shapes}" for path, shapes in plan.skipped.items())
    return _averaged(_with(state, arrays)), WarmStart(tuple(plan.loaded), skipped, plan.left)


def copied_paths(state: State, copies: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the paths of the parameters that begin as copies of others (`Task.copies`)."""
    return tuple(path for path, _ in _leaves(state) if path.startswith(tuple(copies)))


def with_copies(state: State, copies: Mapping[str, str]) -> State:
    """Returns the state in which each parameter below a key of `copies` equals the one below the key's value.

    A copy keeps its own dtype and sharding, and arrays of its own: what it is copied from may be donated.
    """
    leaves = dict(_leaves(state))
    wanted = {path: leaves[path] for path in copied_paths(state, copies)}
    if not wanted:
        return state
    begins = {path: next(prefix for prefix in copies if path.startswith(prefix)) for path in wanted}
    given = {path: leaves[copies[begin] + path.removeprefix(begin)] for path, begin in begins.items()}
    like = {path: (leaf.dtype, jax.typeof(leaf).sharding.spec) for path, leaf in wanted.items()}

    def copied(given: Mapping[str, Array]) -> dict[str, Array]:
        cast = {path: jnp.copy(given[path]).astype(dtype) for path, (dtype, _) in like.items()}
        return {path: jax.sharding.reshard(cast[path], spec) for path, (_, spec) in like.items()}

    return _with(state, jax.jit(copied)(given))


def init_from(state: State, task: Task, specs: Mapping[str, TableSpec], config: InitFrom) -> tuple[State, WarmStart]:
    """Returns the fresh state with what another run has for it: parameters by path, and table rows by their ids.

    Rows of `tables/NAME`, and of parameters that have a row for each id (`Task.row_ids`), go to the same ids here.

    Args:
      state: a fresh state.
      task: the task of the run that begins.
      specs: the tables of the state.
      config: names the other run, and the pattern that paths must match.

    Raises:
      UserError: the run cannot be read, or nothing of it fits.
    """
    saved = open_saved_run(config.run, config.step, trust=[task.config.task])
    tables, rows = state.tables, dict[str, CarriedRows]()
    if task.carry_rows is not None:
        tables, rows = task.carry_rows(state.tables, specs, saved, config.match)
    state, by_id = _carry_parameters(dataclasses.replace(state, tables=tables), task, saved, config.match)
    rows |= by_id
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(saved.source(config.match))
        try:
            state, report = begin_with(state, [source], {*by_id, *copied_paths(state, task.copies)})
        except UserError as error:
            if not rows:
                raise UserError(f"init_from: {error}") from None
            left = tuple(path for path, _ in _leaves(state) if path not in by_id)
            state, report = _averaged(state), WarmStart((), (), left)
    return state, dataclasses.replace(report, rows=rows)


def _carry_parameters(state: State, task: Task, saved: SavedRun, match: str) -> tuple[State, dict[str, CarriedRows]]:
    """The state with rows of parameters taken over by id, where the ids of the two runs differ.

    Where they are the same, a row is at its place already and is loaded as any parameter is. Where the other run's ids
    are not known, nothing says whose its rows are, and the parameter is left fresh.
    """
    leaves, arrays, rows = dict(_leaves(state)), dict[str, Any](), dict[str, CarriedRows]()
    for path, name in task.row_ids.items():
        there = _leaf(saved.weights.params, path) if path in leaves and re.search(match, path) else None
        if there is None or there.shape[1:] != leaves[path].shape[1:]:
            continue  # no such parameter, or one of another width: told as any other
        here_ids = Ids.of(task.transform[name], first=1)
        try:
            there_ids = Ids.of(saved.transform(name), first=1)
        except UserError:
            rows[path] = CarriedRows(0, len(here_ids), 0)
            continue
        if np.array_equal(here_ids.values, there_ids.values) and there.shape == leaves[path].shape:
            continue
        to, where = shared_rows(here_ids, there_ids)
        arrays[path] = with_rows(leaves[path], to, there[where])
        rows[path] = CarriedRows(len(to), len(here_ids) - len(to), len(there_ids) - len(to))
    return _with(state, arrays), rows


def shared_rows(here: Ids, there: Ids) -> tuple[Int64[np.ndarray, " shared"], Int64[np.ndarray, " shared"]]:
    """Returns the rows of the ids that both have, here and in the other run."""
    if not len(here) or not len(there) or here.kind != there.kind:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    mine = np.arange(here.first, here.first + len(here))
    theirs = there.rows(here.originals(mine)).astype(np.int64)
    found = theirs >= there.first
    return mine[found], theirs[found]


def with_rows(x: Array, at: Int64[np.ndarray, " rows"], new: Shaped[np.ndarray, "rows ..."]) -> Array:
    """Returns the array with these rows in place of its own; its sharding stays as it is."""
    write = jax.sharding.auto_axes(lambda x, at, y: x.at[at].set(y), out_sharding=jax.typeof(x).sharding.spec)
    return jax.jit(write)(x, at, np.asarray(new).astype(x.dtype))


def _with(state: State, arrays: Mapping[str, Array]) -> State:
    """The state with these parameters, by path."""
    params, frozen = with_arrays(state.params, arrays), with_arrays(state.frozen, arrays)
    return dataclasses.replace(state, params=params, frozen=frozen)


def _averaged(state: State) -> State:
    """Returns the state with its moving average set to its parameters."""
    if AVERAGED not in state.extra:
        return state
    average = jax.tree.map(lambda p: jnp.copy(p).astype(jnp.float32), state.params)
    return dataclasses.replace(state, extra={**state.extra, AVERAGED: average})


def _leaves(state: State) -> list[tuple[str, Any]]:
    return named_leaves(join(state.params, state.frozen))


def _leaf(params: Params, path: str) -> np.ndarray | None:
    return next((np.asarray(leaf) for name, leaf in named_leaves(params) if name == path), None)
