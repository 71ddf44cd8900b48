import threading

import numpy as np
import pytest

from jaxops.core.failures import UserError
from jaxops.data.interactions.interactions import from_arrays
from jaxops.data.interactions.splits import leave_one_out
from jaxops.data.interactions.windows import SequenceSource
from jaxops.data.loader import Loader, build_batches

pytestmark = pytest.mark.latest


@pytest.fixture(scope="module")
def windows():
    rng = np.random.default_rng(0)
    inter = from_arrays(rng.integers(0, 20, 600), rng.integers(0, 50, 600), rng.integers(0, 99, 600))
    return SequenceSource(inter, leave_one_out(inter), 8, seed=1)


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 2), (1, 2), (3, 4)])
def test_batches_follow_the_cursor(windows, threads, prefetch):
    with Loader(windows, 40, 16, threads=threads, prefetch=prefetch) as batches:
        for k in range(20):  # several epochs
            got, expected = next(batches), windows.batch(40 + 16 * k, 16)
            for name, value in expected.items():
                np.testing.assert_array_equal(got[name], value)


def test_any_cursor_resumes(windows):
    with Loader(windows, 0, 16) as batches:
        run = [next(batches)["items"] for _ in range(6)]
    with Loader(windows, 3 * 16, 16) as batches:
        np.testing.assert_array_equal(next(batches)["items"], run[3])


def test_draws_of_any_size_go_on_along_the_stream(windows):
    """A run that drew resumes at any of its cursors with the same examples."""
    sizes = [16, 16, 5, 16, 32, 16, 16]
    cursor, taken = 48, []
    with Loader(windows, cursor, 16) as batches:
        for size in sizes:
            taken.append((cursor, batches.take(cursor, size)))
            cursor += size
    for (cursor, got), size in zip(taken, sizes, strict=True):
        for name, value in windows.batch(cursor, size).items():
            np.testing.assert_array_equal(got[name], value)
    cursor, want = taken[3]
    with Loader(windows, cursor, 16) as batches:
        np.testing.assert_array_equal(batches.take(cursor, 16)["items"], want["items"])


def test_a_draw_has_the_rows_of_its_own_size(windows):
    with Loader(windows, 0, 16, rows=lambda size: [(size // 2, size)]) as batches:
        np.testing.assert_array_equal(batches.take(0, 16)["items"], windows.batch(8, 8)["items"])
        np.testing.assert_array_equal(batches.take(16, 6)["items"], windows.batch(19, 3)["items"])


def test_planned_batches_have_one_size(windows):
    with Loader(windows, 0, 16, finish=dict) as batches, pytest.raises(UserError, match=r"drew 8 .* planned for 16"):
        batches.take(0, 8)


def test_a_process_builds_only_its_rows(windows):
    whole = windows.batch(32, 16)
    ranges = [(4, 6), (12, 16)]
    asked = []

    class Watched:
        examples = windows.examples

        def batch(self, cursor, size):
            asked.append((cursor, size))
            return windows.batch(cursor, size)

    part = build_batches(Watched(), 32, 16, ranges)
    assert asked == [(36, 2), (44, 4)]
    for name, value in whole.items():
        np.testing.assert_array_equal(part[name], np.concatenate([value[a:b] for a, b in ranges]))
    with Loader(windows, 32, 16, rows=[(0, 8)]) as batches:
        np.testing.assert_array_equal(next(batches)["items"], whole["items"][:8])


def test_closing_lets_the_threads_go(windows):
    before = set(threading.enumerate())
    batches = Loader(windows, 0, 16, threads=2, prefetch=4)
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    batches.close()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_an_error_of_the_source_reaches_the_reader():
    class Broken:
        examples = 10

        def batch(self, cursor, size):
            if cursor >= 8:
                raise RuntimeError("row 8 is bad")
            return {"id": np.arange(cursor, cursor + size, dtype=np.int32)}

    with Loader(Broken(), 0, 4) as batches:
        assert next(batches)["id"].tolist() == [0, 1, 2, 3]
        next(batches)
        with pytest.raises(RuntimeError, match="row 8 is bad"):
            next(batches)
