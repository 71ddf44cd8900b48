import numpy as np
import pytest

from jaxops.data.interactions.interactions import from_arrays
from jaxops.data.interactions.queries import QueryBatches, seen_width
from jaxops.data.interactions.splits import leave_one_out


def make(size, length=4, part="test"):
    lengths = [3, 12, 5, 4, 9]
    users = np.repeat(np.arange(5), lengths)
    inter = from_arrays(users, np.random.default_rng(0).integers(0, 9, len(users)))
    split = leave_one_out(inter)
    assert seen_width(inter, split.valid, split.test) == 8  # of nine items the longest history has at most eight
    width = 16
    return inter, split, QueryBatches(inter, getattr(split, part), length, size, seen=width)


@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_batches_are_what_a_loop_would_build(part, size):
    inter, split, batches = make(size, part=part)
    assert batches.seen == 16  # room for the longest history, of the test part, of 11 events
    assert len(batches) == -(-5 // size)
    queries = getattr(split, part)
    rows = [{name: value[r] for name, value in batch.items()} for batch in batches for r in range(size)]
    for k, row in enumerate(rows):
        if k >= len(queries):
            assert all(np.all(value == 0) for value in row.values())
            continue
        user, history = queries.user[k], queries.history[k]
        past = inter.item[inter.offsets[user] : inter.offsets[user] + history].tolist()
        assert row["items"].tolist() == [0] * (4 - len(past)) + past[-4:]
        assert row["seen"].tolist() == past + [0] * (16 - len(past))
        assert (row["id"], row["user"], row["target"], row["weight"]) == (k, user, queries.target[k], 1)
        assert (inter.item[row["event"]], inter.user[row["event"]]) == (row["target"], user)
    shapes = {name: (value.shape, value.dtype.name) for name, value in batches[0].items()}
    assert shapes == {
        "id": ((size,), "int32"),
        "items": ((size, 4), "int32"),
        "target": ((size,), "int32"),
        "seen": ((size, 16), "int32"),
        "weight": ((size,), "float32"),
        "user": ((size,), "int32"),
        "event": ((size,), "int32"),
    }


def test_places_say_which_events_the_items_are_and_whose():
    inter, split, plain = make(8)
    batch = QueryBatches(inter, split.test, 4, 8, seen=16, event_rows=True)[0]
    assert set(batch) - set(plain[0]) == {"events", "users"}
    real = batch["items"] > 0
    assert np.all(batch["events"][~real] == -1) and np.all(batch["users"][~real] == -1)
    np.testing.assert_array_equal(inter.item[batch["events"][real]], batch["items"][real])
    assert np.all((batch["users"] == batch["user"][:, None])[real])
    assert np.all(batch["events"][:5, -1] == batch["event"][:5] - 1)


def test_rows_are_rows_of_the_batch():
    _, _, batches = make(4)
    for k in range(len(batches)):
        whole = batches[k]
        for start, stop in ((0, 2), (1, 4), (3, 4)):
            for name, value in batches.rows(k, start, stop).items():
                np.testing.assert_array_equal(value, whole[name][start:stop])


def test_bounds():
    inter, split, batches = make(4)
    with pytest.raises(IndexError, match="batch 2 of 2"):
        batches[2]
    with pytest.raises(ValueError, match=r"has [0-9] distinct items, seen=2"):
        QueryBatches(inter, split.test, 4, 4, seen=2)[0]
    assert QueryBatches(inter, split.valid, 4, 4).length == 4


def test_memory_is_bounded_by_distinct_items():
    """One user with 100,000 events of 300 items does not make every batch 100,000 wide."""
    draw = np.random.default_rng(1)
    users = np.repeat([0, 1, 2], [5, 100_000, 4])
    items = draw.integers(0, 300, len(users))
    inter = from_arrays(users, items)
    split = leave_one_out(inter)
    batches = QueryBatches(inter, split.test, 4, 3)
    assert batches.seen == seen_width(inter, split.valid, split.test) == 304
    batch = batches[0]
    for user in range(3):
        past = inter.item[inter.offsets[user] : inter.offsets[user + 1] - 1]
        assert set(batch["seen"][user]) - {0} == set(past.tolist())
