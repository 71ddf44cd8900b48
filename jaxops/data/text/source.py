"""Rows of tokens for training and evaluation: a pure function of the documents, the seed and a cursor."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from jaxops.core.failures import UserError
from jaxops.data import notes
from jaxops.data.epochs import Epochs
from jaxops.data.packing import best_fit, ranges
from jaxops.data.text.documents import Documents
from jaxops.data.text.spec import TooLong

PART_ROW = "part/row"
"""The entry of evaluation batches that holds the row among those of the part, -1 for padding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
    """Pieces of documents that fit a row: token `begin + j` predicts token `begin + j + 1`, for j below `width`.

    `learnt` counts the predictions that are learnt from.
    """

    begin: Int64[np.ndarray, " segments"]
    width: Int64[np.ndarray, " segments"]
    learnt: Int64[np.ndarray, " segments"]

    def __len__(self) -> int:
        return len(self.begin)


def fit(documents: Documents, length: int, too_long: TooLong, part: str = "") -> Segments:
    """Cuts documents into segments of at most `length` predictions, and says what is lost by it.

    Segments in which nothing is learnt from are left out.

    Args:
      documents: the documents.
      length: the length of a row.
      too_long: what happens to documents that are longer.
      part: names the documents in messages (`train`).

    Raises:
      UserError: nothing is left.
    """
    begin, end = documents.offsets[:-1], documents.offsets[1:]
    size = end - begin - 1
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(documents.trained, dtype=np.int64)])
    if too_long == "split":
        count = np.maximum(-(-size // length), 0)
        start = np.repeat(begin, count) + ranges(np.zeros(len(count), np.int64), count) * length
        width = np.minimum(np.repeat(end, count) - 1 - start, length)
    else:
        start = np.where(size > length, end - 1 - length, begin) if too_long == "cut_start" else begin
        width = np.where(size > length, 0 if too_long == "drop" else length, np.maximum(size, 0))
    # tokens to learn from behind the first of each piece, which nothing predicts
    among = lambda first, last: before[last] - before[np.minimum(first + 1, last)]
    learnt = np.where(width > 0, among(start, np.minimum(start + width + 1, len(documents.tokens))), 0)
    kept = learnt > 0
    cut, total = int((size > length).sum()), int(among(begin, end).sum())
    name = f"{part}: " if part else ""
    if too_long != "split" and cut:
        side = {"cut_end": "lose their end", "cut_start": "lose their beginning", "drop": "are left out"}[too_long]
        notes.tell(
            f"{name}{cut} of {len(documents)} examples are longer than data.length {length} and {side}: "
            f"{total - int(learnt.sum())} of {total} tokens to learn from are lost"
        )
    pieces = count if too_long == "split" else np.ones(len(documents), np.int64)
    among_pieces = lambda flags: np.bincount(np.repeat(np.arange(len(pieces)), pieces)[flags], minlength=len(pieces))
    # a prompt may fill pieces of an example of which others are learnt from
    empty = int(((among_pieces(width > 0) > 0) & (among_pieces(kept) == 0)).sum())
    if empty:
        notes.tell(f"{name}{empty} example(s) have nothing left to learn from and are left out")
    if not kept.any():
        raise UserError(
            f"{name}no example has anything to learn from within data.length {length}; the longest has "
            f"{int(size.max(initial=0)) + 1} tokens. Raise data.length, or see data.too_long"
        )
    return Segments(start[kept], width[kept], learnt[kept])


def whole(documents: Documents, length: int) -> Segments:
    """Returns one segment for each document, in order: its first `length` predictions, also where it has none."""
    begin, end = documents.offsets[:-1], documents.offsets[1:]
    width = np.clip(end - begin - 1, 0, length)
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(documents.trained, dtype=np.int64)])
    first = np.minimum(begin + 1, end)
    return Segments(begin, width, before[first + width] - before[first])


class TextRows:
    """Rows of `length` out of segments, packed or one segment a row; an index that is the same in every process.

    Args:
      documents: the documents.
      segments: the pieces of them (`fit`).
      length: the length of a row.
      packed: several segments may share a row.
      seed: draws which segments share a row.
      fill: the id where nothing is. What is padding is told by `segment`, never by this id.
    """

    def __init__(
        self, documents: Documents, segments: Segments, length: int, *, packed: bool, seed: int, fill: int
    ) -> None:
        self._documents, self._segments, self.length, self._fill = documents, segments, length, fill
        if packed:
            self._order, self._first = best_fit(segments.width, length, seed)
        else:
            self._order, self._first = np.arange(len(segments)), np.arange(len(segments) + 1)

    def __len__(self) -> int:
        return len(self._first) - 1

    @property
    def filled(self) -> float:
        """The fraction of all places of the rows that hold a token."""
        return float(self._segments.width.sum() / (len(self) * self.length))

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the rows of these numbers.

        "id" int32 [B] is the number of the row and "weight" float32 [B] is 1. Of shape [B, length] are "tokens" int32,
        "targets" int32 (the next token of the same segment), "mask" float32 (1 where the target is learnt from),
        "segment" int32 (1, 2, ... within the row, 0 where nothing is) and "position" int32 (within the segment).
        """
        size = len(rows)
        held = self._first[rows + 1] - self._first[rows]
        segment = self._order[ranges(self._first[rows], held)]
        width = self._segments.width[segment]
        # a segment begins in its row after the widths of those before it
        before = np.cumsum(width) - width
        first_of_row = np.cumsum(held) - held
        start = np.repeat(np.arange(size) * self.length, held) + before - np.repeat(before[first_of_row], held)
        place = ranges(start, width)
        token = ranges(self._segments.begin[segment], width)
        shape = size * self.length
        out = {name: np.full(shape, self._fill, np.int32) for name in ("tokens", "targets")}
        out |= {"mask": np.zeros(shape, np.float32)}
        out |= {name: np.zeros(shape, np.int32) for name in ("segment", "position")}
        out["tokens"][place] = self._documents.tokens[token]
        out["targets"][place] = self._documents.tokens[token + 1]
        out["mask"][place] = self._documents.trained[token + 1]
        out["segment"][place] = np.repeat(ranges(np.ones(size, np.int64), held), width)
        out["position"][place] = ranges(np.zeros(len(width), np.int64), width)
        shaped = {name: values.reshape(size, self.length) for name, values in out.items()}
        return {"id": rows.astype(np.int32), "weight": np.ones(size, np.float32), **shaped}


class TextSource:
    """A `Source` of rows of tokens, shuffled anew every epoch; see `TextRows.batch` for what is in a batch."""

    def __init__(self, rows: TextRows, seed: int) -> None:
        self.rows, self.examples, self.length = rows, len(rows), rows.length
        self._epochs = Epochs(self.examples, seed)

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Rows `[cursor, cursor + size)` of the endless stream of epochs."""
        return self.rows.batch(self._epochs.ids(cursor, size))


class TextBatches:
    """Evaluation batches of all rows, in order; the last one is padded with rows of weight, mask and segment 0."""

    def __init__(self, rows: TextRows, size: int) -> None:
        self._all, self.size = rows, size

    def __len__(self) -> int:
        return -(-len(self._all) // self.size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.rows(k, 0, self.size) for k in range(len(self)))

    def rows(self, k: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows `[start, stop)` of batch k alone; `PART_ROW` is the row among all, -1 for padding."""
        at = np.arange(k * self.size + start, k * self.size + stop)
        real = at < len(self._all)
        out = self._all.batch(np.where(real, at, 0))
        out["weight"] = real.astype(np.float32)
        out["mask"] = out["mask"] * real[:, None].astype(np.float32)
        out["segment"] = out["segment"] * real[:, None].astype(np.int32)
        out[PART_ROW] = np.where(real, at, -1).astype(np.int32)
        return out
