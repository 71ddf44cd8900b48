"""Going back: when a loss is lost, from which batch on, and how often.

A run whose `nonfinite` is `rollback` returns to its last good checkpoint with the cursor past the bad batch. A loss
that leaps may count as one, by its z-score over the windows before it.
"""

import collections
import math
import statistics

ENOUGH = 8
"""Windows that a z-score wants to see before it judges."""


class GoBack(Exception):
    """Steps `first` to `last` shall not have been: the run is to go back to before them, and their batches are bad.

    `cursor` is where the stream of examples goes on after them.
    """

    def __init__(self, first: int, last: int, cursor: int, why: str):
        super().__init__(why)
        self.first, self.last, self.cursor, self.why = first, last, cursor, why


class Spikes:
    """Whether a window's loss leaps out of the `windows` before it by more than `zscore` standard deviations."""

    def __init__(self, zscore: float, windows: int):
        self._zscore = zscore
        self._seen: collections.deque[float] = collections.deque(maxlen=windows)

    def __call__(self, loss: float) -> float | None:
        """The z-score of a leap upwards, which is not remembered; else None."""
        if not math.isfinite(loss):
            return None
        if len(self._seen) >= min(ENOUGH, self._seen.maxlen or ENOUGH):
            mean = statistics.fmean(self._seen)
            # A constant loss has no spread: what float32 can tell apart stands in for it.
            spread = max(statistics.pstdev(self._seen), 1e-6 * abs(mean), 1e-12)
            if (score := (loss - mean) / spread) > self._zscore:
                return score
        self._seen.append(loss)
        return None
