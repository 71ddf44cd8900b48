"""Evaluation of a trained ranker on data that are not those of its run, by the very functions that serve it."""

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxops.config.types import ByPath
from jaxops.core.failures import UserError
from jaxops.data.interactions.heldout import Queries
from jaxops.data.interactions.interactions import Interactions
from jaxops.data.interactions.open import open_data
from jaxops.families.rec.histories import Histories
from jaxops.families.rec.ranking import ranking_evaluation
from jaxops.families.rec.repeats import seen_before
from jaxops.families.rec.trained import recorded
from jaxops.run.batched import evaluate_now
from jaxops.run.outputs import counted


class AskedBatches:
    """Batches of histories (histories.py) with what comes next as `target`, and `weight` 0 for the padding."""

    def __init__(self, batches: Any, target: np.ndarray, size: int) -> None:
        self._batches, self._target, self._size = batches, target, size

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        return (self.rows(k, 0, self._size) for k in range(len(self)))

    def rows(self, k: int, start: int, stop: int) -> Mapping[str, np.ndarray]:
        """Returns rows `[start, stop)` of batch k alone."""
        at = np.arange(k * self._size + start, k * self._size + stop)
        real = at < len(self._target)
        target = np.where(real, self._target[np.where(real, at, 0)], 0).astype(np.int32)
        return {**self._batches.rows(k, start, stop), "target": target, "weight": real.astype(np.float32)}


def evaluate_other_data(served: Any, parts: tuple[str, ...], say: Callable[[str], None]) -> dict[str, float]:
    """Evaluates a ServedRanking on what lies at its run's `data` now, without what training saw of it.

    Items that the model does not know are left out of histories; as a target they are a miss.

    Raises:
      UserError: the data cannot be opened or are a function of the user's own; training saw all of their queries.
    """
    saved, config = served.saved, served.config
    if isinstance(config.data, ByPath):
        raise UserError(f"--other-data: {config.data.fn} is a function of your own: no ids say what training saw of it")
    data, known = open_data(config.data), recorded(saved)
    inter = data.inter
    say(f"other data than the run's: {saved.folder.other_data({'split': {'sha256': data.split.sha256}}) or 'the same'}")
    if known is None:
        say("the run was made before runs kept what training saw: events that it saw may be among these targets")
    if config.evaluate.slices:
        say("slices are measured on the run's own data alone")
    item = np.zeros(inter.n_items + 1, np.int32)
    item[1:] = np.maximum(served.item_ids.rows(inter.item_ids.originals(np.arange(1, inter.n_items + 1))), 0)
    again = seen_before(inter) if config.repeats == "exclude" else np.zeros(len(inter.item), bool)
    asked: dict[str, tuple[Histories, np.ndarray]] = {}
    for part, queries in (("valid", data.split.valid), ("test", data.split.test)):
        if part not in parts or not len(queries):
            continue
        fresh = np.ones(len(queries), bool) if known is None else ~known.knows(inter, queries)
        if not fresh.all():
            say(f"{part}: {counted(int((~fresh).sum()), 'query', 'queries')} left out: training saw the target")
        repeated = fresh & again[inter.offsets[queries.user] + queries.history]
        if repeated.any():
            found = counted(int(repeated.sum()), "query", "queries")
            say(f"{part}: {found} left out: the user has had the target before (repeats: exclude)")
        fresh &= ~repeated
        given, target, unknown = _asked(served, inter, item, queries, fresh)
        if unknown:
            say(f"{part}: {counted(unknown, 'query', 'queries')} left out: no item of the history is known")
        if not len(given.users):
            raise UserError(f"--other-data: no {part} query is left to evaluate: each was left out, as said above")
        say(f"{part}: {counted(len(target), 'query', 'queries')}, {int((target == 0).sum()):,} with an unknown target")
        asked[part] = given, target
    return _measured(served, asked)


def _asked(
    served: Any, inter: Interactions, item: np.ndarray, queries: Queries, fresh: Bool[np.ndarray, " queries"]
) -> tuple[Histories, np.ndarray, int]:
    """The histories of the queries that are `fresh`, their targets, and how many have no history that is known.

    `item` gives the model's row of each item row of these data, 0 where it knows none.
    """
    at = np.flatnonzero(fresh)
    first, count = inter.offsets[queries.user[at]], queries.history[at]
    place = np.repeat(np.arange(len(at)), count)
    event = np.arange(int(count.sum())) + np.repeat(first - (np.cumsum(count) - count), count)
    rows = item[inter.item[event]]
    held = rows > 0
    lengths = np.bincount(place[held], minlength=len(at))
    keep = lengths > 0
    at, counts = at[keep], lengths[keep]
    ranking = served.ranking
    asked_in = inter.offsets[queries.user[at]] + queries.history[at]
    of_events = event[held]  # queries without any have none of these
    given = Histories(
        inter.user_ids.originals(queries.user[at]),
        rows[held],
        np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        context={name: inter.context_of(name, asked_in) for name, of in ranking.context.items() if of == "id"},
        along={name: inter.context_of(name, of_events) for name, of in ranking.context.items() if of == "events"},
    )
    return given, item[queries.target[at]], int((~keep).sum())


def _measured(served: Any, asked: Mapping[str, tuple[Histories, np.ndarray]]) -> dict[str, float]:
    def batches(part: str) -> Callable[[int], Any]:
        given, target = asked[part]
        return lambda size: AskedBatches(served.batches(given, size), target, size)

    config = served.config
    evaluation = ranking_evaluation(served.ranking, config, {part: batches(part) for part in asked})
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, slices=()))
    task: Any = types.SimpleNamespace(config=config, tables=served.ranking.tables, evaluation=evaluation)
    saved = served.saved
    return evaluate_now(task, saved.mesh, saved.placed(saved.passes(served.ranking.tables, 512)), tuple(asked))
