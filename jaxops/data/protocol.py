"""The source that training reads from: a pure function of a cursor, so any host can build any rows of any batch."""

from typing import Protocol

import numpy as np


class Source(Protocol):
    """An infinite stream of examples, of which `[cursor, cursor + size)` can be asked for in any order.

    Epoch k = cursor // examples is reshuffled by (seed, k). Asking twice gives the same arrays, and asking
    for two halves gives the halves of the whole. Every batch has `id`, int32 [size]: which example it is, in
    every epoch.
    """

    examples: int
    """How many examples an epoch has."""

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Examples `[cursor, cursor + size)`, each entry with `size` rows."""
        ...
