"""From events in original order to columns grouped by user and sorted in time, a chunk of rows at a time.

Works on arrays in memory and on memory-mapped files alike (the caller allocates), so both ways give the same
bytes: k-core filter, final rows, counting sort by user, then a stable sort by time inside each user.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from jaxops.core.failures import UserError
from jaxops.data.ids import IdCollector, Ids
from jaxops.data.interactions.spec import MinCount

CHUNK = 1 << 22
"""Rows that are worked on at once."""

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, the rows done and the rows in all (None: not known yet)."""
Allocate = Callable[[Any, Any], np.ndarray]
"""(shape, dtype) -> an array to be filled, as `np.empty`; called in the order of `Arranged`'s columns."""


def silent(stage: str, done: int, total: int | None) -> None:
    """A `Progress` that says nothing."""


class EncodedIds(NamedTuple):
    """Events in original order, ids as provisional codes."""

    user: Int32[np.ndarray, " rows"]
    item: Int32[np.ndarray, " rows"]
    time: Float64[np.ndarray, " rows"]
    weight: Float32[np.ndarray, " rows"]
    context: Int32[np.ndarray, "rows columns"]


class Arranged(NamedTuple):
    """Final columns (see `Interactions`) and what the filter dropped."""

    user: Int32[np.ndarray, " events"]
    item: Int32[np.ndarray, " events"]
    time: Float64[np.ndarray, " events"]
    weight: Float32[np.ndarray, " events"]
    context: Int32[np.ndarray, "events columns"]
    offsets: Int64[np.ndarray, " users_and_one"]
    user_ids: Ids
    item_ids: Ids
    dropped: dict[str, int]


def arrange(
    events: EncodedIds,
    codes: tuple[IdCollector, IdCollector],
    min_count: MinCount,
    allocate: Allocate,
    *,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> Arranged:
    """Filter, encode in sorted order of the ids, group by user and sort, with only the ids in memory.

    Raises:
      UserError: `min_count` leaves nothing.
    """
    users, items = codes
    user_counts, item_counts = _k_core(events, (len(users), len(items)), min_count, chunk, progress)
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
    counts[user_rows[user_counts > 0]] = user_counts[user_counts > 0]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    columns = EncodedIds(*(allocate((total, *column.shape[1:]), column.dtype) for column in events))
    _group_by_user(events, user_rows, item_rows, offsets, columns, chunk, progress)
    for start, stop in user_ranges(offsets, chunk):
        progress("sorting", int(offsets[stop]), total)
        _sort_by_time(columns, offsets, start, stop)
    dropped = {
        "min_count_events": len(events.user) - total,
        "min_count_users": len(users) - len(user_ids),
        "min_count_items": len(items) - len(item_ids),
    }
    return Arranged(*columns, offsets, user_ids, item_ids, dropped)


def _k_core(
    events: EncodedIds, sizes: tuple[int, int], min_count: MinCount, chunk: int, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Surviving events of each user and item code (0: dropped), once no more have to go."""
    keep_user, keep_item = (np.ones(n, bool) for n in sizes)
    while True:
        user_counts, item_counts = (np.zeros(n, np.int64) for n in sizes)
        for at in _chunks(len(events.user), chunk, "filtering", progress):
            user, item = events.user[at], events.item[at]
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
    """A stable counting sort: each event goes behind those of its user that came before it."""
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
    """Sort the events of users [start, stop) by time; equal times keep their order."""
    at = slice(int(offsets[start]), int(offsets[stop]))
    order = np.lexsort((columns.time[at], columns.user[at]))
    if np.array_equal(order, np.arange(len(order))):
        return
    for column in (columns.item, columns.time, columns.weight, columns.context):
        column[at] = column[at][order]


def user_ranges(offsets: Int64[np.ndarray, " users_and_one"], events: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of users that hold at most `events` events each (or are one user)."""
    start, users = 0, len(offsets) - 1
    while start < users:
        stop = int(np.searchsorted(offsets, offsets[start] + events, side="right")) - 1
        stop = min(max(stop, start + 1), users)
        yield start, stop
        start = stop


def _chunks(rows: int, chunk: int, stage: str, progress: Progress) -> Iterator[slice]:
    for start in range(0, rows, chunk):
        yield slice(start, min(start + chunk, rows))
        progress(stage, min(start + chunk, rows), rows)
