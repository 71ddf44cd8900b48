"""Histories of the users to predict for, read from a file, and the batches that a trained ranker reads."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int32, Int64

from jaxops.config.types import ByPath
from jaxops.core.failures import UserError, nearest
from jaxops.data import side
from jaxops.data.bags import joined
from jaxops.data.files import SUFFIXES
from jaxops.data.ids import Ids
from jaxops.data.interactions.interactions import Interactions, read_interactions
from jaxops.data.interactions.open import open_data
from jaxops.data.interactions.queries import distinct_width, seen_items
from jaxops.data.interactions.spec import Columns, InteractionsFile


@dataclasses.dataclass(frozen=True)
class Histories:
    """The histories of users, in CSR form.

    Attributes:
      users: original user ids.
      items: item rows of all histories, oldest first.
      offsets: the history of user i is items[offsets[i]:offsets[i + 1]].
      unknown_users: users left out, since they have no event that the model knows.
      unknown_items: events left out, since the model does not know their item.
      context: context columns of the prediction by name, one value for each user.
      along: context columns of the events by name, one value for each event.
    """

    users: np.ndarray
    items: Int32[np.ndarray, " events"]
    offsets: Int64[np.ndarray, " users_and_one"]
    unknown_users: int = 0
    unknown_items: int = 0
    context: Mapping[str, pa.Array] = dataclasses.field(default_factory=dict)
    along: Mapping[str, pa.Array] = dataclasses.field(default_factory=dict)


def read_histories(
    path: str | os.PathLike[str],
    data: Any,
    item_ids: Ids,
    context: Sequence[str] = (),
    along: Sequence[str] = (),
) -> Histories:
    """Reads events (user, item, time) or, without an item column, users of the run's own data.

    A text file may be written as the run's own events are (separator, encoding, no header line), or as text usually is.
    The context of a user's prediction is taken from their last row without an item (a query), else from their latest
    event.

    Args:
      path: the file.
      data: the run's data section, which has the names of the columns.
      item_ids: the items that the model knows.
      context: the context columns of the prediction that the model reads.
      along: the context columns of the history's events that the model reads.

    Raises:
      UserError: the file cannot be read, has no user column, or lacks one of `context` or `along`.
    """
    columns = data.columns if isinstance(data, InteractionsFile) else Columns()
    names, written = _columns_of(str(path), columns.user, data)
    if columns.item not in names:
        given = [name for name in context if name in names]
        return _known(path, written, data, item_ids, columns.user, given, context, along)
    time = columns.time if columns.time in names else None
    read = (*context, *along)
    columns = dataclasses.replace(columns, time=time, weight=None, context=read)
    inter = read_interactions(str(path), columns, **written)
    rows = item_ids.rows(inter.item_ids.originals(np.arange(1, inter.n_items + 1)))[inter.item - 1]
    keep = rows > 0
    counts = np.bincount(inter.user[keep], minlength=inter.n_users)
    known = np.flatnonzero(counts)
    offsets = np.concatenate([[0], np.cumsum(counts[known])])
    users = inter.user_ids.originals(known)
    brought = _latest(inter, known, context)
    if context:
        wanted = list(dict.fromkeys((columns.user, columns.item, *context)))
        given = side.read_columns(str(path), wanted, **written)
        queries = given.filter(pc.is_null(side.column(given, columns.item)))
        at = np.full(inter.n_users + 1, -1)
        at[inter.user_ids.positions(side.column(queries, columns.user))] = np.arange(len(queries))
        at = at[known]  # the position of unknown users, -1, is the last entry, which is dropped here
        brought = {name: _either(side.column(queries, name), at, values) for name, values in brought.items()}
    events = {name: inter.context_of(name, np.flatnonzero(keep)) for name in along}
    return Histories(users, rows[keep], offsets, inter.n_users - len(known), int((~keep).sum()), brought, events)


def _columns_of(path: str, user: str, data: Any) -> tuple[list[str], dict[str, Any]]:
    """Returns the columns of a file, and the arguments of a reading that finds the users' column among them.

    Raises:
      UserError: the file cannot be read, or no reading finds the column.
    """
    readings: list[dict[str, Any]] = [{}]
    if isinstance(data, InteractionsFile):
        named = {*SUFFIXES} & {*Path(path).suffixes}  # else its name does not say what it is
        own = {"format": "auto" if named else data.format, "header": data.header, "text": data.text}
        readings = [{"text": data.text}, {}, {**own, "header": None}, own]
    refused, seen = None, None
    for reading in readings:
        try:
            names = side.columns_of(path, **reading)
        except UserError as error:
            refused = refused or error
            continue
        if user in names:
            return names, reading
        seen = seen or names
    if seen is None and refused is not None:
        raise refused
    raise UserError(f"{path}: no column {user!r}{nearest(user, seen or [])} (columns: {', '.join(seen or [])})")


def _latest(inter: Interactions, users: Int64[np.ndarray, " users"], context: Iterable[str]) -> dict[str, pa.Array]:
    return {name: inter.context_of(name, inter.offsets[users + 1] - 1) for name in context}


def _either(first: pa.Array, at: Int64[np.ndarray, " n"], other: pa.Array) -> pa.Array:
    """Returns `first[at]`, and the entry of `other` where `at` is -1."""
    first, other = joined([first, other]).slice(0, len(first)), joined([other, first]).slice(0, len(other))
    return pc.if_else(pa.array(at >= 0), first.take(pa.array(at, mask=at < 0)), other)


def _known(
    path: str | os.PathLike[str],
    written: Mapping[str, Any],
    data: Any,
    item_ids: Ids,
    column: str,
    given: Sequence[str],
    context: Sequence[str],
    along: Sequence[str],
) -> Histories:
    """Reads users of the run's own data. `written` says how the file is; it has all columns of `context` or none."""
    if isinstance(data, ByPath):
        raise UserError(f"{path} has no item column, and the run's data is a function: give events (user, item)")
    inter = open_data(data).inter
    same_items(item_ids, np.asarray(inter.item_ids.values))
    table = side.read_columns(str(path), [column, *(context if given else ())], **written)
    asked = side.column(table, column)
    rows = inter.user_ids.positions(asked)
    known = rows[rows >= 0]
    if given:
        brought = {name: side.column(table, name).filter(pa.array(rows >= 0)) for name in context}
    else:
        brought = _latest(inter, known, context)
    counts = inter.lengths[known]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    events = np.repeat(inter.offsets[known] - offsets[:-1], counts) + np.arange(offsets[-1])
    users, unknown = inter.user_ids.originals(known), int((rows < 0).sum())
    held = {name: inter.context_of(name, events) for name in along}
    return Histories(users, inter.item[events], offsets, unknown_users=unknown, context=brought, along=held)


def same_items(known: Ids, values: np.ndarray) -> None:
    """Checks that data that was opened again has the items that a model was trained on.

    Raises:
      UserError: it has other items.
    """
    if not np.array_equal(values, known.values):
        raise UserError(
            f"the run's data has changed since: {len(values):,} items there now, not the {len(known):,}"
            " that the model was trained on"
        )


class HistoryBatches:
    """Batches of `size` histories, all entries int32; the last batch is padded.

    S has room for the distinct items of any of them, so that there is one shape.
    """

    def __init__(self, given: Histories, users: Int32[np.ndarray, " users"], length: int, size: int) -> None:
        self._given, self._users, self._length, self._size = given, users, length, size
        self._counts = np.diff(given.offsets)
        self._seen = distinct_width(given.items, given.offsets[:-1], self._counts)

    def __len__(self) -> int:
        return -(-len(self._users) // self._size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.rows(k, 0, self._size) for k in range(len(self)))

    def rows(self, k: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns rows `[start, stop)` of batch k."""
        index = np.minimum(np.arange(k * self._size + start, k * self._size + stop), len(self._users) - 1)
        first, count = self._given.offsets[:-1][index], self._counts[index]
        column = np.arange(self._length)
        take = lambda at: self._given.items.take(at, mode="clip")
        latest = column >= (self._length - np.minimum(count, self._length))[:, None]
        at = (first + count - self._length)[:, None] + column
        items = np.where(latest, take(at), 0)
        seen = seen_items(self._given.items, first, count, self._seen)
        user = self._users[index]
        places = {"events": np.where(latest, at, -1), "users": np.where(latest, user[:, None], -1)}
        found = {"id": index, "items": items, "seen": seen, "user": user, **places}
        return {name: values.astype(np.int32) for name, values in found.items()}
