import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxops.core.failures import UserError
from jaxops.data.interactions.interactions import from_arrays
from jaxops.data.interactions.packing import PackedSource
from jaxops.data.interactions.splits import Queries, Split, leave_one_out
from jaxops.data.interactions.windows import SequenceSource


def source(train_lengths, length, *, seed=3, held_out=2, **options):
    """User u trains on `train_lengths[u]` events; items are 1, 2, ... over all events, each there once."""
    total = [n + held_out for n in train_lengths]
    users = np.repeat(np.arange(len(total)), total)
    inter = from_arrays(users, np.arange(1, len(users) + 1))
    none = Queries(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int32))
    split = Split(inter, "leave_one_out", np.array(train_lengths, np.int64), none, none)
    return inter, SequenceSource(inter, split, length, seed, **options)


def transitions(inter, train_lengths):
    first = inter.offsets[:-1] + 1  # item of a user's first event
    return {(int(f) + k, int(f) + k + 1) for f, n in zip(first, train_lengths, strict=True) for k in range(n - 1)}


def pairs(batch):
    real = batch["weight"] > 0
    return list(zip(batch["items"][real].tolist(), batch["targets"][real].tolist(), strict=True))


lengths = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda ls: max(ls) >= 2)


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(0, 5), st.booleans(), st.integers(0, 3))
def test_every_transition_is_a_target_exactly_once_an_epoch(train, length, seed, shift, epoch):
    inter, windows = source(train, length, seed=seed, shift=shift)
    batch = windows.batch(epoch * windows.examples, windows.examples)
    seen = pairs(batch)
    assert len(seen) == len(set(seen))
    assert set(seen) == transitions(inter, train)
    assert sorted(batch["id"].tolist()) == list(range(windows.examples))
    assert np.all(batch["weight"].sum(1) >= 1)  # no empty window
    # the fewest windows that can hold them
    assert windows.examples == sum(-(-(n - 1) // length) for n in train if n >= 2)


@pytest.mark.parametrize("kind", [SequenceSource, PackedSource])
def test_places_say_which_events_the_items_are_and_whose(kind):
    inter, _ = source([9, 1, 4, 17], 6)
    split = leave_one_out(inter)
    plain, placed = kind(inter, split, 6, 3), kind(inter, split, 6, 3, event_rows=True)
    for cursor in (0, placed.examples):
        batch = placed.batch(cursor, placed.examples)
        real = batch["items"] > 0
        assert real.any() and not real.all()
        for name in ("events", "users"):
            assert batch[name].dtype == np.int32 and np.all(batch[name][~real] == -1)
        np.testing.assert_array_equal(inter.item[batch["events"][real]], batch["items"][real])
        np.testing.assert_array_equal(inter.user[batch["events"][real]], batch["users"][real])
        alone = plain.batch(cursor, placed.examples)
        assert set(batch) - set(alone) == {"events", "users"}
        assert all(np.array_equal(values, batch[name]) for name, values in alone.items())


@settings(max_examples=80, deadline=None)
@given(lengths, st.integers(1, 9), st.data(), st.booleans())
def test_overlapping_windows_cover_everything(train, length, data, shift):
    stride = data.draw(st.integers(1, length))
    inter, windows = source(train, length, stride=stride, shift=shift)
    seen = pairs(windows.batch(windows.examples, windows.examples))
    assert set(seen) == transitions(inter, train)


@pytest.mark.latest
@settings(max_examples=80, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(0, 200), st.integers(1, 40), st.integers(1, 40))
def test_a_batch_is_a_pure_function_of_the_cursor(train, length, cursor, left, right):
    """Halves are the halves of the whole, across epoch boundaries too."""
    _, windows = source(train, length)
    whole = windows.batch(cursor, left + right)
    halves = windows.batch(cursor, left), windows.batch(cursor + left, right)
    again = source(train, length)[1].batch(cursor, left + right)
    for name, value in whole.items():
        np.testing.assert_array_equal(value, np.concatenate([half[name] for half in halves]))
        np.testing.assert_array_equal(value, again[name])


def test_layout():
    _, windows = source([4], 6, shift=False)
    batch = windows.batch(0, 1)
    assert batch["items"].tolist() == [[0, 0, 0, 1, 2, 3]]
    assert batch["targets"].tolist() == [[0, 0, 0, 2, 3, 4]]
    assert batch["weight"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert {name: value.dtype.name for name, value in batch.items()} == {
        "id": "int32",
        "items": "int32",
        "targets": "int32",
        "weight": "float32",
    }


def test_without_shift_the_last_window_ends_at_the_last_event():
    _, windows = source([8], 3, shift=False)
    batch = windows.batch(0, windows.examples)
    order = np.argsort(batch["id"])
    assert batch["targets"][order].tolist() == [[0, 0, 2], [3, 4, 5], [6, 7, 8]]


def test_window_starts_move_from_epoch_to_epoch():
    _, windows = source([12, 12], 8)
    starts = set()
    for epoch in range(60):
        batch = windows.batch(epoch * windows.examples, windows.examples)
        first = batch["targets"][batch["id"] == 0][0]
        starts.add(int(first.max()))
    assert starts == {
        4,
        5,
        6,
        7,
        8,
        9,
    }  # the first window may end anywhere that leaves the second one full or less


def test_epochs_and_seeds_reshuffle():
    train = [9] * 40
    _, one = source(train, 4, seed=1, shift=False)
    _, two = source(train, 4, seed=2, shift=False)
    first, second = one.batch(0, one.examples)["id"], one.batch(one.examples, one.examples)["id"]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, two.batch(0, two.examples)["id"])


def test_changing_a_batch_changes_nothing_else():
    _, windows = source([9] * 5, 4)
    for name in ("id", "items", "targets"):
        before = windows.batch(0, 4)
        windows.batch(0, 4)[name][:] = -1
        np.testing.assert_array_equal(windows.batch(0, 4)[name], before[name])


def test_threads_agree():
    _, windows = source([30] * 20, 7)
    cursors = list(range(0, 40 * windows.examples, windows.examples // 2))
    expected = [windows.batch(cursor, 16) for cursor in cursors]
    fresh = source([30] * 20, 7)[1]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda cursor: fresh.batch(cursor, 16), cursors))
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_array_equal(a["items"], b["items"])
    assert len(fresh._epochs) <= 2


def test_held_out_items_are_never_seen():
    inter, windows = source([5, 1, 3], 4)
    batch = windows.batch(0, 3 * windows.examples)
    held_out = {int(last) - k for last in inter.offsets[1:] for k in (0, 1)} | {8}  # 8: a single training event
    assert not held_out & (set(batch["items"].ravel().tolist()) | set(batch["targets"].ravel().tolist()))


@pytest.mark.parametrize(
    ("options", "error", "fragment"),
    [
        ({"stride": 0}, ValueError, "1 <= stride <= length"),
        ({"stride": 9}, ValueError, "1 <= stride <= length"),
        ({"seed": -1}, ValueError, "seed >= 0"),
    ],
)
def test_refusals(options, error, fragment):
    with pytest.raises(error, match=fragment):
        source([5], 4, **options)


def test_nothing_to_learn():
    with pytest.raises(UserError, match="two training events"):
        source([1, 0, 1], 4)
    with pytest.raises(ValueError, match="cursor >= 0"):
        source([5], 4)[1].batch(-1, 4)


def test_no_python_work_per_example():
    """The interpreter runs the same few lines whether a batch has 8 rows or 4096."""
    _, windows = source([60] * 300, 10)
    counts = []
    for size in (8, windows.examples):
        windows.batch(0, size)
        lines = 0

        def count(frame, event, arg):
            nonlocal lines
            lines += event == "line"
            return count

        sys.settrace(count)
        try:
            windows.batch(0, size)
        finally:
            sys.settrace(None)
        counts.append(lines)
    assert windows.examples > 1000
    assert counts[0] == counts[1]
