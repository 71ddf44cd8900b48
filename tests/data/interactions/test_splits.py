import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxops.core.failures import UserError
from jaxops.data.interactions import heldout, leaks, splits
from jaxops.data.interactions.interactions import from_arrays
from jaxops.data.interactions.spec import GlobalTime, LeaveOneOut
from jaxops.data.interactions.splits import Queries, check_no_leak, global_time, leave_one_out, make_split

pytestmark = pytest.mark.latest

# user: (time, item) in order
EVENTS = {
    "a": [(1, "p"), (2, "q"), (3, "r"), (10, "s"), (11, "p"), (20, "q")],
    "b": [(2, "p"), (12, "new"), (21, "r"), (22, "s")],
    "c": [(13, "q"), (14, "p"), (23, "q")],  # nothing before 10: a cold user with a history at 20
    "d": [(4, "r"), (5, "p")],
    "e": [(24, "q")],  # first event in the test window: no history
}


def events(source=EVENTS):
    rows = [(user, item, time) for user, mine in source.items() for time, item in mine]
    return from_arrays(*zip(*rows, strict=True))


def named(inter, queries):
    users = inter.user_ids.originals(queries.user).tolist()
    targets = inter.item_ids.originals(queries.target).tolist()
    return {u: (h, t) for u, h, t in zip(users, queries.history.tolist(), targets, strict=True)}


def test_leave_one_out():
    inter = events()
    split = leave_one_out(inter)
    assert split.train_end.tolist() == [4, 2, 1, 2, 1]
    assert named(inter, split.valid) == {"a": (4, "p"), "b": (2, "r"), "c": (1, "p")}
    assert named(inter, split.test) == {"a": (5, "q"), "b": (3, "s"), "c": (2, "q")}
    assert split.counts == {
        "train_users": 5,
        "train_events": 10,
        "train_items": 5,
        "valid": 3,
        "valid_cold_user": 0,
        "valid_cold_item": 0,
        "test": 3,
        "test_cold_user": 0,
        "test_cold_item": 0,
    }


def test_global_time():
    inter = events()
    split = global_time(inter, 10, "1970-01-01T00:00:20")
    assert split.train_end.tolist() == [3, 1, 0, 2, 0]
    assert named(inter, split.valid) == {"a": (3, "s"), "b": (1, "new")}
    assert named(inter, split.test) == {"a": (5, "q"), "b": (2, "r"), "c": (2, "q")}
    assert split.boundaries == (10.0, 20.0)
    assert split.counts["valid_no_history"] == 1  # c
    assert split.counts["test_no_history"] == 1  # e
    assert split.counts["test_cold_user"] == 1  # c has a history, but none of it is training
    assert split.counts["valid_cold_item"] == 2  # s and new
    assert split.counts["test_cold_item"] == 0


def test_chunks_do_not_matter(monkeypatch):
    inter = events()
    whole = [leave_one_out(inter), global_time(inter, 10, 20)]
    hashes = [split.sha256 for split in whole]
    for module in (splits, leaks, heldout):
        monkeypatch.setattr(module, "CHUNK", 2)
    small = [leave_one_out(inter), global_time(inter, 10, 20)]
    assert [split.sha256 for split in small] == hashes
    assert [split.counts for split in small] == [split.counts for split in whole]


def test_make_split():
    inter = events()
    assert make_split(inter, LeaveOneOut()).kind == "leave_one_out"
    assert make_split(inter, GlobalTime(10, 20)).sha256 == global_time(inter, 10, 20).sha256


def test_sha256_is_what_is_documented():
    inter = events()
    text = (
        "a\tp q r s p q\t4\t4\t5\n"
        "b\tp new r s\t2\t2\t3\n"
        "c\tq p q\t1\t1\t2\n"
        "d\tr p\t2\t-\t-\n"
        "e\tq\t1\t-\t-\n"
    )  # fmt: skip
    assert leave_one_out(inter).sha256 == hashlib.sha256(text.encode()).hexdigest()
    integers = from_arrays([7, 7, 10, 7], [300, 20, 20, 4], [1, 1, 1, 1])
    text = "7\t300 20 4\t1\t1\t2\n10\t20\t1\t-\t-\n"
    assert leave_one_out(integers).sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_the_hash_sees_the_tie_break():
    forward = from_arrays([1] * 4, ["a", "b", "c", "d"], [5, 5, 5, 5])
    backward = from_arrays([1] * 4, ["a", "c", "b", "d"], [5, 5, 5, 5])
    assert leave_one_out(forward).sha256 != leave_one_out(backward).sha256


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 9)), min_size=3, max_size=40))
def test_splits_never_leak(rows):
    inter = from_arrays(*zip(*rows, strict=True))
    made = []
    for make in (leave_one_out, lambda x: global_time(x, 3, 6)):
        try:
            made.append(make(inter))
        except UserError as error:
            assert "leak" not in str(error)
    for split in made:
        for part in (split.valid, split.test):
            for user, history, target in zip(part.user, part.history, part.target, strict=True):
                mine = slice(inter.offsets[user], inter.offsets[user + 1])
                time, item = inter.time[mine], inter.item[mine]
                assert item[history] == target
                assert np.all(time[:history] <= time[history])
                assert split.train_end[user] <= history
                if split.boundaries:
                    assert np.all(time[:history] < time[history])
                    assert np.all(time[: split.train_end[user]] < split.boundaries[0])


def grown(split, **changes):
    return dataclasses.replace(split, **changes)


def queries(part, **changes):
    return Queries(**{**{f: getattr(part, f).copy() for f in ("user", "history", "target")}, **changes})


def longer(part):
    return queries(part, history=part.history + 1)


def later(split):
    """The test query of user b on its second event of the window, the first one being history."""
    history = split.test.history + np.array([0, 1, 0])
    at = split.inter.offsets[split.test.user] + history
    return queries(split.test, history=history, target=split.inter.item[at])


LEAKS = {
    "training runs into the validation target": (
        leave_one_out,
        lambda s: grown(s, train_end=s.train_end + np.array([1, 0, 0, 0, 0])),
        ["user a", "event 4 of 6", "validation target is trained on", "00:00:11Z"],
    ),
    "training runs past the end": (
        leave_one_out,
        lambda s: grown(s, train_end=s.train_end + np.array([0, 0, 0, 9, 0])),
        ["user d", "ends after the user's last event"],
    ),
    "history holds its target": (
        leave_one_out,
        lambda s: grown(s, valid=longer(s.valid)),
        ["user a", "validation target is not the event after its history"],
    ),
    "test history to the end": (
        leave_one_out,
        lambda s: grown(s, test=longer(s.test)),
        ["user a", "test history leaves no target after it"],
    ),
    "no history": (
        leave_one_out,
        lambda s: grown(s, valid=queries(s.valid, history=s.valid.history * 0)),
        ["leaves no target after it", "3 such case(s)"],
    ),
    "test before validation": (
        leave_one_out,
        lambda s: grown(s, valid=s.test, test=s.valid),
        ["test target is not after the validation target"],
    ),
    "training in the validation window": (
        lambda inter: global_time(inter, 10, 20),
        lambda s: grown(s, train_end=s.train_end + np.array([0, 0, 1, 0, 0])),
        ["user c", "training event not before 1970-01-01T00:00:10Z", "(1970-01-01T00:00:13Z)"],
    ),
    "boundary moved into training": (
        lambda inter: global_time(inter, 10, 20),
        lambda s: grown(s, boundaries=(3.0, 20.0)),
        ["training event not before 1970-01-01T00:00:03Z"],
    ),
    "validation in the test window": (
        lambda inter: global_time(inter, 10, 20),
        lambda s: grown(s, boundaries=(10.0, 12.0)),
        ["user b", "validation target is outside its window"],
    ),
    "test not the first of its window": (
        lambda inter: global_time(inter, 10, 20),
        lambda s: grown(s, test=later(s)),
        ["user b", "event 2 of 4 (1970-01-01T00:00:21Z)", "test window opens inside the history"],
    ),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_leaking_split_is_refused(name):
    make, corrupt, fragments = LEAKS[name]
    inter = events()
    split = make(inter)
    check_no_leak(inter, split)
    with pytest.raises(UserError, match=r"^leak: ") as caught:
        check_no_leak(inter, corrupt(split))
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)


def test_an_injected_future_row_is_caught():
    """A row of the future put among a user's events, as a wrong join or an unstable sort would."""
    inter = events()
    split = leave_one_out(inter)
    for injected in (0, 1, 2):  # three places of user a, before its validation target
        time = inter.time.copy()
        time[injected] = 99.0
        broken = dataclasses.replace(inter, time=time)
        with pytest.raises(UserError, match="user a has an event of 1970-01-01T00:01:39Z"):
            check_no_leak(broken, split)
        for make in (leave_one_out, lambda x: global_time(x, 10, 20)):
            with pytest.raises(UserError, match="leak"):
                make(broken)


def test_events_of_another_user_are_caught():
    inter = events()
    user = inter.user.copy()
    user[3] = 1
    with pytest.raises(UserError, match="lies among the events of another user"):
        leave_one_out(dataclasses.replace(inter, user=user))


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: leave_one_out(from_arrays([1, 1, 2], [1, 2, 3])), "needs users with three events"),
        (lambda: global_time(from_arrays([1, 1, 2], [1, 2, 3]), 1, 2), "needs times"),
        (lambda: global_time(events(), 20, 10), "must be before split.test_from"),
        (lambda: global_time(events(), "soon", 10), "'soon' is no ISO date"),
        (lambda: global_time(events(), 0, 10), "the training part of the split is empty"),
        (lambda: global_time(events(), 10, 99), "the test part of the split is empty"),
        (lambda: global_time(events(), 15, 20), "the validation part of the split is empty"),
        (lambda: global_time(events(), "2026-11-15", "2026-11-20"), "to 1970-01-01T00:00:24Z"),
    ],
)
def test_splits_that_cannot_be(make, fragment):
    with pytest.raises(UserError) as caught:
        make()
    assert fragment in str(caught.value)
