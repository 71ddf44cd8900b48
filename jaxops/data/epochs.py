"""An endless stream of epochs over examples, each epoch in an order of its own: a pure function of (seed, place)."""

import threading

import numpy as np
from jaxtyping import Int32

from jaxops.core.failures import UserError


class Epochs:
    """`examples` numbered 0, 1, ..., shuffled anew every epoch; workers may share one.

    Raises:
      UserError: more examples than 32-bit ids can tell apart.
    """

    def __init__(self, examples: int, seed: int) -> None:
        if examples >= 2**31:
            raise UserError(f"{examples:,} examples do not fit 32-bit ids")
        self.examples, self.seed = examples, seed
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def ids(self, cursor: int, size: int) -> Int32[np.ndarray, " size"]:
        """Returns the examples at `[cursor, cursor + size)` of the stream.

        Raises:
          ValueError: a negative cursor, or a size below one.
        """
        if cursor < 0 or size < 1:
            raise ValueError(f"need cursor >= 0 and size >= 1: {cursor=}, {size=}")
        epochs = range(cursor // self.examples, (cursor + size - 1) // self.examples + 1)
        starts = [(epoch, epoch * self.examples) for epoch in epochs]
        return np.concatenate(
            [self._order(epoch)[max(cursor - first, 0) : cursor + size - first] for epoch, first in starts]
        )

    def _order(self, epoch: int) -> np.ndarray:
        """The order of an epoch; the last two are kept (batches straddle them)."""
        with self._lock:
            if epoch not in self._orders:
                generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
                for old in sorted(self._orders, key=lambda known: abs(known - epoch))[1:]:
                    del self._orders[old]
                self._orders[epoch] = generator.permutation(np.arange(self.examples, dtype=np.int32))
            return self._orders[epoch]
