"""Packed training rows: several short windows share a row, so hardly any of a batch is padding.

The packing is an index made once: which windows share a row never changes, only the order of the rows does (by seed
and epoch). Windows in a row do not see each other ("segment") and keep the positions they would have alone.
"""

import numpy as np
from jaxtyping import Float32

from jaxops.core.failures import UserError
from jaxops.data.epochs import Epochs
from jaxops.data.interactions.heldout import Split
from jaxops.data.interactions.interactions import Interactions
from jaxops.data.packing import Pack, longest_that_fits, ranges


class PackedSource:
    """A `Source` of rows of `length`, filled with windows of users' training events; a row is an example.

    A user's transitions are cut into windows of `length` from the end, so the first window is the short one; every
    transition is a target exactly once an epoch. Batches: {"id" [B] int32 row, "items" and "targets" [B, L] int32,
    "weight" [B, L] float32 (of the target's event, by `weights`: 1 without), "segment" [B, L] int32 (1, 2, ... within
    the row, 0 where nothing is), "position" [B, L] int32 (as if the window stood alone, padded on the left)}; with
    `event_rows` also `Interactions.event_rows` of the items, [B, L]. `pack` chooses which windows share a row.

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
        pack: Pack = longest_that_fits,
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
        window = self._windows[ranges(self._first[rows], held)]
        width = self._width[window]
        segment = ranges(np.ones(size, np.int64), held)
        # where each window begins in its row: the widths before it, less those of earlier rows
        before = np.cumsum(width) - width
        first_of_row = np.cumsum(held) - held
        start = np.repeat(np.arange(size) * self.length, held) + before - np.repeat(before[first_of_row], held)
        place = ranges(start, width)
        event = ranges(self._begin[window], width)
        out = {name: np.zeros(size * self.length, np.int32) for name in ("items", "targets", "segment", "position")}
        out["items"][place] = self._items[event]
        out["targets"][place] = self._items[event + 1]
        out["segment"][place] = np.repeat(segment, width)
        out["position"][place] = ranges(self.length - width, width)
        shaped = {name: values.reshape(size, self.length) for name, values in out.items()}
        if self._event_rows:
            at = np.full(size * self.length, -1)
            at[place] = event
            shaped |= self._inter.event_rows(at.reshape(size, self.length))
        weight = (shaped["segment"] > 0).astype(np.float32)
        if self._weights is not None:
            weight.reshape(-1)[place] = self._weights[event + 1]
        return {"id": rows, **shaped, "weight": weight}
