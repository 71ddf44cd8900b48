"""Refuses leaks: a split is checked against the events before anything is trained on it.

Inside a user events are in order of time. Nothing that is trained on, and nothing in a history, comes at or after its
target.
"""

import numpy as np
from jaxtyping import Bool, Int64

from jaxops.core.failures import UserError
from jaxops.data.interactions.heldout import Split
from jaxops.data.interactions.interactions import Interactions
from jaxops.data.interactions.ranges import user_ranges
from jaxops.data.moments import iso

CHUNK = 1 << 22
"""The number of events that are looked at at once."""


def check_no_leak(inter: Interactions, split: Split) -> None:
    """Refuses a split in which a training event, or one in a history, comes after its target.

    Raises:
      UserError: there is one, with the user, the row among the user's events and the times.
    """
    lengths = inter.lengths
    _check_order(inter)
    everyone = np.arange(inter.n_users)
    beyond = split.train_end > lengths
    _refuse(inter, "training part ends after the user's last event", beyond, split.train_end, everyone)
    for name, part in (("validation", split.valid), ("test", split.test)):
        outside = (part.history < 1) | (part.history >= lengths[part.user])
        _refuse(inter, f"{name} history leaves no target after it", outside, part.history, part.user)
        at = inter.offsets[part.user] + part.history
        wrong = inter.item[at] != part.target
        _refuse(inter, f"{name} target is not the event after its history", wrong, part.history, part.user)
        leaked = split.train_end[part.user] > part.history
        _refuse(inter, f"{name} target is trained on", leaked, part.history, part.user)
    histories = np.full(inter.n_users, -1, np.int64)
    histories[split.valid.user] = split.valid.history
    seen = histories[split.test.user] >= split.test.history
    _refuse(inter, "test target is not after the validation target", seen, split.test.history, split.test.user)
    if split.boundaries is not None:
        _check_boundaries(inter, split, *split.boundaries)


def _check_order(inter: Interactions) -> None:
    for start, stop in user_ranges(inter.offsets, CHUNK):
        at = slice(int(inter.offsets[start]), int(inter.offsets[stop]))
        user, time = inter.user[at], inter.time[at]
        expected = np.repeat(np.arange(start, stop), np.diff(inter.offsets[start : stop + 1]))
        strays = np.flatnonzero(user != expected)
        if len(strays):
            raise UserError(f"leak: event {at.start + int(strays[0])} lies among the events of another user")
        later = np.flatnonzero((np.diff(time) < 0) & (user[1:] == user[:-1]))
        if len(later):
            row = int(later[0])
            raise UserError(
                f"leak: {_name(inter, int(user[row]))} has an event of {_when(inter, at.start + row)} "
                f"(its row {row + at.start - int(inter.offsets[user[row]])}) before one of "
                f"{_when(inter, at.start + row + 1)}: out of order, the future is in the history"
            )


def _check_boundaries(inter: Interactions, split: Split, first: float, last: float) -> None:
    users = np.flatnonzero(split.train_end > 0)
    latest = inter.time[inter.offsets[users] + split.train_end[users] - 1]
    _refuse(inter, f"training event not before {iso(first)}", latest >= first, split.train_end[users] - 1, users)
    for name, part, low, high in (
        ("validation", split.valid, first, last),
        ("test", split.test, last, np.inf),
    ):
        time = inter.time[inter.offsets[part.user] + part.history]
        outside = (time < low) | (time >= high)
        _refuse(inter, f"{name} target is outside its window from {iso(low)}", outside, part.history, part.user)
        earlier = inter.time[inter.offsets[part.user] + part.history - 1]
        _refuse(inter, f"{name} window opens inside the history", earlier >= low, part.history - 1, part.user)


def _refuse(
    inter: Interactions,
    what: str,
    bad: Bool[np.ndarray, " n"],
    rows: Int64[np.ndarray, " n"],
    users: Int64[np.ndarray, " n"],
) -> None:
    """Raises for the first of the bad cases; `rows` count from 0 inside the user."""
    if not bad.any():
        return
    first = int(np.flatnonzero(bad)[0])
    user, row = int(users[first]), int(rows[first])
    length = int(inter.lengths[user])
    when = f" ({_when(inter, int(inter.offsets[user]) + row)})" if 0 <= row < length else ""
    raise UserError(
        f"leak: {_name(inter, user)}, event {row} of {length}{when}: {what}; {int(np.count_nonzero(bad))} such case(s)"
    )


def _name(inter: Interactions, user: int) -> str:
    return f"user {inter.user_ids.originals([user])[0]!s}"


def _when(inter: Interactions, event: int) -> str:
    return iso(float(inter.time[event])) if inter.timed else f"position {inter.time[event]:g}"
