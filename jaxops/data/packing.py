"""Which windows share a row of fixed length: an index that is made once and is the same in every process."""

import numpy as np
from jaxtyping import Int64


def pack(
    width: Int64[np.ndarray, " windows"], length: int, seed: int
) -> tuple[Int64[np.ndarray, " windows"], Int64[np.ndarray, " rows_and_one"]]:
    """Chooses which windows share a row; returns the windows in order of rows, and where each row begins among them.

    A window is anything that takes up to `length` places: events of a user, tokens of a document.

    Each row is filled with the longest window that still fits. That is decided on counts of lengths, not on single
    windows (histogram packing, Krell et al. 2021); `seed` then draws which window of a length goes where.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 2**32 - 1])))
    shuffled = generator.permutation(len(width))
    by_width = shuffled[np.argsort(width[shuffled], kind="stable")]
    counts = np.bincount(width, minlength=length + 1)
    next_of = np.cumsum(counts) - counts
    left = counts.copy()
    rows: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    for widest in range(length, 0, -1):
        groups: list[tuple[int, int, tuple[int, ...]]] = [(int(left[widest]), length - widest, (widest,))]
        left[widest] = 0
        while groups:
            many, room, held = groups.pop()
            fits = np.flatnonzero(left[1 : room + 1]) + 1
            if many and len(fits):
                best = int(fits[-1])
                take = min(many, int(left[best]))
                left[best] -= take
                groups += [(many - take, room, held), (take, room - best, (*held, best))]
            elif many:
                columns = []
                for one in held:
                    columns.append(by_width[next_of[one] : next_of[one] + many])
                    next_of[one] += many
                rows.append(np.stack(columns, axis=1).reshape(-1))
                sizes.append(np.full(many, len(held)))
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(sizes))])
    return np.concatenate(rows), first


def ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns start[0], start[0] + 1, ... (count[0] of them), start[1], ... in one array."""
    offset = np.cumsum(count) - count
    return np.arange(int(count.sum())) + np.repeat(start - offset, count)
