"""Reads texts with the ratings of single people, and draws judgements from them: two texts and one rating of each."""

import dataclasses
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from jaxops.core.failures import UserError
from jaxops.data import notes
from jaxops.data.preferences.spec import RatingColumns, RatingData
from jaxops.data.text.formats import Example, WrongRow, parsed, shown, sort_of, text_in, value_in


@dataclasses.dataclass(frozen=True)
class Rated:
    """A text, the ratings that single people gave it, and the group of texts that it is compared with."""

    text: Example
    ratings: tuple[float, ...]
    group: str


def read_rated(config: RatingData, path: str | Sequence[str]) -> list[Rated]:
    """Reads all rated texts of the files at `path`, in order.

    Raises:
      UserError: no file, a file that is not of its format, rows that are wrong, or no row at all.
    """
    names = config.columns
    wanted = {names.text: True, names.ratings: True}
    if names.group is not None:
        wanted[names.group] = names.group != RatingColumns().group

    def parse(where: str, row: dict[str, Any]) -> Rated:
        group = "" if names.group is None else row.get(names.group)
        if names.group is not None and wanted[names.group]:
            group = value_in(row, names.group)
        return Rated(Example(where, text=text_in(row, names.text)), _ratings(row, names.ratings), str(group))

    return parsed(path, config.format, wanted, parse)


def _ratings(row: dict[str, Any], name: str) -> tuple[float, ...]:
    values = value_in(row, name)
    if not isinstance(values, list):
        raise WrongRow(f"column {name!r} is {sort_of(values)} ({shown(values)}), expected the list of single ratings")
    if not values:
        raise WrongRow(f"column {name!r} has no rating")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise WrongRow(f"column {name!r} holds {shown(value)}, expected numbers")
    return tuple(map(float, values))


def with_partners(rated: list[Rated], part: str) -> list[Rated]:
    """Returns the texts that have another one in their group to be compared with; the others are told.

    Raises:
      UserError: there is none.
    """
    sizes: dict[str, int] = {}
    for one in rated:
        sizes[one.group] = sizes.get(one.group, 0) + 1
    alone = [one for one in rated if sizes[one.group] < 2]
    if alone:
        where = alone[0].text.where
        notes.tell(f"{part}: {len(alone)} texts are the only ones of their group and are left out, the first {where}")
    kept = [one for one in rated if sizes[one.group] > 1]
    if not kept:
        raise UserError(
            f"{part}: no two of the {len(rated)} texts are of one group, so none are compared; see data.columns.group"
        )
    return kept


class Draws(NamedTuple):
    """Judgements: numbers of the first and the second text, and the places of their ratings among all ratings."""

    first: Int64[np.ndarray, " pairs"]
    second: Int64[np.ndarray, " pairs"]
    first_rating: Int64[np.ndarray, " pairs"]
    second_rating: Int64[np.ndarray, " pairs"]


class Ratings:
    """The ratings of all texts, and judgements drawn from them: a pure function of (seed, epoch).

    In an epoch each text is the first of one pair and the second of one other, of its own group.

    Args:
      rated: the texts; each group has two or more.
    """

    def __init__(self, rated: Sequence[Rated]) -> None:
        names = {name: at for at, name in enumerate(sorted({one.group for one in rated}))}
        self._group = np.array([names[one.group] for one in rated])
        self.offsets = np.cumsum([0, *(len(one.ratings) for one in rated)], dtype=np.int64)
        self.values = np.array([value for one in rated for value in one.ratings], np.float64)
        self._kept: dict[tuple[int, int], Draws] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._group)

    def drawn(self, seed: int, epoch: int) -> Draws:
        """Returns the judgements of an epoch, in a random order; the last two epochs are kept."""
        with self._lock:
            if (seed, epoch) not in self._kept:
                for old in list(self._kept)[:-1]:
                    del self._kept[old]
                self._kept[seed, epoch] = self._draw(seed, epoch)
            return self._kept[seed, epoch]

    def _draw(self, seed: int, epoch: int) -> Draws:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
        shuffled = generator.permutation(len(self))
        shuffled = shuffled[np.argsort(self._group[shuffled], kind="stable")]
        group = self._group[shuffled]
        # the next one of the group, and after the last one its first
        begins = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
        following = np.arange(1, len(self) + 1)
        following[np.append(begins[1:], len(self)) - 1] = begins
        order = generator.permutation(len(self))
        first, second = shuffled[order], shuffled[following[order]]
        pick = lambda text: self.offsets[text] + (generator.random(len(text)) * self._counts(text)).astype(np.int64)
        return Draws(first, second, pick(first), pick(second))

    def _counts(self, text: Int64[np.ndarray, " texts"]) -> Int64[np.ndarray, " texts"]:
        return self.offsets[text + 1] - self.offsets[text]

    def single(self, drawn: Draws) -> Float64[np.ndarray, " pairs"]:
        """Returns the labels by one rating of each text: 1 where the first is rated higher, 0.5 where it is a tie."""
        return 0.5 + 0.5 * np.sign(self.values[drawn.first_rating] - self.values[drawn.second_rating])

    def shares(self, drawn: Draws) -> Float64[np.ndarray, " pairs"]:
        """Returns the labels by all pairs of ratings: the share in which the first is higher, ties counted half."""
        return np.array([self._share(a, b) for a, b in zip(drawn.first, drawn.second, strict=True)], np.float64)

    def _share(self, first: int, second: int) -> float:
        a = self.values[self.offsets[first] : self.offsets[first + 1]]
        b = np.sort(self.values[self.offsets[second] : self.offsets[second + 1]])
        below = np.searchsorted(b, a, "left") + np.searchsorted(b, a, "right")
        return float(below.mean() / (2 * len(b)))

    def others(self, drawn: Draws) -> Float64[np.ndarray, "pairs two"]:
        """Returns the mean rating of each text by all but the person who judged; NaN where nobody else did."""
        found = []
        for text, place in ((drawn.first, drawn.first_rating), (drawn.second, drawn.second_rating)):
            total = np.add.reduceat(self.values, self.offsets[:-1])[text] - self.values[place]
            count = self._counts(text) - 1
            found.append(np.divide(total, count, out=np.full(len(text), np.nan), where=count > 0))
        return np.stack(found, axis=1)

    def again(self, drawn: Draws, seed: int) -> Draws:
        """Returns the same pairs as other people judged them; a text with one rating keeps it."""
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed])))

        def other(text: Int64[np.ndarray, " pairs"], place: Int64[np.ndarray, " pairs"]) -> Int64[np.ndarray, " pairs"]:
            count, begin = self._counts(text), self.offsets[text]
            step = 1 + (generator.random(len(text)) * np.maximum(count - 1, 1)).astype(np.int64)
            return begin + (place - begin + step) % count

        return Draws(
            drawn.first,
            drawn.second,
            other(drawn.first, drawn.first_rating),
            other(drawn.second, drawn.second_rating),
        )
