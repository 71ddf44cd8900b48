"""Interactions: events in columns, grouped by user and sorted by (timestamp, original row) inside each user.

The tie-break matters (in MovieLens-100K three events of four share their user and second with another): with
it the order, hence the split, is a function of the files' contents alone. Where there is no time, the
original row is the order.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int32, Int64

from jaxops.core.failures import UserError
from jaxops.data.files import expand_paths, summary
from jaxops.data.ids import IdCollector, Ids
from jaxops.data.interactions import arrange, read
from jaxops.data.interactions.read import Events
from jaxops.data.interactions.spec import Columns, MinCount
from jaxops.data.moments import Granularity
from jaxops.data.spec import Duplicates, Format, TextFormat


@dataclasses.dataclass(frozen=True, eq=False)
class Interactions:
    """Events of all users; user u's are `[offsets[u], offsets[u + 1])`, oldest first.

    Users are rows 0..n_users-1, items 1..n_items (0 is padding), both in sorted order of their original ids.
    `time` is in unix seconds; when not `timed` it is the position in the original order. `dropped` counts what
    was left out, by reason. `context` are codes of further columns and `contexts`, by
    name, the values that they stand for, unsorted (-1: null).
    `copies` counts exact copies of events that were kept. Arrays may be memory-mapped and must not be written to.
    """

    user: Int32[np.ndarray, " events"]
    item: Int32[np.ndarray, " events"]
    time: Float64[np.ndarray, " events"]
    weight: Float32[np.ndarray, " events"]
    offsets: Int64[np.ndarray, " users_and_one"]
    user_ids: Ids
    item_ids: Ids
    timed: bool
    dropped: dict[str, int]
    context: Int32[np.ndarray, "events columns"]
    contexts: Mapping[str, Ids]
    copies: int = 0

    @property
    def n_users(self) -> int:
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    @property
    def n_events(self) -> int:
        return len(self.item)

    def event_rows(self, events: Int64[np.ndarray, "..."]) -> dict[str, np.ndarray]:
        """Returns entries of sequence batches: "events", these rows, and "users", their users; int32, -1 for none."""
        users = np.where(events < 0, -1, self.user.take(events, mode="clip"))
        return {"events": events.astype(np.int32), "users": users.astype(np.int32)}

    @property
    def lengths(self) -> Int64[np.ndarray, " users"]:
        """The number of events of each user."""
        return np.diff(self.offsets)

    def context_of(self, name: str, events: Any = slice(None)) -> pa.Array:
        """Returns the values of a context column at these events (default: all): int64 or strings, or null."""
        codes = np.asarray(self.context[events, list(self.contexts).index(name)])
        return self.contexts[name].table.take(pa.array(codes, mask=codes < 0))


def read_interactions(
    path: str | Sequence[str],
    columns: Columns = Columns(),
    min_count: MinCount = MinCount(),
    *,
    format: Format = "auto",
    header: Sequence[str] | None = None,
    duplicates: Duplicates = "auto",
    text: TextFormat = TextFormat(),
    progress: arrange.Progress = arrange.silent,
) -> Interactions:
    """Reads CSV, TSV, JSONL or Parquet into memory (`cache.build_cache` is for what does not fit).

    Args:
      path: a file, glob, folder, URI or several of them.
      columns: the names of the columns.
      min_count: the k-core filter.
      format: the format of the files.
      header: names of all columns of text without a header line.
      duplicates: the treatment of exact copies.
      text: how CSV and TSV are written.
      progress: is called with how far it is.

    Raises:
      UserError: what `files.expand` and `read.read_events` raise; no rows; nothing left after `min_count`.
    """
    files = expand_paths(path, format, text)
    events = read.read_events(files, columns, header)
    return from_events(
        events,
        min_count,
        text=read.is_text(files),
        shown=summary(files),
        progress=progress,
        context=columns.context,
        duplicates=duplicates,
    )


def from_arrays(
    users: Any,
    items: Any,
    times: Any = None,
    weights: Any = None,
    *,
    min_count: MinCount = MinCount(),
    duplicates: Duplicates = "auto",
) -> Interactions:
    """Makes interactions from arrays with one entry for each event. Without `times` the given order counts.

    Args:
      users: integers or strings.
      items: integers or strings.
      times: unix seconds or numpy datetimes.
      weights: numbers.
      min_count: the k-core filter.
      duplicates: the treatment of exact copies.
    """
    table = {"user": users, "item": items, "time": times, "weight": weights}
    given = {name: pa.array(np.asarray(value)) for name, value in table.items() if value is not None}
    named = {name: name if name in given else None for name in ("time", "weight")}
    batch = pa.RecordBatch.from_pydict(given)
    columns = Columns(time=named["time"], weight=named["weight"])
    events = read.convert_batches(iter([batch]), columns, "arrays")
    return from_events(events, min_count, shown="the arrays", duplicates=duplicates)


def from_events(
    events: Iterable[Events],
    min_count: MinCount = MinCount(),
    *,
    text: bool = False,
    shown: str = "the data",
    progress: arrange.Progress = arrange.silent,
    context: Sequence[str] = (),
    duplicates: Duplicates = "auto",
) -> Interactions:
    """Encodes, filters and sorts events in memory.

    Args:
      events: batches in original order.
      min_count: the k-core filter.
      text: as in `IdCollector`.
      shown: names the events in errors.
      progress: is called with how far it is.
      context: names of the events' context columns.
      duplicates: the treatment of exact copies.

    Raises:
      UserError: there are none, or none is left after `min_count`.
    """
    sink = _Memory()
    gathered = gather_events(events, sink, text=text, shown=shown, progress=progress, context=context)
    copies = gathered.copy_rule(duplicates)
    columns = arrange.arrange(sink.columns(), gathered.codes, min_count, np.empty, copies=copies, progress=progress)
    return assemble(columns, gathered)


class Sink(Protocol):
    """A receiver of encoded batches, in order."""

    def append(self, batch: arrange.EncodedIds) -> None:
        """Takes the next batch."""
        ...


class _Memory:
    """Keeps encoded batches in lists."""

    def __init__(self) -> None:
        self._batches: list[arrange.EncodedIds] = []

    def append(self, batch: arrange.EncodedIds) -> None:
        self._batches.append(batch)

    def columns(self) -> arrange.EncodedIds:
        return arrange.EncodedIds(*(np.concatenate(column) for column in zip(*self._batches, strict=True)))


@dataclasses.dataclass(frozen=True)
class Gathered:
    """The codes and counts after all events went by once; `contexts` are by name of the column."""

    codes: tuple[IdCollector, IdCollector]
    timed: bool
    null_ids: int
    contexts: Mapping[str, IdCollector]
    dates_alone: bool

    def copy_rule(self, duplicates: Duplicates) -> arrange.CopyRule:
        """Returns the treatment of exact copies of these events; without times honest repeats are not counted."""
        fine = self.timed and not self.dates_alone
        drop = duplicates == "drop" or (duplicates == "auto" and fine)
        return arrange.CopyRule(count=self.timed, drop=drop, timed=self.timed)


def gather_events(
    events: Iterable[Events],
    sink: Sink,
    *,
    text: bool,
    shown: str,
    progress: arrange.Progress,
    context: Sequence[str] = (),
) -> Gathered:
    """Encodes the ids of every batch and appends it to `sink`; ids and nothing else stay in memory here.

    Args:
      events: batches in original order.
      sink: takes the encoded batches.
      text: as in `IdCollector`.
      shown: names the events in errors.
      progress: is called with how far it is.
      context: names of the events' context columns.

    Raises:
      UserError: no event names both a user and an item.
    """
    users, items = IdCollector("user", text), IdCollector("item", text)
    contexts = {name: IdCollector(name, text) for name in context}
    rows, null_ids, timed, clock = 0, 0, True, Granularity()
    for batch in events:
        row_numbers = np.arange(rows, rows + len(batch.user), dtype=np.float64)
        timed = batch.time is not None
        if batch.time is not None:
            clock.add(batch.time)
        given = [
            contexts[name].add(values, batch.where, batch.rows)
            for name, values in zip(context, batch.context, strict=True)
        ]
        sink.append(
            arrange.EncodedIds(
                users.add(batch.user, batch.where, batch.rows),
                items.add(batch.item, batch.where, batch.rows),
                row_numbers if batch.time is None else batch.time,
                np.ones(len(batch.user), np.float32) if batch.weight is None else batch.weight,
                np.stack(given, axis=1) if given else np.empty((len(batch.user), 0), np.int32),
            )
        )
        rows += len(batch.user)
        null_ids += batch.null_ids
        progress("reading", rows, None)
    if not rows:
        why = f"all {null_ids} rows lack a user or an item id" if null_ids else "it is empty"
        raise UserError(f"no events in {shown}: {why}")
    return Gathered((users, items), timed, null_ids, contexts, clock.dates_alone)


def assemble(columns: arrange.Arranged, gathered: Gathered) -> Interactions:
    """Returns the arranged columns as `Interactions`, with the counts of all that was dropped on the way."""
    dropped = {"null_id_events": gathered.null_ids, **columns.dropped}
    return Interactions(
        columns.user,
        columns.item,
        columns.time,
        columns.weight,
        columns.offsets,
        columns.user_ids,
        columns.item_ids,
        gathered.timed,
        {why: count for why, count in dropped.items() if count},
        columns.context,
        {name: Ids(found.values(), 0) for name, found in gathered.contexts.items()},
        columns.copies,
    )
