"""Rollback: the request to go back to the last good checkpoint, and the detection of spikes in the loss.

A run whose `nonfinite` is `rollback` returns to its last good checkpoint with the cursor past the bad batch. A spike
of the loss may count as bad too, by its z-score over the windows before it.
"""

import collections
import math
import statistics

ENOUGH = 8
"""The number of windows that a z-score needs; a shorter history of a `Spikes` lowers it."""


class GoBack(Exception):
    """A request to undo steps `first` to `last`: the run goes back to a checkpoint before them and skips their batches.

    Attributes:
      first: the first bad step.
      last: the last bad step.
      cursor: the position in the stream of examples after them.
      why: the reason, for people.
    """

    def __init__(self, first: int, last: int, cursor: int, why: str):
        super().__init__(why)
        self.first, self.last, self.cursor, self.why = first, last, cursor, why


class Spikes:
    """A detector of losses that exceed the mean of the last `windows` windows by over `zscore` standard deviations."""

    def __init__(self, zscore: float, windows: int):
        self._zscore = zscore
        self._seen: collections.deque[float] = collections.deque(maxlen=windows)

    def __call__(self, loss: float) -> float | None:
        """Returns the z-score of a spike, which is left out of the history; otherwise None."""
        if not math.isfinite(loss):
            return None
        if len(self._seen) >= min(ENOUGH, self._seen.maxlen or ENOUGH):
            mean = statistics.fmean(self._seen)
            # A constant loss has no spread; about the resolution of float32 stands in for it.
            spread = max(statistics.pstdev(self._seen), 1e-6 * abs(mean), 1e-12)
            if (score := (loss - mean) / spread) > self._zscore:
                return score
        self._seen.append(loss)
        return None
