"""Exact copies of events: rows that agree in every column that is read, as an export that ran twice leaves them.

Times that are finer than a day tell copies from honest repeats. Dates alone do not.
"""

from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from jaxops.data.interactions.ranges import user_ranges

CHUNK = 1 << 22
"""The number of events that are looked at at once."""


class SortedEvents(Protocol):
    """The columns of events that are grouped by user and sorted by time."""

    @property
    def user(self) -> Int32[np.ndarray, " events"]:
        """The row of each event's user."""
        ...

    @property
    def item(self) -> Int32[np.ndarray, " events"]:
        """The row of each event's item."""
        ...

    @property
    def time(self) -> Float64[np.ndarray, " events"]:
        """Unix seconds."""
        ...

    @property
    def weight(self) -> Float32[np.ndarray, " events"]:
        """Weights."""
        ...

    @property
    def context(self) -> Int32[np.ndarray, "events columns"]:
        """Codes of the context columns."""
        ...


def copies_in(events: SortedEvents, at: slice, timed: bool) -> Bool[np.ndarray, " events"]:
    """Returns which of the events `at` are exact copies of an earlier one there; the slice holds whole users.

    Without times (`timed` is false) the column of times, which then holds the order, is not compared.
    """
    user, item, time, weight = (column[at] for column in (events.user, events.item, events.time, events.weight))
    found = np.zeros(len(user), bool)
    if timed:
        tied = (np.diff(time) == 0) & (np.diff(user) == 0)
        where = np.flatnonzero(np.append(tied, False) | np.insert(tied, 0, False))
    else:
        where = np.arange(len(user))
    if not len(where):
        return found
    context = events.context[at][where]
    keys = [*context.T, weight[where], item[where], user[where], *([time[where]] if timed else [])]
    order = np.lexsort(keys)
    same = np.ones(len(order) - 1, bool)
    for key in keys:
        ordered = key[order]
        same &= ordered[1:] == ordered[:-1]
    found[where[order[1:][same]]] = True  # the sort is stable: the first of equals stays
    return found


def count_copies(events: SortedEvents, offsets: Int64[np.ndarray, " users_and_one"], timed: bool) -> int:
    """Counts the exact copies among all events."""
    return sum(
        int(np.count_nonzero(copies_in(events, slice(int(offsets[start]), int(offsets[stop])), timed)))
        for start, stop in user_ranges(offsets, CHUNK)
    )


def are_copies(
    events: SortedEvents, offsets: Int64[np.ndarray, " users_and_one"], rows: Int64[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Returns which of these rows of timed events are exact copies of an earlier event of their user."""
    found = np.zeros(len(rows), bool)
    for start, stop in user_ranges(offsets, CHUNK):
        at = slice(int(offsets[start]), int(offsets[stop]))
        inside = np.flatnonzero((rows >= at.start) & (rows < at.stop))
        if len(inside):
            found[inside] = copies_in(events, at, True)[rows[inside] - at.start]
    return found
