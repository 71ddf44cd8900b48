"""Table rows taken over from another run: rows are matched by original id, whatever their row numbers are."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxops.core.failures import UserError
from jaxops.core.sharding import named_leaves
from jaxops.data.idmaps import Range, Vocabulary
from jaxops.data.ids import Ids
from jaxops.families.rec.config import RecConfig
from jaxops.run.family import family_of
from jaxops.run.saved_run import SavedRun
from jaxops.run.task import CarriedRows
from jaxops.run.warm_start import shared_rows, with_rows
from jaxops.tables.average import AVERAGE
from jaxops.tables.spec import TableSpec, stack, stored_rows
from jaxops.tables.tables import evaluated

Inputs = Callable[[RecConfig], Mapping[str, Sequence[str]]]
"""A function from a config to the features that dense parameters read by position, by the path that lists them."""


def trained_tables(source: SavedRun) -> Mapping[str, TableSpec]:
    """Returns the specs of the tables of another run."""
    served: Any = family_of(source.config.task).load(source)
    return served.tables


def carry_rows(
    config: RecConfig,
    transform: Mapping[str, np.ndarray],
    specs: Mapping[str, TableSpec],
    state: Any,
    ours: Mapping[str, TableSpec],
    source: SavedRun,
    match: str,
    *,
    inputs: Inputs = lambda config: {},
) -> tuple[Any, dict[str, CarriedRows]]:
    """Takes over the rows of ids that both runs have; returns the tables, and the counts by `tables/NAME`.

    A row is written to the row that has the same id in this run. Rows of ids that the other run lacks stay fresh.
    Hashed rows are taken over where salt and number of rows are the same.

    Args:
      config: the config of the run that begins.
      transform: its transform, which has its id maps, as named arrays.
      specs: its tables by name.
      state: the state of its tables, as stacks.
      ours: the specs of those stacks.
      source: the run to take rows from.
      match: a pattern that `tables/NAME` must match.
      inputs: the features of a config that dense parameters read by position.

    Raises:
      UserError: such features have another order in the other run, so that its parameters would read wrong ones.
    """
    if source.config.model.kind == config.model.kind and _matches_dense(source, match):
        _require_order(inputs(config), inputs(source.config))
    if not source.weights.tables:
        return state, {}
    stacks = stack(trained_tables(source))
    known = {name: (whole, of) for whole, spec in stacks.items() for name, of in stored_rows(whole, spec).items()}
    evaluated_rows: dict[str, np.ndarray] = {}
    taken: dict[str, CarriedRows] = {}
    tables = dict(state)
    for whole, spec in ours.items():
        for name, stored in stored_rows(whole, spec).items():
            if name not in known or not re.search(match, f"tables/{name}"):
                continue
            there, stored_there = known[name]
            here_ids, there_ids, count = _shared(name, config, transform, source)
            if len(here_ids) == 0 or stacks[there].dim != spec.dim:
                continue
            if there not in evaluated_rows:
                local = {slot: jnp.asarray(x) for slot, x in source.weights.tables[there].items()}
                evaluated_rows[there] = np.asarray(evaluated(stacks[there], local))
            new = evaluated_rows[there][stored_there(there_ids)]
            for slot in {"rows", AVERAGE} & set(tables[whole]):
                written = with_rows(tables[whole][slot], stored(here_ids), new)
                tables[whole] = {**tables[whole], slot: written}
            taken[f"tables/{name}"] = count
    return tables, taken


def _matches_dense(source: SavedRun, match: str) -> bool:
    return any(re.search(match, path) for path, _ in named_leaves(source.weights.params))


def _require_order(here: Mapping[str, Sequence[str]], there: Mapping[str, Sequence[str]]) -> None:
    """Refuses a feature that the other run reads at another place among as many features.

    Among more or fewer the parameters that read them differ in shape, and are skipped for that.

    Raises:
      UserError: a feature has another place.
    """
    for path, now in here.items():
        before = there.get(path, ())
        if len(now) == len(before) and any(a != b and a in before for a, b in zip(now, before, strict=True)):
            raise UserError(
                f"init_from: {path} are in another order than in the other run, whose parameters read them by position:"
                f" {', '.join(now)} here, {', '.join(before)} there. Write them in its order, or take the rows of"
                " tables alone: init_from.match=^tables/"
            )


def _shared(
    name: str, config: RecConfig, transform: Mapping[str, np.ndarray], source: SavedRun
) -> tuple[np.ndarray, np.ndarray, CarriedRows]:
    """The rows of a table that are of the same id here and there, the unknown's among them; and how many ids those are.

    Of hashed ids and ranges, whose rows no list of ids names, rows are counted.
    """
    here, there = config.tables[name], source.config.tables.get(name)
    none = np.zeros(0, np.int64)
    if there is None or here.ids.kind != there.ids.kind:
        return none, none, CarriedRows(0, 0, 0)
    if not isinstance(here.ids, Vocabulary):
        assert here.rows != "auto" and there.rows != "auto"  # TableConfig.problems
        rows = min(here.rows, there.rows) if here.ids == there.ids else 0
        rows = rows if isinstance(here.ids, Range) or here.rows == there.rows else 0
        return np.arange(rows), np.arange(rows), CarriedRows(rows, here.rows - rows, there.rows - rows)
    theirs = Ids.of(source.transform(f"map.{name}.ids"), first=1)
    mine = Ids.of(transform[f"map.{name}.ids"], first=1)
    at, there_at = shared_rows(mine, theirs)
    count = CarriedRows(len(at), len(mine) - len(at), len(theirs) - len(at))
    return np.concatenate([[0], at]), np.concatenate([[0], there_at]), count
