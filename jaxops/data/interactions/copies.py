"""Finds exact copies of events: rows that agree in every column that is read, such as an export that ran twice writes.

With times finer than a day, a copy differs from a real repeat of the same event. With dates alone it may not.
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
        """The time of each event in unix seconds; its place in the order where the data have no times."""
        ...

    @property
    def weight(self) -> Float32[np.ndarray, " events"]:
        """The weight of each event."""
        ...

    @property
    def context(self) -> Int32[np.ndarray, "events columns"]:
        """The code of each event in each context column."""
        ...


def copies_in(events: SortedEvents, at: slice, timed: bool) -> Bool[np.ndarray, " events"]:
    """Returns a mask over the events in a slice: true for an exact copy of an earlier event in it.

    Args:
      events: the columns of the events.
      at: the slice, which holds all events of its users.
      timed: true where the data have times. Otherwise the column of times holds the order and is not compared.
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
    """Counts the exact copies among all events; user u has the events `offsets[u]` to `offsets[u + 1]`."""
    return sum(
        int(np.count_nonzero(copies_in(events, slice(int(offsets[start]), int(offsets[stop])), timed)))
        for start, stop in user_ranges(offsets, CHUNK)
    )


def are_copies(
    events: SortedEvents, offsets: Int64[np.ndarray, " users_and_one"], rows: Int64[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Returns a mask over `rows`: true where the event of that row is an exact copy of an earlier one of its user.

    Args:
      events: the columns of the events, which have times.
      offsets: user u has the events `offsets[u]` to `offsets[u + 1]`.
      rows: rows of events.
    """
    found = np.zeros(len(rows), bool)
    for start, stop in user_ranges(offsets, CHUNK):
        at = slice(int(offsets[start]), int(offsets[stop]))
        inside = np.flatnonzero((rows >= at.start) & (rows < at.stop))
        if len(inside):
            found[inside] = copies_in(events, at, True)[rows[inside] - at.start]
    return found
