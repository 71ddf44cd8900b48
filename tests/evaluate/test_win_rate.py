"""The win rate's interval holds at every sample size at once, and is what its formula says."""

import math

import numpy as np
import pytest

from jaxops.core.failures import UserError
from jaxops.evaluate.win_rate import half_width, win_rate


def test_the_rate_and_an_interval_around_it():
    found = win_rate([1.0, 0.0, 0.5, 1.0])
    assert found.rate == 0.625 and found.comparisons == 4
    assert found.low == 0.0 and found.high == 1.0  # four comparisons say nothing
    many = win_rate([1.0] * 300 + [0.0] * 100)
    assert 0.5 < many.low < 0.75 < many.high < 1


def test_the_width_is_the_normal_mixture_boundary():
    alpha, count = 0.05, 500
    mixture = 50 / (2 * math.log(1 / alpha) + math.log(1 + 2 * math.log(1 / alpha)))
    spread = count / 4
    expected = math.sqrt((spread + mixture) * math.log((spread + mixture) / (mixture * alpha**2))) / count
    assert half_width(count, 0.95) == pytest.approx(expected)
    assert half_width(2000) < half_width(500) < half_width(100)


def test_it_holds_at_all_sizes_together_where_an_ordinary_interval_does_not():
    draws = np.random.default_rng(0).random((400, 1000)) < 0.5
    counts = range(1, 1001)
    rates = draws.cumsum(axis=1) / np.array(counts)
    ours = np.array([half_width(count) for count in counts])
    ordinary = 1.96 * 0.5 / np.sqrt(np.array(counts))
    later = np.array(counts) >= 10
    missed = lambda width: (np.abs(rates - 0.5) > width)[:, later].any(axis=1).mean()
    assert missed(ours) <= 0.05
    assert missed(ordinary) > 0.25


@pytest.mark.parametrize(("outcomes", "confidence"), [([], 0.95), ([1.5], 0.95), ([0.5], 1.0), ([float("nan")], 0.9)])
def test_what_means_nothing_is_refused(outcomes, confidence):
    with pytest.raises(UserError):
        win_rate(outcomes, confidence)
