"""Exact copies of events never become what a model is tested on."""

import numpy as np
import pytest

from jaxops.core.failures import UserError
from jaxops.data.interactions import cache
from jaxops.data.interactions.inspect import describe, inspect
from jaxops.data.interactions.interactions import from_arrays, read_interactions
from jaxops.data.interactions.open import open_data
from jaxops.data.interactions.spec import InteractionsFile, MinCount
from jaxops.data.interactions.splits import leave_one_out

DAY = 86_400


def write(path, rows):
    path.write_text("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))


def random_rows(seconds, seed=0):
    draw = np.random.default_rng(seed)
    return [(u, int(draw.integers(50)), int(draw.integers(1, 10**4)) * seconds) for u in range(20) for _ in range(6)]


def test_an_export_that_ran_twice_is_read_as_one_that_ran_once(tmp_path, caplog):
    rows = random_rows(1)
    write(tmp_path / "once.csv", rows)
    write(tmp_path / "twice.csv", [row for row in rows for _ in range(2)])
    once, twice = (open_data(InteractionsFile(str(tmp_path / f"{name}.csv"))) for name in ("once", "twice"))
    assert twice.split.sha256 == once.split.sha256
    assert twice.inter.dropped == {"duplicate_events": 120} and once.inter.dropped == {}
    assert "120 event(s) are exact copies" in caplog.text and caplog.text.count("exact copies") == 1
    shown = dict(describe(inspect(twice)))
    assert shown["dropped"] == "120 duplicate_events" and "data.duplicates" in shown["note"]


def test_the_filter_does_not_count_copies(tmp_path):
    """Users and items have enough events only if copies count; the k-core of what is left is the reference's."""
    rows = random_rows(1, seed=3)
    few = MinCount(user=4, item=3)
    doubled = [row for row in rows for _ in range(2)]
    columns = lambda given: tuple(zip(*given, strict=True))
    expected, found = (from_arrays(*columns(given), min_count=few) for given in (rows, doubled))
    for name in ("user", "item", "time", "offsets"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.dropped["duplicate_events"] + found.dropped["min_count_events"] == 240 - expected.n_events


def test_what_differs_in_any_column_that_is_read_is_no_copy():
    assert from_arrays([1, 1], [2, 2], [5, 6]).n_events == 2
    assert from_arrays([1, 1], [2, 2], [5, 5], [1.0, 2.0]).n_events == 2
    assert from_arrays([1, 1], [2, 2]).n_events == 2  # without times the order tells them apart
    assert from_arrays([1, 1], [2, 2], duplicates="drop").n_events == 1
    finer = from_arrays([1, 1, 1], [2, 2, 3], [5, 5, 7])
    assert (finer.n_events, finer.dropped) == (2, {"duplicate_events": 1})


@pytest.mark.parametrize("offset", [0, 7200, -18000])
def test_dates_alone_keep_repeats_and_no_target_has_a_copy_before_it(tmp_path, caplog, offset):
    days = lambda *numbers: [day * DAY + offset for day in numbers]
    rows = [(1, item, t) for item, t in zip("abab", days(1, 2, 3, 3), strict=True)]
    rows += [(2, item, t) for item, t in zip("abcbb", days(1, 2, 3, 4, 4), strict=True)]  # its last is a copy
    rows += [(3, item, t) for item, t in zip("abbc", days(1, 5, 5, 6), strict=True)]  # its validation target is one
    write(tmp_path / "a.csv", rows)
    data = open_data(InteractionsFile(str(tmp_path / "a.csv")))
    assert (data.inter.n_events, data.inter.copies) == (13, 2)
    assert data.split.valid.user.tolist() == [0, 1] and data.split.test.user.tolist() == [0, 2]
    assert (data.split.counts["valid_copies"], data.split.counts["test_copies"]) == (1, 1)
    assert "dates alone" in caplog.text
    shown = dict(describe(inspect(data)))
    assert "2 events, kept" in shown["exact copies"] and "1 copies of an earlier event left out" in shown["test"]
    kept = open_data(InteractionsFile(str(tmp_path / "a.csv"), duplicates="keep"))
    assert len(kept.split.valid) == len(kept.split.test) == 3
    dropped = open_data(InteractionsFile(str(tmp_path / "a.csv"), duplicates="drop"))
    assert dropped.inter.n_events == 11 and dropped.inter.dropped == {"duplicate_events": 2}


def test_summer_time_does_not_make_dates_finer():
    inter = from_arrays([1] * 4, [2] * 4, [DAY * 10 - 3600, DAY * 10 - 3600, DAY * 300 - 7200, DAY * 400 - 3600])
    assert (inter.n_events, inter.copies) == (4, 1)


def test_all_targets_are_copies():
    inter = from_arrays([1] * 4, [2] * 4, [DAY, DAY * 2, DAY * 2, DAY * 2])
    with pytest.raises(UserError, match=r"every valid target is an exact copy.*data\.duplicates"):
        leave_one_out(inter)


@pytest.mark.parametrize("seconds", [1, DAY])
def test_a_cache_has_the_same_columns(tmp_path, seconds):
    rows = random_rows(seconds)
    write(tmp_path / "a.csv", rows + rows[:50])
    config = InteractionsFile(str(tmp_path / "a.csv"), min_count=MinCount(item=2))
    folder = cache.build_cache(config, tmp_path / "cache", chunk=7)
    mapped, read = cache.open_cache(folder, verify=True), read_interactions(config.path, min_count=config.min_count)
    for name in ("user", "item", "time", "weight", "offsets", "context"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(read, name))
    assert (mapped.dropped, mapped.copies) == (read.dropped, read.copies)
    assert read.copies > 0 if seconds == DAY else read.dropped["duplicate_events"] == 50
    assert not list(folder.glob("*-*.npy"))
