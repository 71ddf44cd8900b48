"""Whose next items are asked for: histories read from a file, and as batches that a trained ranker reads."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64

from jaxops.config.types import ByPath
from jaxops.core.failures import UserError, nearest
from jaxops.data.config import open_data
from jaxops.data.ids import Ids
from jaxops.data.interactions import read_interactions
from jaxops.data.spec import Columns, InteractionsFile


@dataclasses.dataclass(frozen=True)
class Histories:
    """Whose next items are asked for: original user ids and their item rows, oldest first, as CSR.

    `unknown_users` have no event that the model knows and are left out, `unknown_items` counts events left out.
    """

    users: np.ndarray
    items: Int32[np.ndarray, " events"]
    offsets: Int64[np.ndarray, " users_and_one"]
    unknown_users: int = 0
    unknown_items: int = 0


def read_histories(path: str | os.PathLike[str], data: Any, item_ids: Ids) -> Histories:
    """Events (user, item, time) or, with a user column alone, users of the run's own data.

    Args:
      data: the run's data section, which says how the columns are called.
      item_ids: the items that the model knows.

    Raises:
      UserError: the file cannot be read, or has no user column.
    """
    columns = data.columns if isinstance(data, InteractionsFile) else Columns()
    names = _dataset(path).schema.names
    if columns.user not in names:
        raise UserError(
            f"{path}: no column {columns.user!r}{nearest(columns.user, names)} (columns: {', '.join(names)})"
        )
    if columns.item not in names:
        return _known(path, data, item_ids, columns.user)
    time = columns.time if columns.time in names else None
    inter = read_interactions(str(path), dataclasses.replace(columns, time=time, weight=None))
    rows = item_ids.rows(inter.item_ids.originals(np.arange(1, inter.n_items + 1)))[inter.item - 1]
    keep = rows > 0
    counts = np.bincount(inter.user[keep], minlength=inter.n_users)
    known = np.flatnonzero(counts)
    offsets = np.concatenate([[0], np.cumsum(counts[known])])
    users = inter.user_ids.originals(known)
    return Histories(users, rows[keep], offsets, inter.n_users - len(known), int((~keep).sum()))


def _known(path: str | os.PathLike[str], data: Any, item_ids: Ids, column: str) -> Histories:
    if isinstance(data, ByPath):
        raise UserError(f"{path} has no item column, and the run's data is a function: give events (user, item)")
    inter = open_data(data).inter
    same_items(item_ids, np.asarray(inter.item_ids.values))
    wanted = _dataset(path).to_table(columns=[column])[column].to_numpy()
    rows = inter.user_ids.rows(wanted)
    known = rows[rows >= 0]
    counts = inter.lengths[known]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    events = np.repeat(inter.offsets[known] - offsets[:-1], counts) + np.arange(offsets[-1])
    return Histories(wanted[rows >= 0], inter.item[events], offsets, unknown_users=int((rows < 0).sum()))


def same_items(known: Ids, values: np.ndarray) -> None:
    """Whether data that was opened again has the items that a model was trained on.

    Raises:
      UserError: it has others.
    """
    if not np.array_equal(values, known.values):
        raise UserError(
            f"the run's data has changed since: {len(values):,} items there now, not the {len(known):,}"
            " that the model was trained on"
        )


class HistoryBatches:
    """Batches of `size` histories: {"id" [B], "items" [B, length] latest last, 0 on the left, "seen" [B, S] all of
    them, "user" [B]: `users` (the model's row of each, -1: nobody it knows)}, int32; the last one padded.

    S is as wide as the longest of all, so that there is one shape.
    """

    def __init__(self, given: Histories, users: Int32[np.ndarray, " users"], length: int, size: int) -> None:
        self._given, self._users, self._length, self._size = given, users, length, size
        self._counts = np.diff(given.offsets)
        self._seen = -(-max(int(self._counts.max(initial=1)), 1) // 8) * 8

    def __len__(self) -> int:
        return -(-len(self._users) // self._size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.rows(k, 0, self._size) for k in range(len(self)))

    def rows(self, k: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows `[start, stop)` of batch k alone."""
        index = np.minimum(np.arange(k * self._size + start, k * self._size + stop), len(self._users) - 1)
        first, count = self._given.offsets[:-1][index], self._counts[index]
        column, wide = np.arange(self._length), np.arange(self._seen)
        take = lambda at: self._given.items.take(at, mode="clip")
        latest = column >= (self._length - np.minimum(count, self._length))[:, None]
        items = np.where(latest, take((first + count - self._length)[:, None] + column), 0)
        seen = np.where(wide < count[:, None], take(first[:, None] + wide), 0)
        found = {"id": index, "items": items, "seen": seen, "user": self._users[index]}
        return {name: values.astype(np.int32) for name, values in found.items()}


def _dataset(path: str | os.PathLike[str]) -> Any:
    """A Parquet, CSV or JSONL file (or a folder of Parquet) as an Arrow dataset."""
    import pyarrow.dataset as ds

    suffix = Path(path).suffix.lower()
    kind = {".csv": "csv", ".jsonl": "json", ".json": "json"}.get(suffix, "parquet")
    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    try:
        return ds.dataset(str(path), format=kind)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read as {kind}: {str(error).splitlines()[0]}") from None
