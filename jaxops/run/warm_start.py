"""The beginnings of a state from elsewhere: parameters straight onto their devices, rows of tables by their ids."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxops.core.failures import UserError
from jaxops.core.sharding import named_leaves
from jaxops.core.state import State, join
from jaxops.core.weights import WeightSource, load_weights, targets_of, with_arrays
from jaxops.run.config import InitFrom
from jaxops.run.load import open_saved_run
from jaxops.run.task import Task
from jaxops.run.weights import AVERAGED
from jaxops.tables.spec import TableSpec


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """The paths of parameters that were loaded, of another shape there (with both shapes), and left fresh.

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


def begin_with(state: State, sources: Sequence[WeightSource]) -> tuple[State, WarmStart]:
    """The fresh state with the parameters that the sources have for it; each device reads its own slices.

    The optimizer's state and the step stay fresh; a moving average begins where the parameters do.

    Raises:
      UserError: nothing of a source fits, or two sources have the same parameter.
    """
    arrays, plan = load_weights(targets_of(join(state.params, state.frozen)), sources)
    params, frozen = with_arrays(state.params, arrays), with_arrays(state.frozen, arrays)
    extra = dict(state.extra)
    if AVERAGED in extra:
        extra[AVERAGED] = jax.tree.map(lambda p: jnp.copy(p).astype(jnp.float32), params)
    skipped = tuple(f"{path}: {shapes}" for path, shapes in plan.skipped.items())
    report = WarmStart(tuple(plan.loaded), skipped, plan.left)
    return dataclasses.replace(state, params=params, frozen=frozen, extra=extra), report


def init_from(state: State, task: Task, specs: Mapping[str, TableSpec], config: InitFrom) -> tuple[State, WarmStart]:
    """The fresh state with what of another run matches: parameters by path, rows of `tables/NAME` by their ids.

    Args:
      state: a fresh state.
      task: of the run that begins.
      specs: the tables of the state.
      config: the run, and the pattern that paths must match.

    Raises:
      UserError: the run cannot be read, or nothing of it fits.
    """
    saved = open_saved_run(config.run, config.step, trust=[task.config.task])
    tables, rows = state.tables, dict[str, tuple[int, int]]()
    if task.carry_rows is not None:
        tables, rows = task.carry_rows(state.tables, specs, saved, config.match)
    state = dataclasses.replace(state, tables=tables)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(saved.source(config.match))
        try:
            state, report = begin_with(state, [source])
        except UserError as error:
            if not rows:
                raise UserError(f"init_from: {error}") from None
            left = tuple(path for path, _ in named_leaves(join(state.params, state.frozen)))
            report = WarmStart((), (), left)
    return state, dataclasses.replace(report, rows=rows)
