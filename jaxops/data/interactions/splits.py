"""Makes splits that cannot leak: training comes before its targets, and every split is checked before use.

Order inside a user is (timestamp, original row), so a split is a function of the data alone.
"""

import numpy as np
from jaxtyping import Int64

from jaxops.core.failures import UserError
from jaxops.data.interactions.copies import are_copies
from jaxops.data.interactions.heldout import Queries, Split
from jaxops.data.interactions.interactions import Interactions
from jaxops.data.interactions.leaks import check_no_leak
from jaxops.data.interactions.ranges import user_ranges
from jaxops.data.interactions.spec import LeaveOneOut, SplitConfig
from jaxops.data.moments import iso, moment
from jaxops.data.spec import Moment

__all__ = ["Queries", "Split", "check_no_leak", "global_time", "leave_one_out", "make_split"]

CHUNK = 1 << 22
"""The number of events that are looked at at once."""


def make_split(inter: Interactions, config: SplitConfig, *, repeats: bool = False) -> Split:
    """Returns the split that a config asks for; `repeats` as in `leave_one_out`.

    Raises:
      UserError: what the split raises.
    """
    if isinstance(config, LeaveOneOut):
        return leave_one_out(inter, repeats=repeats)
    return global_time(inter, config.valid_from, config.test_from)


def leave_one_out(inter: Interactions, *, repeats: bool = False) -> Split:
    """Splits off each user's last event as test target and the one before it as validation target; the rest trains.

    Users with fewer than three events only train. A target that is an exact copy of an event before it is left out
    and counted (`valid_copies`, `test_copies`), unless `repeats` says that copies are honest repeats. Note that
    training events of one user may be later than another's test event: published protocol (SASRec, ICDM 2018), not a
    forecast.

    Raises:
      UserError: no user has three events; all targets are copies; a leak.
    """
    lengths = inter.lengths
    chosen = np.flatnonzero(lengths >= 3)
    if not len(chosen):
        raise UserError(
            f"leave_one_out needs users with three events; the busiest of {inter.n_users} has {lengths.max()}"
        )
    train_end = np.where(lengths >= 3, lengths - 2, lengths)
    parts, counts = [], {}
    for name, back in (("valid", 2), ("test", 1)):
        users, history = chosen, lengths[chosen] - back
        if inter.copies and not repeats:
            fresh = ~are_copies(inter, inter.offsets, inter.offsets[users] + history)
            users, history = users[fresh], history[fresh]
            counts[f"{name}_copies"] = int(np.count_nonzero(~fresh))
        if not len(users):
            raise UserError(
                f"leave_one_out: every {name} target is an exact copy of an event before it (same user, item, time); "
                "data.duplicates: drop removes copies, keep takes them as repeats"
            )
        parts.append(_queries(inter, users, history))
    return _checked(inter, Split(inter, "leave_one_out", train_end, parts[0], parts[1]), counts)


def global_time(inter: Interactions, valid_from: Moment, test_from: Moment) -> Split:
    """Splits by time: a user's first event from `valid_from` on validates, from `test_from` on tests.

    Events before `valid_from` train. A validation target lies in [valid_from, test_from). All events before a target
    are its history. Users without any are left out and counted (`no_history`). Boundaries are ISO dates or times (UTC
    unless they say otherwise) or unix seconds.

    Raises:
      UserError: no times, boundaries out of order, a part that is empty, a leak.
    """
    if not inter.timed:
        raise UserError("split global_time needs times and this data has only an order; use leave_one_out")
    first, last = moment(valid_from), moment(test_from)
    begin, end = float(inter.time.min()), float(inter.time.max())
    if first >= last:
        raise UserError(f"split.valid_from ({iso(first)}) must be before split.test_from ({iso(last)})")
    before_valid, before_test = (_events_before(inter, at) for at in (first, last))
    parts, counts = [], {}
    for name, history, limit in (
        ("valid", before_valid, before_test),
        ("test", before_test, inter.lengths),
    ):
        active = limit > history
        users = np.flatnonzero(active & (history > 0))
        counts[f"{name}_no_history"] = int(np.count_nonzero(active & (history == 0)))
        parts.append(_queries(inter, users, history[users]))
    empty = [name for name, part in zip(("validation", "test"), parts, strict=True) if not len(part)]
    if not before_valid.any() or empty:
        what = "training" if not before_valid.any() else empty[0]
        raise UserError(
            f"the {what} part of the split is empty: valid_from {iso(first)}, test_from {iso(last)}, and the "
            f"data runs from {iso(begin)} to {iso(end)} (a query also needs an earlier event of its user)"
        )
    split = Split(inter, "global_time", before_valid, parts[0], parts[1], (first, last))
    return _checked(inter, split, counts)


def _queries(
    inter: Interactions, users: Int64[np.ndarray, " queries"], history: Int64[np.ndarray, " queries"]
) -> Queries:
    target = np.asarray(inter.item[inter.offsets[users] + history], np.int32)
    return Queries(users.astype(np.int32), history.astype(np.int64), target)


def _events_before(inter: Interactions, at: float) -> Int64[np.ndarray, " users"]:
    """Counts the events that each user has before the moment `at`."""
    before = np.zeros(inter.n_users, np.int64)
    for start, stop in user_ranges(inter.offsets, CHUNK):
        events = slice(int(inter.offsets[start]), int(inter.offsets[stop]))
        early = inter.user[events][inter.time[events] < at] - start
        before[start:stop] = np.bincount(early, minlength=stop - start)
    return before


def _checked(inter: Interactions, split: Split, counts: dict[str, int]) -> Split:
    """Returns the split with its counts, if it does not leak."""
    check_no_leak(inter, split)
    trained = np.zeros(inter.n_items + 1, bool)
    for start, stop in user_ranges(inter.offsets, CHUNK):
        events = slice(int(inter.offsets[start]), int(inter.offsets[stop]))
        user = inter.user[events]
        position = np.arange(events.start, events.stop) - inter.offsets[user]
        trained[inter.item[events][position < split.train_end[user]]] = True
    split.counts["train_users"] = int(np.count_nonzero(split.train_end))
    split.counts["train_events"] = int(split.train_end.sum())
    split.counts["train_items"] = int(np.count_nonzero(trained))
    for name, part in (("valid", split.valid), ("test", split.test)):
        split.counts[name] = len(part)
        split.counts[f"{name}_cold_user"] = int(np.count_nonzero(split.train_end[part.user] == 0))
        split.counts[f"{name}_cold_item"] = int(np.count_nonzero(~trained[part.target]))
    split.counts.update(counts)
    return split
