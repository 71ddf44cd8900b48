"""Pairs of texts for training and evaluation: pure functions of the texts, the seed and a cursor."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int, Int64

from jaxops.data.epochs import Epochs
from jaxops.data.packing import ranges
from jaxops.data.preferences.ratings import Draws, Ratings
from jaxops.data.preferences.spec import TooLong
from jaxops.data.text.documents import Documents

PART_ROW = "part/row"
"""The entry of evaluation batches that holds the row among those of the part, -1 for padding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Tokenised texts, each cut to a row of `length` tokens; `fill` is the id where nothing is.

    `begin` and `width` say which tokens of the documents a text keeps.
    """

    documents: Documents
    begin: Int64[np.ndarray, " texts"]
    width: Int64[np.ndarray, " texts"]
    length: int
    fill: int

    @staticmethod
    def cut(documents: Documents, length: int, too_long: TooLong, fill: int) -> "Texts":
        """Cuts each document to `length` tokens, at its end or (`cut_start`) at its beginning."""
        begin, size = documents.offsets[:-1], np.diff(documents.offsets)
        over = np.maximum(size - length, 0)
        return Texts(documents, begin + over * (too_long == "cut_start"), size - over, length, fill)

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def answered(self) -> Int64[np.ndarray, " texts"]:
        """The number of tokens of each text's answer that it keeps."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.documents.trained, dtype=np.int64)])
        return before[self.begin + self.width] - before[self.begin]

    @property
    def targets(self) -> Int64[np.ndarray, " texts"]:
        """The number of tokens of each text that are learnt from, which the mask of its row has."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.documents.trained, dtype=np.int64)])
        return before[self.begin + self.width] - before[self.begin + np.minimum(self.width, 1)]

    def of(self, text: int) -> np.ndarray:
        """Returns the ids of one text."""
        return self.documents.tokens[self.begin[text] : self.begin[text] + self.width[text]]

    def rows(self, texts: Int[np.ndarray, "*shape"]) -> dict[str, np.ndarray]:
        """Returns arrays of [*shape, length] for the texts of these numbers.

        They are "tokens" and "targets" int32 (the next token), "mask" float32 (1 where the target is of the answer),
        "segment" int32 (1 for tokens, 0 for padding) and "position" int32. Padding is told by lengths, never by an id.
        """
        flat = texts.reshape(-1)
        width, begin = self.width[flat], self.begin[flat]
        starts = np.arange(len(flat)) * self.length
        out = {name: np.full(len(flat) * self.length, self.fill, np.int32) for name in ("tokens", "targets")}
        out["mask"] = np.zeros(len(flat) * self.length, np.float32)
        out |= {name: np.zeros(len(flat) * self.length, np.int32) for name in ("segment", "position")}
        place, token = ranges(starts, width), ranges(begin, width)
        out["tokens"][place] = self.documents.tokens[token]
        out["segment"][place] = 1
        out["position"][place] = ranges(np.zeros(len(flat), np.int64), width)
        behind = np.maximum(width - 1, 0)
        place, token = ranges(starts, behind), ranges(begin + 1, behind)
        out["targets"][place] = self.documents.tokens[token]
        out["mask"][place] = self.documents.trained[token]
        return {name: values.reshape(*texts.shape, self.length) for name, values in out.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class FeaturedTexts(Texts):
    """Texts beside the `features` that a frozen model has of each; rows hold them as "features" [*shape, dim]."""

    features: Float32[np.ndarray, "texts dim"]

    def rows(self, texts: Int[np.ndarray, "*shape"]) -> dict[str, np.ndarray]:
        """Returns what `Texts.rows` does, and "features" float32 [*shape, dim]."""
        return super().rows(texts) | {"features": np.asarray(self.features[texts])}


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Judgements of pairs of texts.

    Attributes:
      texts: the texts.
      sides: the numbers of the two texts of each pair; of preferences the chosen one is the first.
      weight: how much each counts.
      label: the probability that the first is better.
      margin: by how much the first is better; None where nothing says.
      clusters: two judgements that share one of these numbers are not independent: those of the texts, or the prompt's.
      annotators: who judged each, or None.
    """

    texts: Texts
    sides: Int64[np.ndarray, "pairs two"]
    weight: Float32[np.ndarray, " pairs"]
    label: Float32[np.ndarray, " pairs"]
    margin: Float32[np.ndarray, " pairs"] | None
    clusters: Int64[np.ndarray, "pairs two"]
    annotators: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.sides)

    def batch(self, rows: Int[np.ndarray, " rows"]) -> dict[str, np.ndarray]:
        """Returns the pairs of these numbers.

        They are "id" int32 [B], the number of the pair, "weight" and "label" float32 [B], "margin" float32 [B] where
        there are margins, and of shape [B, 2, length] what `Texts.rows` has.
        """
        margin = {} if self.margin is None else {"margin": self.margin[rows]}
        own = {"id": rows.astype(np.int32), "weight": self.weight[rows], "label": self.label[rows]}
        return own | margin | self.texts.rows(self.sides[rows])


class PairSource:
    """A `Source` of pairs, shuffled anew every epoch; see `Pairs.batch` for what is in a batch."""

    def __init__(self, pairs: Pairs, seed: int) -> None:
        self.pairs, self.examples, self.length = pairs, len(pairs), pairs.texts.length
        self._epochs = Epochs(self.examples, seed)

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Pairs `[cursor, cursor + size)` of the endless stream of epochs."""
        return self.pairs.batch(self._epochs.ids(cursor, size))


class RatedSource:
    """A `Source` of pairs of rated texts, drawn anew every epoch; "id" is the number of the first text.

    Args:
      texts: the texts.
      ratings: the ratings of the same texts.
      labels: the judgement is that of one rating of each text, or the share over all of them.
      seed: draws pairs and ratings.
    """

    def __init__(self, texts: Texts, ratings: Ratings, labels: Literal["single", "share"], seed: int) -> None:
        self.examples, self.length = len(ratings), texts.length
        self._texts, self._ratings, self._labels, self._seed = texts, ratings, labels, seed

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Pairs `[cursor, cursor + size)` of the endless stream of epochs.

        Raises:
          ValueError: a negative cursor, or a size below one.
        """
        if cursor < 0 or size < 1:
            raise ValueError(f"need cursor >= 0 and size >= 1: {cursor=}, {size=}")
        drawn = self._drawn(cursor, size)
        label = self._ratings.single(drawn) if self._labels == "single" else self._ratings.shares(drawn)
        own = {"id": drawn.first.astype(np.int32), "weight": np.ones(size, np.float32)}
        rows = self._texts.rows(np.stack([drawn.first, drawn.second], axis=1))
        return own | {"label": label.astype(np.float32)} | rows

    def _drawn(self, cursor: int, size: int) -> Draws:
        epochs = range(cursor // self.examples, (cursor + size - 1) // self.examples + 1)
        parts = []
        for epoch in epochs:
            begin = epoch * self.examples
            inside = slice(max(cursor - begin, 0), cursor + size - begin)
            parts.append([values[inside] for values in self._ratings.drawn(self._seed, epoch)])
        return Draws(*(np.concatenate(values) for values in zip(*parts, strict=True)))


class PairBatches:
    """Evaluation batches of all pairs, in order; the last one is padded with pairs of weight and segment 0.

    Every other pair has its sides swapped, so that a preference for the place of a text would show.
    """

    def __init__(self, pairs: Pairs, size: int) -> None:
        self._pairs, self.size = pairs, size

    def __len__(self) -> int:
        return -(-len(self._pairs) // self.size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.rows(k, 0, self.size) for k in range(len(self)))

    def rows(self, k: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Pairs `[start, stop)` of batch k alone; `PART_ROW` is the pair among all, -1 for padding."""
        at = np.arange(k * self.size + start, k * self.size + stop)
        real = at < len(self._pairs)
        pair = np.where(real, at, 0)
        sides = self._pairs.sides[pair]
        out = self._pairs.texts.rows(np.where(swapped(pair)[:, None], sides[:, ::-1], sides))
        out["segment"] = out["segment"] * real[:, None, None].astype(np.int32)
        out["mask"] = out["mask"] * real[:, None, None].astype(np.float32)
        own = {"id": pair.astype(np.int32), "weight": self._pairs.weight[pair] * real.astype(np.float32)}
        return own | out | {PART_ROW: np.where(real, at, -1).astype(np.int32)}


class SingleTextBatches:
    """Batches of all texts, in order, without pairs; the last one is padded with rows of segment 0."""

    def __init__(self, texts: Texts, size: int) -> None:
        self._texts, self.size = texts, size

    def __len__(self) -> int:
        return -(-len(self._texts) // self.size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.rows(k, 0, self.size) for k in range(len(self)))

    def rows(self, k: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Texts `[start, stop)` of batch k alone."""
        at = np.arange(k * self.size + start, k * self.size + stop)
        real = at < len(self._texts)
        out = self._texts.rows(np.where(real, at, 0))
        out["segment"] = out["segment"] * real[:, None].astype(np.int32)
        return {"id": at.astype(np.int32)} | out


def swapped(pair: Int[np.ndarray, " pairs"]) -> np.ndarray:
    """Returns which pairs are shown with their sides swapped: every other one."""
    return pair % 2 == 1
