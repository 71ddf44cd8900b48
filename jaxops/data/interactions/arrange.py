"""Turns events in original order into columns grouped by user and sorted by time, a chunk of rows at a time.

It works on arrays in memory and on memory-mapped files alike (the caller allocates), so both ways give the same
bytes: k-core filter, final rows, counting sort by user, then a stable sort by time inside each user.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from jaxops.core.failures import UserError
from jaxops.data.ids import Ids
from jaxops.data.interactions.copies import copies_in, count_copies
from jaxops.data.interactions.ranges import user_ranges
from jaxops.data.interactions.spec import MinCount

CHUNK = 1 << 22
"""The number of rows that are worked on at once."""

Progress = Callable[[str, int, int | None], None]
"""A function that is called with the stage, the rows done and the rows in all (None: not known yet)."""
Allocate = Callable[[Any, Any], np.ndarray]
"""A function (shape, dtype) -> array to be filled, as `np.empty`; called in the order of the columns of `Arranged`."""


def silent(stage: str, done: int, total: int | None) -> None:
    """Reports nothing; a `Progress` for callers without a console."""


class EncodedIds(NamedTuple):
    """Events in original order, ids as provisional codes."""

    user: Int32[np.ndarray, " rows"]
    item: Int32[np.ndarray, " rows"]
    time: Float64[np.ndarray, " rows"]
    weight: Float32[np.ndarray, " rows"]
    context: Int32[np.ndarray, "rows columns"]


class Arranged(NamedTuple):
    """Final columns (see `Interactions`), the counts that were dropped, and the copies that were kept."""

    user: Int32[np.ndarray, " events"]
    item: Int32[np.ndarray, " events"]
    time: Float64[np.ndarray, " events"]
    weight: Float32[np.ndarray, " events"]
    context: Int32[np.ndarray, "events columns"]
    offsets: Int64[np.ndarray, " users_and_one"]
    user_ids: Ids
    item_ids: Ids
    dropped: dict[str, int]
    copies: int = 0


class Codes(Protocol):
    """The ids that codes 0, 1, ... stand for (`IdCollector`)."""

    def __len__(self) -> int:
        """Returns the number of codes."""
        ...

    def one_each(self) -> Int32[np.ndarray, " codes"] | None:
        """The code that stands for each code's id; None where every code has an id of its own."""
        ...

    def finish(self, keep: Bool[np.ndarray, " codes"], first: int) -> tuple[Ids, Int32[np.ndarray, " codes"]]:
        """The kept ids, and each code's row."""
        ...


@dataclasses.dataclass(frozen=True)
class CopyRule:
    """The treatment of exact copies: they are counted among timed or untimed events (`count`) and dropped (`drop`)."""

    count: bool = False
    drop: bool = False
    timed: bool = True


@dataclasses.dataclass(frozen=True)
class _Final:
    """Ids that have their rows, as `Codes`."""

    ids: Ids

    def __len__(self) -> int:
        return len(self.ids)

    def one_each(self) -> None:
        return None

    def finish(self, keep: Bool[np.ndarray, " codes"], first: int) -> tuple[Ids, Int32[np.ndarray, " codes"]]:
        rows = np.where(keep, np.cumsum(keep) - 1 + first, -1).astype(np.int32)
        return Ids(np.asarray(self.ids.values)[keep], first), rows


def arrange(
    events: EncodedIds,
    codes: tuple[Codes, Codes],
    min_count: MinCount,
    allocate: Allocate,
    *,
    copies: CopyRule = CopyRule(),
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> Arranged:
    """Filters, encodes in sorted order of the ids, groups by user and sorts, with only the ids in memory.

    Args:
      events: in original order.
      codes: the ids of users and of items.
      min_count: the filter; copies that are dropped do not count.
      allocate: makes the columns; the last of up to three sets is the result.
      copies: what becomes of exact copies.
      chunk: rows that are worked on at once.
      progress: is told how far it is.

    Raises:
      UserError: `min_count` leaves nothing.
    """
    found = _arranged(events, codes, min_count, allocate, chunk, progress)
    if not copies.count and not copies.drop:
        return found
    columns = EncodedIds(*found[:5])
    count = count_copies(columns, found.offsets, copies.timed)
    if not count or not copies.drop:
        return found._replace(copies=count)
    kept = _without_copies(columns, found.offsets, count, allocate, chunk, copies.timed)
    # Fewer events make the k-core smaller, and it lies inside the one of all events: the filter goes on from there.
    again = _arranged(kept, (_Final(found.user_ids), _Final(found.item_ids)), min_count, allocate, chunk, progress)
    dropped = {why: number + again.dropped[why] for why, number in found.dropped.items()}
    return again._replace(dropped={"duplicate_events": count, **dropped})


def _without_copies(
    events: EncodedIds, offsets: np.ndarray, copies: int, allocate: Allocate, chunk: int, timed: bool
) -> EncodedIds:
    """Returns the events without exact copies as new input: codes are rows, of items minus 1."""
    out = EncodedIds(*(allocate((len(events.user) - copies, *column.shape[1:]), column.dtype) for column in events))
    done = 0
    for start, stop in user_ranges(offsets, chunk):
        at = slice(int(offsets[start]), int(offsets[stop]))
        keep = ~copies_in(events, at, timed)
        until = done + int(np.count_nonzero(keep))
        for column, target in zip(events, out, strict=True):
            target[done:until] = column[at][keep]
        out.item[done:until] -= 1
        done = until
    return out


def _arranged(
    events: EncodedIds,
    codes: tuple[Codes, Codes],
    min_count: MinCount,
    allocate: Allocate,
    chunk: int,
    progress: Progress,
) -> Arranged:
    users, items = codes
    same = (users.one_each(), items.one_each())
    user_counts, item_counts = _k_core(events, (len(users), len(items)), same, min_count, chunk, progress)
    total = int(user_counts.sum())
    if not total:
        raise UserError(
            f"no event is left after min_count {{user: {min_count.user}, item: {min_count.item}}} (of "
            f"{len(events.user)} events, {len(users)} users, {len(items)} items; users and items are dropped "
            "until all that are left have enough): lower it"
        )
    user_ids, user_rows = users.finish(user_counts > 0, 0)
    item_ids, item_rows = items.finish(item_counts > 0, 1)
    counts = np.zeros(len(user_ids), np.int64)
    counts[user_rows[user_counts > 0]] = user_counts[user_counts > 0]  # of one code an id; its others have none
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    columns = EncodedIds(*(allocate((total, *column.shape[1:]), column.dtype) for column in events))
    _group_by_user(events, user_rows, item_rows, offsets, columns, chunk, progress)
    for start, stop in user_ranges(offsets, chunk):
        progress("sorting", int(offsets[stop]), total)
        _sort_by_time(columns, offsets, start, stop)
    dropped = {
        "min_count_events": len(events.user) - total,
        "min_count_users": _distinct(users, same[0]) - len(user_ids),
        "min_count_items": _distinct(items, same[1]) - len(item_ids),
    }
    return Arranged(*columns, offsets, user_ids, item_ids, dropped)


def _k_core(
    events: EncodedIds,
    sizes: tuple[int, int],
    same: tuple[np.ndarray | None, np.ndarray | None],
    min_count: MinCount,
    chunk: int,
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Counts the surviving events of each user and item code (0: dropped), once no more have to go.

    `same` are the codes that stand for others of their id, which have no events of their own.
    """
    keep_user, keep_item = (np.ones(n, bool) for n in sizes)
    while True:
        user_counts, item_counts = (np.zeros(n, np.int64) for n in sizes)
        for at in _chunks(len(events.user), chunk, "filtering", progress):
            user, item = (
                codes[at] if first is None else first[codes[at]]
                for codes, first in zip((events.user, events.item), same, strict=True)
            )
            alive = keep_user[user] & keep_item[item]
            user_counts += np.bincount(user[alive], minlength=sizes[0])
            item_counts += np.bincount(item[alive], minlength=sizes[1])
        fewer_users = keep_user & (user_counts >= min_count.user)
        fewer_items = keep_item & (item_counts >= min_count.item)
        if np.array_equal(fewer_users, keep_user) and np.array_equal(fewer_items, keep_item):
            return user_counts, item_counts
        keep_user, keep_item = fewer_users, fewer_items


def _group_by_user(
    events: EncodedIds,
    user_rows: Int32[np.ndarray, " codes"],
    item_rows: Int32[np.ndarray, " codes"],
    offsets: Int64[np.ndarray, " users_and_one"],
    out: EncodedIds,
    chunk: int,
    progress: Progress,
) -> None:
    """Sorts by counting, stably: each event goes behind those of its user that came before it."""
    free = offsets[:-1].copy()
    for at in _chunks(len(events.user), chunk, "grouping", progress):
        user, item = user_rows[events.user[at]], item_rows[events.item[at]]
        alive: Bool[np.ndarray, " rows"] = (user >= 0) & (item >= 0)
        order = np.flatnonzero(alive)
        order = order[np.argsort(user[order], kind="stable")]
        user, item = user[order], item[order]
        starts = np.flatnonzero(np.diff(user, prepend=-1))
        lengths = np.diff(starts, append=len(user))
        place = free[user] + np.arange(len(user)) - np.repeat(starts, lengths)
        free[user[starts]] += lengths
        out.user[place], out.item[place] = user, item
        out.time[place], out.weight[place] = events.time[at][order], events.weight[at][order]
        out.context[place] = events.context[at][order]


def _sort_by_time(columns: EncodedIds, offsets: np.ndarray, start: int, stop: int) -> None:
    """Sorts the events of users [start, stop) by time; equal times keep their order."""
    at = slice(int(offsets[start]), int(offsets[stop]))
    order = np.lexsort((columns.time[at], columns.user[at]))
    if np.array_equal(order, np.arange(len(order))):
        return
    for column in (columns.item, columns.time, columns.weight, columns.context):
        column[at] = column[at][order]


def _distinct(codes: Codes, same: np.ndarray | None) -> int:
    return len(codes) if same is None else len(np.unique(same))


def _chunks(rows: int, chunk: int, stage: str, progress: Progress) -> Iterator[slice]:
    for start in range(0, rows, chunk):
        yield slice(start, min(start + chunk, rows))
        progress(stage, min(start + chunk, rows), rows)
