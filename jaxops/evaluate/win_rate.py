"""The share of comparisons that one side wins, with an interval that holds at every sample size at once.

An ordinary interval is right for one size that was chosen before. Whoever looks again and again, and stops when it
pleases, will find a difference where there is none. The interval here holds at all sizes together with the chosen
confidence: it is the two-sided normal-mixture boundary for values from 0 to 1, which are sub-Gaussian with variance
1/4 (Robbins 1970; Howard et al. 2021). Tested in tests/evaluate/test_win_rate.py.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxops.core.failures import UserError

TYPICAL = 200
"""The number of comparisons at which the interval is narrowest for what it promises."""


class WinRate(NamedTuple):
    """A mean of comparisons (1 a win, 0 a loss, 0.5 a tie), an interval that holds at every size, and their number."""

    rate: float
    low: float
    high: float
    comparisons: int


def win_rate(outcomes: Sequence[float], confidence: float = 0.95) -> WinRate:
    """Returns the win rate of these outcomes with its always-valid interval.

    Args:
      outcomes: a number from 0 to 1 for each comparison.
      confidence: the probability that the interval holds the true rate at all sizes.

    Raises:
      UserError: there is no outcome, one is outside of 0 to 1, or the confidence is.
    """
    values = np.asarray(outcomes, np.float64)
    if not len(values):
        raise UserError("win rate: there is no comparison")
    if not ((values >= 0) & (values <= 1)).all():
        raise UserError(f"win rate: expected numbers from 0 to 1, got {values[~((values >= 0) & (values <= 1))][0]}")
    if not 0 < confidence < 1:
        raise UserError(f"win rate: confidence must lie between 0 and 1, got {confidence}")
    rate, half = float(values.mean()), half_width(len(values), confidence)
    return WinRate(rate, max(rate - half, 0.0), min(rate + half, 1.0), len(values))


def half_width(count: int, confidence: float = 0.95) -> float:
    """Returns half the width of the interval for so many comparisons, before it is cut to 0 and 1."""
    alpha = 1 - confidence
    spread = count / 4
    # The mixture's scale that makes the boundary narrowest near TYPICAL comparisons.
    mixture = TYPICAL / 4 / (2 * math.log(1 / alpha) + math.log(1 + 2 * math.log(1 / alpha)))
    boundary = math.sqrt((spread + mixture) * math.log((spread + mixture) / (mixture * alpha**2)))
    return boundary / count
