"""Packing of segments: each exactly once, no row overfull, few rows, the same index in every process."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxops.data.packing import best_fit


@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=60),
    length=st.integers(12, 30),
    seed=st.integers(0, 3),
)
def test_every_segment_is_in_one_row_that_has_room(widths, length, seed):
    width = np.array(widths)
    order, first = best_fit(width, length, seed)
    assert sorted(order.tolist()) == list(range(len(width)))
    held = np.add.reduceat(width[order], first[:-1])
    assert held.max() <= length and first[0] == 0 and first[-1] == len(width)
    # no two rows would fit into one
    assert len(held) == 1 or np.sort(held)[:2].sum() > length
    again = best_fit(width, length, seed)
    assert np.array_equal(order, again[0]) and np.array_equal(first, again[1])


@pytest.mark.parametrize("width, rows", [(16, 25), (20, 34), (64, 100), (33, 100), (32, 50)])
def test_segments_of_one_width_share_rows(width, rows):
    _, first = best_fit(np.full(100, width), 64, 0)
    assert len(first) - 1 == rows


def test_seeds_draw_which_segments_share_a_row():
    width = np.random.default_rng(0).integers(1, 64, 500)
    one, other = best_fit(width, 64, 0), best_fit(width, 64, 1)
    assert one[0].tolist() != other[0].tolist() and np.array_equal(one[1], other[1])


def test_a_million_segments_are_packed_tightly():
    width = np.random.default_rng(0).lognormal(5, 0.8, 1_000_000).astype(int).clip(1, 1024)
    _, first = best_fit(width, 1024, 0)
    assert width.sum() / ((len(first) - 1) * 1024) > 0.999
