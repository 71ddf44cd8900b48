"""Training examples of retrieval: one event each, with what its user did before; and negatives drawn on the host.

Everything is a pure function of (seed, cursor), as in windows.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from jaxops.core.failures import UserError
from jaxops.data.draws import mixed
from jaxops.data.epochs import Epochs
from jaxops.data.interactions.heldout import Split
from jaxops.data.interactions.interactions import Interactions
from jaxops.data.protocol import Source


def require_small_rows(inter: Interactions) -> None:
    """Refuses what rows of batches, which are int32, cannot tell apart.

    Raises:
      UserError: there are more events than that.
    """
    if inter.n_events > np.iinfo(np.int32).max:
        raise UserError(f"{inter.n_events:,} events are more than 32-bit numbers can tell apart")


class EventSource:
    """A `Source` of training events, reshuffled every epoch.

    Batches: {"id" [B] int32 training event, "event" [B] int32 row of all events, "user" [B] int32 row, "item" [B] int32
    row, "items" [B, H] int32 the item rows that came before, latest last, 0 where there are fewer, "weight" [B] float32
    of the event, by `weights`: 1 without}.

    Raises:
      UserError: there is no training event, or more events than 32-bit numbers can tell apart.
    """

    def __init__(
        self,
        inter: Interactions,
        split: Split,
        history: int,
        seed: int,
        weights: Float32[np.ndarray, " events"] | None = None,
    ) -> None:
        position = np.arange(inter.n_events) - inter.offsets[:-1].repeat(inter.lengths)
        self._events = np.flatnonzero(position < split.train_end.repeat(inter.lengths))
        if not len(self._events):
            raise UserError("there is no training event")
        require_small_rows(inter)
        self._inter, self._history, self._weights = inter, history, weights
        self.examples = len(self._events)
        self._epochs = Epochs(self.examples, seed)

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Events `[cursor, cursor + size)` of the endless stream of epochs."""
        ids = self._epochs.ids(cursor, size)
        event = self._events[ids]
        user = self._inter.user[event]
        before = event - self._inter.offsets[user]
        return {
            "id": ids,
            "event": event.astype(np.int32),
            "user": np.asarray(user, np.int32),
            "item": np.asarray(self._inter.item[event], np.int32),
            "items": latest(self._inter, event, before, self._history),
            "weight": np.ones(size, np.float32) if self._weights is None else self._weights[event],
        }


def latest(
    inter: Interactions, event: Int64[np.ndarray, " n"], before: Int64[np.ndarray, " n"], width: int
) -> Int32[np.ndarray, "n width"]:
    """Returns the rows of the items that each event's user had last before it, oldest first.

    Args:
      inter: the events.
      event: the row of each event.
      before: how many events its user has before it.
      width: the number of items to return, 0 on the left where there are fewer.
    """
    columns = np.arange(width)
    items = np.asarray(inter.item).take((event - width)[:, None] + columns, mode="wrap")
    return np.where(columns >= width - before[:, None], items, 0).astype(np.int32)


class WithNegatives:
    """A source whose batches also have "negatives" [B, n] int32: items 1..n_items, uniform, by place in the stream."""

    def __init__(self, source: Source, n_items: int, negatives: int, seed: int) -> None:
        self._source, self._items, self._count = source, n_items, negatives
        self._key = np.array([seed], np.uint64) * np.uint64(2) + np.uint64(1)
        self.examples = source.examples

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Returns the batch of the source, with negatives."""
        place = np.arange(cursor * self._count, (cursor + size) * self._count, dtype=np.uint64)
        # The top 32 bits times the number of items: as even as one can be without drawing again.
        drawn = (mixed(place, self._key) >> np.uint64(32)) * np.uint64(self._items) >> np.uint64(32)
        negatives = (drawn + np.uint64(1)).astype(np.int32).reshape(size, self._count)
        return {**self._source.batch(cursor, size), "negatives": negatives}


class WithColumns:
    """A source whose batches also have columns of items, users and events: `columns[name] = (entry, codes by row)`.

    Codes are [rows] or, of bags, [rows, width].
    """

    def __init__(self, source: Source, columns: Mapping[str, tuple[str, np.ndarray]]) -> None:
        self._source, self._columns = source, columns
        self.examples = source.examples

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Returns the batch of the source, with the columns."""
        return with_columns(self._source.batch(cursor, size), self._columns)


def with_columns(
    batch: Mapping[str, np.ndarray], columns: Mapping[str, tuple[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the batch with `codes[batch[entry]]` for each column, by name. Entries that it lacks are passed over."""
    found = {name: codes[batch[entry]] for name, (entry, codes) in columns.items() if entry in batch}
    return {**batch, **found}


class ColumnBatches:
    """Evaluation batches with columns, as `WithColumns` has them for training."""

    def __init__(self, batches: Any, columns: Mapping[str, tuple[str, np.ndarray]]) -> None:
        self._batches, self._columns = batches, columns

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Any:
        return (with_columns(batch, self._columns) for batch in self._batches)

    def rows(self, k: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns rows `[start, stop)` of batch k alone."""
        return with_columns(self._batches.rows(k, start, stop), self._columns)


class EntityBatches:
    """Rows 0..count-1 of an entity in order, in batches of `size`: {"id", entry: int32 [size]}; 0 beyond the last."""

    def __init__(self, entry: str, count: int, size: int) -> None:
        self._entry, self._count, self._size = entry, count, size

    def __len__(self) -> int:
        return -(-self._count // self._size)

    def __iter__(self) -> Any:
        return (self.rows(k, 0, self._size) for k in range(len(self)))

    def rows(self, k: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns rows `[start, stop)` of batch k alone."""
        row = np.arange(k * self._size + start, k * self._size + stop)
        row = np.where(row < self._count, row, 0).astype(np.int32)
        return {"id": row, self._entry: row}
