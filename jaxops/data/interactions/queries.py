"""Evaluation batches: every query once, in batches of one size, the last one padded with rows of weight 0."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from jaxops.data.interactions.heldout import Queries
from jaxops.data.interactions.interactions import Interactions


def seen_width(*parts: Queries) -> int:
    """Room for the longest history of `parts` (give validation and test: one shape), a multiple of 8."""
    longest = max((int(part.history.max()) for part in parts if len(part)), default=1)
    return -(-longest // 8) * 8


class QueryBatches:
    """A sequence of evaluation batches, in order of the queries.

    Each is {"id" [B] int32 query, "items" [B, L] int32 latest history padded with 0 on the left, "target" [B]
    int32, "seen" [B, S] int32 all items of the history (0 where none), "weight" [B] float32, "user" [B]
    int32, "event" [B] int32 the target's row of all events}; with `event_rows` also `Interactions.event_rows` of the
    items, [B, L]. S is `seen` (default: `seen_width` of these queries); padding rows are zero in every entry (-1 in
    places).

    Raises:
      ValueError: a history longer than `seen`.
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
        self.seen = seen_width(queries) if seen is None else seen
        if len(queries) and int(queries.history.max()) > self.seen:
            raise ValueError(f"the longest history has {queries.history.max()} events, seen={self.seen}")
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
        """Rows `[start, stop)` of batch k alone, for a host that holds no others."""
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
        width = np.arange(self.seen)
        seen = np.where(width < history[:, None], self._take(first[:, None] + width), 0)
        return {
            "id": np.where(real, index, 0).astype(np.int32),
            "items": items.astype(np.int32),
            "target": np.where(real, self._queries.target[index], 0).astype(np.int32),
            "seen": seen.astype(np.int32),
            "weight": real.astype(np.float32),
            "user": np.where(real, user, 0).astype(np.int32),
            "event": np.where(real, first + history, 0).astype(np.int32),
            **(self._inter.event_rows(np.where(there, at, -1)) if self._event_rows else {}),
        }

    def _take(self, at: Int64[np.ndarray, "rows columns"]) -> np.ndarray:
        return self._inter.item.take(at, mode="clip")
