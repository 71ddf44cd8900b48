"""Which segments share a row of fixed length: an index that is made once and is the same in every process.

A segment is anything that takes up to `length` places: a window of a user's events, the tokens of a document.
"""

import bisect
from collections.abc import Callable

import numpy as np
from jaxtyping import Int64

Pack = Callable[[Int64[np.ndarray, " segments"], int, int], tuple[np.ndarray, np.ndarray]]
"""Given widths, the length of a row and a seed: the segments in order of rows, and where each row begins among them."""
Held = tuple[tuple[int, int], ...]
"""What a row holds: pairs of a width and how many segments have it."""


def longest_that_fits(
    width: Int64[np.ndarray, " windows"], length: int, seed: int
) -> tuple[Int64[np.ndarray, " windows"], Int64[np.ndarray, " rows_and_one"]]:
    """Chooses which windows share a row; returns the windows in order of rows, and where each row begins among them.

    Each row is filled with the longest window that still fits, but no two of the longest that are left share one: where
    most windows are short, and of few lengths, rows stay half empty. `best_fit` fills them. Rows are decided on counts
    of lengths, not on single windows (histogram packing, Krell et al. 2021); `seed` then draws which window of a length
    goes where.
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


def best_fit(
    width: Int64[np.ndarray, " segments"], length: int, seed: int
) -> tuple[Int64[np.ndarray, " segments"], Int64[np.ndarray, " rows_and_one"]]:
    """Chooses which segments share a row; returns the segments in order of rows, and where each row begins among them.

    The widest segments come first, and each goes into the fullest row that has room for it (best fit, decreasing).
    That is decided on counts of widths, so that it is fast for millions of segments of few widths; `seed` then draws
    which segment of a width goes where.

    Args:
      width: the places that each segment takes, from 1 to `length`.
      length: the places of a row.
      seed: the seed of the draw.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 2**32 - 1])))
    shuffled = generator.permutation(len(width))
    by_width = shuffled[np.argsort(width[shuffled], kind="stable")]
    counts = np.bincount(width, minlength=length + 1)
    next_of = np.cumsum(counts) - counts
    order: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    for many, held in _rows(counts, length):
        columns = []
        for one, copies in held:
            taken = by_width[next_of[one] : next_of[one] + many * copies]
            columns.append(taken.reshape(many, copies))
            next_of[one] += many * copies
        rows = np.concatenate(columns, axis=1)
        order.append(rows.reshape(-1))
        sizes.append(np.full(many, rows.shape[1]))
    return np.concatenate(order), np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(sizes))])


def _rows(counts: np.ndarray, length: int) -> list[tuple[int, Held]]:
    """Returns kinds of rows and how many there are of each, for so many segments of each width."""
    open_rows: dict[int, list[tuple[int, Held]]] = {length: []}  # by the room that is left
    rooms: list[int] = []  # those that have rows, ascending

    def put(room: int, many: int, held: Held) -> None:
        if not open_rows.setdefault(room, []):
            bisect.insort(rooms, room)
        open_rows[room].append((many, held))

    for one in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[one])
        while left:
            at = bisect.bisect_left(rooms, one)
            if at == len(rooms):
                # no row has room: new ones, each with as many as it takes
                copies = min(length // one, left)
                many = left // copies
                put(length - one * copies, many, ((one, copies),))
                left -= many * copies
                continue
            room = rooms[at]
            many, held = open_rows[room].pop()
            if not open_rows[room]:
                del rooms[at]
            copies = min(room // one, left)
            filled = min(many, left // copies)
            put(room - one * copies, filled, (*held, (one, copies)))
            if many > filled:
                put(room, many - filled, held)
            left -= filled * copies
    return [group for room in sorted(open_rows) for group in open_rows[room]]


def ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns start[0], start[0] + 1, ... (count[0] of them), start[1], ... in one array."""
    offset = np.cumsum(count) - count
    return np.arange(int(count.sum())) + np.repeat(start - offset, count)
