"""Evaluation batches: every query once, in batches of one size; the last batch is padded with rows of weight 0."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32, Int64

from jaxops.data.interactions.heldout import Queries
from jaxops.data.interactions.interactions import Interactions


def seen_width(inter: Interactions, *parts: Queries) -> int:
    """Returns a width for the distinct items of any history of `parts` (validation and test: one shape), in eights."""
    user = np.concatenate([part.user for part in parts]) if parts else np.zeros(0, np.int64)
    history = np.concatenate([part.history for part in parts]) if parts else np.zeros(0, np.int64)
    return distinct_width(inter.item, inter.offsets[user], history)


def distinct_width(
    items: Int32[np.ndarray, " events"], first: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"]
) -> int:
    """Returns the most distinct items of any run of `counts` events from `first` on, rounded up to a multiple of 8."""
    most = 1
    for at in np.argsort(-counts, kind="stable"):
        if counts[at] <= -(-most // 8) * 8:
            break
        most = max(most, len(np.unique(items[first[at] : first[at] + counts[at]])))
    return -(-most // 8) * 8


def seen_items(
    items: Int32[np.ndarray, " events"],
    first: Int64[np.ndarray, " n"],
    counts: Int64[np.ndarray, " n"],
    width: int,
) -> Int32[np.ndarray, "n width"]:
    """Returns all items of each run of `counts` events from `first` on, 0 where there are no more.

    A run of more events than `width` gives each of its items once.

    Args:
      items: of all events.
      first: where each run begins.
      counts: how long it is.
      width: room for the items of one run, at least `distinct_width` of them.

    Raises:
      ValueError: a run has more distinct items than there is room for.
    """
    columns = np.arange(width)
    found = np.where(columns < counts[:, None], items.take(first[:, None] + columns, mode="clip"), 0)
    for at in np.flatnonzero(counts > width):
        distinct = np.unique(items[first[at] : first[at] + counts[at]])
        if len(distinct) > width:
            raise ValueError(f"a history has {len(distinct)} distinct items, seen={width}")
        found[at] = 0
        found[at, : len(distinct)] = distinct
    return found.astype(np.int32)


class QueryBatches:
    """A sequence of evaluation batches, in order of the queries.

    Each is {"id" [B] int32 query, "items" [B, L] int32 latest history padded with 0 on the left, "target" [B]
    int32, "seen" [B, S] int32 all items of the history (once where it is longer than S, 0 where there are no more),
    "weight" [B] float32, "user" [B] int32, "event" [B] int32 the target's row of all events}; with `event_rows` also
    `Interactions.event_rows` of the items, [B, L]. S is `seen` (default: `seen_width` of these queries). Padding rows
    are zero in every entry (-1 in event rows).

    Reading a batch raises ValueError where a history has more distinct items than `seen`.
    """

    def __init__(
        self,
        inter: Interactions,
        queries: Queries,
        length: int,
        size: int,
        *,
        seen: int | None = None,
        event_rows: bool = False,
    ) -> None:
        self.size, self.length, self._event_rows = size, length, event_rows
        self.seen = seen_width(inter, queries) if seen is None else seen
        self._inter, self._queries = inter, queries

    def __len__(self) -> int:
        return -(-len(self._queries) // self.size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        if not 0 <= k < len(self):
            raise IndexError(f"batch {k} of {len(self)}")
        return self.rows(k, 0, self.size)

    def rows(self, k: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns rows `[start, stop)` of batch k alone, for a host that holds no others."""
        wanted = np.arange(k * self.size + start, k * self.size + stop)
        real = wanted < len(self._queries)
        index = np.where(real, wanted, 0)
        user = self._queries.user[index]
        history = np.where(real, self._queries.history[index], 0)
        first = self._inter.offsets[user]
        latest = np.minimum(history, self.length)
        columns = np.arange(self.length)
        at = (first + history - self.length)[:, None] + columns
        there = columns >= (self.length - latest)[:, None]
        items = np.where(there, self._take(at), 0)
        seen = seen_items(self._inter.item, first, history, self.seen)
        return {
            "id": np.where(real, index, 0).astype(np.int32),
            "items": items.astype(np.int32),
            "target": np.where(real, self._queries.target[index], 0).astype(np.int32),
            "seen": seen,
            "weight": real.astype(np.float32),
            "user": np.where(real, user, 0).astype(np.int32),
            "event": np.where(real, first + history, 0).astype(np.int32),
            **(self._inter.event_rows(np.where(there, at, -1)) if self._event_rows else {}),
        }

    def _take(self, at: Int64[np.ndarray, "rows columns"]) -> np.ndarray:
        return self._inter.item.take(at, mode="clip")
