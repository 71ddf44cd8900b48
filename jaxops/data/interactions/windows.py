"""Training examples of sequences: windows over each user's events, in an order fixed by (seed, epoch).

Every transition (an event and the one after it) is a target exactly once an epoch; where the windows begin
moves from epoch to epoch. Both are pure functions of (seed, epoch, user), so a batch is a pure function of
the cursor.
"""

import threading
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Int64

from jaxops.core.failures import UserError
from jaxops.data.draws import mixed
from jaxops.data.interactions.heldout import Split
from jaxops.data.interactions.interactions import Interactions


class SequenceSource:
    """A `Source` of windows of `length` inputs, each with the item that follows it as its target.

    A user with T transitions has W = ceil((T - length) / stride) + 1 windows (one if T <= length), `stride`
    apart. They cover `slack` = length + (W - 1) stride - T places too many, so the grid may begin anywhere in
    [-slack, 0]: with `shift` that place is drawn anew for each user and epoch, without it the last window
    ends at the last event. W does not depend on it and no window is empty. `stride` (default `length`) below
    `length` makes windows overlap, and each transition a target about length / stride times. Users with fewer
    than two training events have none.

    Batches: {"id" [B] int32 window, "items" [B, L] int32 padded with 0 on the left, "targets" [B, L] int32
    (0: none), "weight" [B, L] float32 (of the target's event, by `weights`: 1 without; 0: no target)}; with
    `event_rows` also `Interactions.event_rows` of the items, [B, L].

    Raises:
      UserError: nobody has two training events.
      ValueError: `length`, `stride` or `seed` out of range.
    """

    def __init__(
        self,
        inter: Interactions,
        split: Split,
        length: int,
        seed: int,
        stride: int | None = None,
        shift: bool = True,
        event_rows: bool = False,
        weights: Float32[np.ndarray, " events"] | None = None,
    ) -> None:
        stride = length if stride is None else stride
        if not 1 <= stride <= length or seed < 0:
            raise ValueError(f"need 1 <= stride <= length and seed >= 0: {stride=}, {length=}, {seed=}")
        users = np.flatnonzero(split.train_end >= 2)
        if not len(users):
            raise UserError("nobody has two training events, so there is no next item to learn from")
        self.length, self.seed, self.stride, self.shift = length, seed, stride, shift
        self._inter, self._items, self._event_rows, self._weights = inter, inter.item, event_rows, weights
        self._begin = inter.offsets[users]
        self._transitions = split.train_end[users] - 1
        windows = np.maximum(-(-(self._transitions - length) // stride), 0) + 1
        self._slack = length + (windows - 1) * stride - self._transitions
        self._first = np.concatenate([np.zeros(1, np.int64), np.cumsum(windows)])
        self.examples = int(self._first[-1])
        if self.examples >= 2**31:
            raise UserError(f"{self.examples} windows do not fit 32-bit ids; use a longer window or stride")
        self._user = np.repeat(np.arange(len(users), dtype=np.int32), windows)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._columns = np.arange(length, dtype=np.int32)
        self._lock = threading.Lock()

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Windows `[cursor, cursor + size)` of the stream of epochs; see the class for the entries."""
        if cursor < 0 or size < 1:
            raise ValueError(f"need cursor >= 0 and size >= 1: {cursor=}, {size=}")
        ids, ends, widths = (np.concatenate(part) for part in zip(*self._spans(cursor, size), strict=True))
        # Column c holds the event at ends - length + c; the one after the last input is the last target.
        at = (ends - self.length)[:, None] + np.arange(self.length + 1)
        events = self._items.take(at, mode="wrap")
        real = self._columns >= (self.length - widths).astype(np.int32)[:, None]
        mask = real.astype(np.int32)
        weight = real.astype(np.float32)
        if self._weights is not None:
            weight *= self._weights.take(at[:, 1:], mode="wrap")
        return {
            "id": ids,
            "items": events[:, :-1] * mask,
            "targets": events[:, 1:] * mask,
            "weight": weight,
            **(self._inter.event_rows(np.where(real, at[:, :-1], -1)) if self._event_rows else {}),
        }

    def _spans(self, cursor: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields, for each epoch in the batch, window ids, the place of the last target and the number of inputs."""
        stop = cursor + size
        while cursor < stop:
            epoch, start = divmod(cursor, self.examples)
            order, key = self._epoch(epoch)
            ids = order[start : start + stop - cursor]
            user = self._user[ids]
            grid = self._slack[user]
            if self.shift:
                grid = grid - (mixed(user, key) % (grid + 1).astype(np.uint64)).astype(np.int64)
            end = self.length - grid + (ids - self._first[user]) * self.stride
            low = np.maximum(end - self.length, 0)
            high = np.minimum(end, self._transitions[user])
            yield ids, self._begin[user] + high, high - low
            cursor += len(ids)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, Int64[np.ndarray, "1"]]:
        """The order of the windows in an epoch and its hash key; two are kept (batches straddle them)."""
        with self._lock:
            if epoch not in self._epochs:
                generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
                key = generator.integers(0, 2**64, 1, dtype=np.uint64)
                order = generator.permutation(np.arange(self.examples, dtype=np.int32))
                for old in sorted(self._epochs, key=lambda known: abs(known - epoch))[1:]:
                    del self._epochs[old]
                self._epochs[epoch] = order, key
            return self._epochs[epoch]
