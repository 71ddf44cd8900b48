"""Ranges of users whose events fit into one chunk."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64


def user_ranges(offsets: Int64[np.ndarray, " users_and_one"], events: int) -> Iterator[tuple[int, int]]:
    """Yields consecutive ranges of users that hold at most `events` events each (or are one user)."""
    start, users = 0, len(offsets) - 1
    while start < users:
        stop = int(np.searchsorted(offsets, offsets[start] + events, side="right")) - 1
        stop = min(max(stop, start + 1), users)
        yield start, stop
        start = stop
