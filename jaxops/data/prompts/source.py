"""Batches of prompts for training: a pure function of the prompts, the seed and a cursor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from jaxops.data.epochs import Epochs
from jaxops.data.packing import ranges
from jaxops.data.prompts.formats import AskedPrompt


class Prompts:
    """A `Source` of prompts, shuffled anew every epoch, whose examples know their text and the columns of their row.

    Args:
      rows: the prompts as they were written.
      tokens: the tokens of all prompts, one after the other.
      offsets: where each prompt begins among the tokens, and where the last one ends.
      width: the places of a row of a batch, at least the length of the longest prompt.
      seed: draws the order of each epoch.
      fill: the id where no token is. What is padding is told by `length`, never by this id.

    Attributes:
      examples: how many prompts there are.
      width: the places of a row of a batch.
    """

    def __init__(
        self,
        rows: Sequence[AskedPrompt],
        tokens: Int32[np.ndarray, " tokens"],
        offsets: Int64[np.ndarray, " prompts_and_one"],
        *,
        width: int,
        seed: int,
        fill: int,
    ) -> None:
        self.examples, self.width = len(rows), width
        self._rows, self._tokens, self._offsets, self._fill = rows, tokens, offsets, fill
        self._epochs = Epochs(self.examples, seed)

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Prompts `[cursor, cursor + size)` of the endless stream of epochs.

        "id" int32 [size] is the number of the prompt, "tokens" int32 [size, width] its tokens from the left, "length"
        int32 [size] how many these are, and "weight" float32 [size] is 1.
        """
        ids = self._epochs.ids(cursor, size)
        begin = self._offsets[ids]
        length = self._offsets[ids + 1] - begin
        tokens = np.full((size, self.width), self._fill, np.int32)
        tokens[np.arange(self.width)[None] < length[:, None]] = self._tokens[ranges(begin, length)]
        return {"id": ids, "tokens": tokens, "length": length.astype(np.int32), "weight": np.ones(size, np.float32)}

    def ids_of(self, example: int) -> list[int]:
        """Returns the tokens of a prompt."""
        at = self._at(example)
        return self._tokens[self._offsets[at] : self._offsets[at + 1]].tolist()

    def text(self, example: int) -> str | list[dict[str, Any]]:
        """Returns a prompt as the user wrote it: a text, or the messages that are asked."""
        written = self._rows[self._at(example)].written
        return written if isinstance(written, str) else [dict(message) for message in written]

    def columns(self, example: int) -> dict[str, Any]:
        """Returns the other columns of a prompt's row, the same names for all prompts; None where a row has none."""
        return dict(self._rows[self._at(example)].columns)

    def where(self, example: int) -> str:
        """Returns the file and row of a prompt, for messages."""
        return self._rows[self._at(example)].where

    @property
    def lengths(self) -> Int64[np.ndarray, " prompts"]:
        """The number of tokens of each prompt."""
        return np.diff(self._offsets)

    def _at(self, example: int) -> int:
        """Refuses numbers of no prompt, such as the -1 of padding, which would count from the end."""
        if not 0 <= example < self.examples:
            raise IndexError(f"there is no prompt {example}: they are numbered from 0 to {self.examples - 1}")
        return int(example)
