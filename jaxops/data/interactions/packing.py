"""Packed training rows: several short windows share a row, so hardly any of a batch is padding.

The packing is an index made once: which windows share a row never changes, only the order of the rows does (by seed
and epoch). Windows in a row do not see each other ("segment") and keep the positions they would have alone.
"""

import numpy as np
from jaxtyping import Float32, Int64

from jaxops.core.failures import UserError
from jaxops.data.epochs import Epochs
from jaxops.data.interactions.heldout import Split
from jaxops.data.interactions.interactions import Interactions


class PackedSource:
    """A `Source` of rows of `length`, filled with windows of users' training events; a row is an example.

    A user's transitions are cut into windows of `length` from the end, so the first window is the short one; every
    transition is a target exactly once an epoch. Batches: {"id" [B] int32 row, "items" and "targets" [B, L] int32,
    "weight" [B, L] float32 (of the target's event, by `weights`: 1 without), "segment" [B, L] int32 (1, 2, ... within
    the row, 0 where nothing is), "position" [B, L] int32 (as if the window stood alone, padded on the left)}; with
    `event_rows` also `Interactions.event_rows` of the items, [B, L].

    Raises:
      UserError: nobody has two training events.
    """

    def __init__(
        self,
        inter: Interactions,
        split: Split,
        length: int,
        seed: int,
        event_rows: bool = False,
        weights: Float32[np.ndarray, " events"] | None = None,
    ) -> None:
        users = np.flatnonzero(split.train_end >= 2)
        if not len(users):
            raise UserError("nobody has two training events, so there is no next item to learn from")
        self.length, self.seed = length, seed
        self._inter, self._items, self._event_rows, self._weights = inter, inter.item, event_rows, weights
        transitions = split.train_end[users] - 1
        count = -(-transitions // length)
        number = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        end = np.repeat(transitions, count) - number * length
        begin = np.maximum(end - length, 0)
        self._begin = np.repeat(inter.offsets[users], count) + begin
        self._width = end - begin
        self._windows, self._first = pack(self._width, length, seed)
        self.examples = len(self._first) - 1
        self._epochs = Epochs(self.examples, seed)

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Rows `[cursor, cursor + size)` of the endless stream of epochs; see the class for what is in it."""
        rows = self._epochs.ids(cursor, size)
        held = self._first[rows + 1] - self._first[rows]
        window = self._windows[_ranges(self._first[rows], held)]
        width = self._width[window]
        segment = _ranges(np.ones(size, np.int64), held)
        # where each window begins in its row: the widths before it, less those of earlier rows
        before = np.cumsum(width) - width
        first_of_row = np.cumsum(held) - held
        start = np.repeat(np.arange(size) * self.length, held) + before - np.repeat(before[first_of_row], held)
        place = _ranges(start, width)
        event = _ranges(self._begin[window], width)
        out = {name: np.zeros(size * self.length, np.int32) for name in ("items", "targets", "segment", "position")}
        out["items"][place] = self._items[event]
        out["targets"][place] = self._items[event + 1]
        out["segment"][place] = np.repeat(segment, width)
        out["position"][place] = _ranges(self.length - width, width)
        shaped = {name: values.reshape(size, self.length) for name, values in out.items()}
        if self._event_rows:
            at = np.full(size * self.length, -1)
            at[place] = event
            shaped |= self._inter.event_rows(at.reshape(size, self.length))
        weight = (shaped["segment"] > 0).astype(np.float32)
        if self._weights is not None:
            weight.reshape(-1)[place] = self._weights[event + 1]
        return {"id": rows, **shaped, "weight": weight}


def pack(
    width: Int64[np.ndarray, " windows"], length: int, seed: int
) -> tuple[Int64[np.ndarray, " windows"], Int64[np.ndarray, " rows_and_one"]]:
    """Chooses which windows share a row; returns the windows in order of rows, and where each row begins among them.

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


def _ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns start[0], start[0] + 1, ... (count[0] of them), start[1], ..."""
    offset = np.cumsum(count) - count
    return np.arange(int(count.sum())) + np.repeat(start - offset, count)
