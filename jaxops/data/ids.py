"""Original ids and their rows: rows are handed out in sorted order of the ids, never in order of arrival.

Integers sort numerically, strings by their UTF-8 bytes. Ids are kept as int64 or fixed-width bytes, both of which can
be memory-mapped.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int32, Int64

from jaxops.core.failures import UserError
from jaxops.data.values import EXACT

LONGEST = 1000
"""The most bytes of an id; a longer one is surely a text column that was named by mistake."""

WHOLE = r"^\s*(?P<number>-?(?:0|[1-9][0-9]*))(?:\.0+)?\s*$"
"""The forms of an integer that are read as one: `11`, ` 11`, `11.0`; `011` is text."""
SAFE = r"^-?(0|[1-9][0-9]{0,17}|[1-8][0-9]{18})$"
"""The digits of integers that fit int64 for certain: a column of text beyond them stays text."""
LARGEST = (str(2**63 - 1), str(2**63))
"""The digits of the largest int64, and of the smallest."""


@dataclasses.dataclass(frozen=True, eq=False)
class Ids:
    """Translates between rows and original ids: row `first + i` is `values[i]`, and `values` is sorted."""

    values: np.ndarray
    first: int

    @staticmethod
    def of(values: np.ndarray, first: int) -> "Ids":
        """Returns the ids of sorted integers, bytes or text."""
        return Ids(values if values.dtype.kind in "iS" else np.char.encode(values.astype(str), "utf-8"), first)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def kind(self) -> str:
        """The kind of the ids: `integer` or `string`."""
        return "integer" if self.values.dtype.kind == "i" else "string"

    def originals(self, rows: Any) -> np.ndarray:
        """Returns the original ids of `rows`, of any shape, as int64 or numpy strings.

        Raises:
          IndexError: a row that does not exist (the padding row 0 of items among them).
        """
        index = np.asarray(rows, np.int64) - self.first
        if index.size and (index.min() < 0 or index.max() >= len(self.values)):
            raise IndexError(f"rows run from {self.first} to {self.first + len(self.values) - 1}")
        found = np.asarray(self.values[index])
        return found if found.dtype.kind == "i" else np.char.decode(found, "utf-8")

    def rows(self, originals: Any) -> Int32[np.ndarray, " ids"]:
        """Returns the row of each original id, -1 where it is unknown.

        Integers find text of the same digits and the other way round; text is looked up as it is, and then as the
        integer that it spells.
        """
        given = np.asarray(originals)
        if self.values.dtype.kind == "i":
            wanted, known = _as_integers(given)
            return self._found(wanted, known)
        if given.dtype.kind == "f":
            wanted, known = _as_integers(given)
            return np.where(known, self.rows(wanted), -1).astype(np.int32)
        found = self._found(*self._as_bytes(given.astype(str)))
        if given.dtype.kind not in "iu" and (found < 0).any():
            text, whole = _spelled(pa.array(given.astype(str).ravel()))
            spelled = text.to_numpy(zero_copy_only=False).astype(str).reshape(given.shape)
            known = whole.reshape(given.shape) & (found < 0)
            found = np.where(known, self._found(*self._as_bytes(spelled)), found)
        return found

    def _as_bytes(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns text as the type of `values`, and where it fits; searchsorted would else widen the whole table."""
        encoded = np.char.encode(text, "utf-8")
        return encoded.astype(self.values.dtype), np.char.str_len(encoded) <= self.values.dtype.itemsize

    def _found(self, wanted: np.ndarray, known: np.ndarray) -> Int32[np.ndarray, " ids"]:
        at = np.minimum(np.searchsorted(self.values, wanted), len(self.values) - 1)
        return np.where(known & (self.values[at] == wanted), at + self.first, -1).astype(np.int32)

    def positions(self, originals: pa.Array) -> Int64[np.ndarray, " ids"]:
        """Returns what `rows` does for an Arrow array; -1 for null too."""
        found = np.full(len(originals), -1, np.int64)
        there = np.asarray(originals.is_valid())
        if there.any() and len(self):
            found[there] = self.rows(originals.drop_null().to_numpy(zero_copy_only=False))
        return found

    @functools.cached_property
    def table(self) -> pa.Array:
        """The original ids in order of their rows, as an Arrow array of int64 or strings."""
        values = pa.array(np.asarray(self.values))
        return values if self.kind == "integer" else pc.cast(values, pa.string())


def _as_integers(originals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns int64, and where there is one: for text that spells one, whole floats, unsigned numbers that fit."""
    kind = originals.dtype.kind
    if kind == "i":
        return originals.astype(np.int64), np.ones(originals.shape, bool)
    if kind == "u":
        fits = originals <= np.uint64(2**63 - 1)
        return np.where(fits, originals, 0).astype(np.int64), fits
    if kind == "f":
        whole = (np.abs(originals) < EXACT) & (np.trunc(originals) == originals)
        return np.where(whole, originals, 0).astype(np.int64), whole
    text, whole = _spelled(pa.array(originals.astype(str).ravel()))
    proper = whole & _fits_int64(text)
    numbers = pc.cast(pc.if_else(pa.array(proper), text, "0"), pa.int64()).to_numpy(zero_copy_only=False)
    return numbers.reshape(originals.shape), proper.reshape(originals.shape)


def _spelled(text: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Returns the digits of the integer that each text spells (else the text), and where it spells one."""
    whole = pc.match_substring_regex(text, WHOLE)
    digits = pc.struct_field(pc.extract_regex(text, WHOLE), "number")
    digits = pc.if_else(pc.equal(digits, "-0"), "0", digits)
    return pc.if_else(whole, digits, text), whole.to_numpy(zero_copy_only=False).astype(bool)


def spelled_integers(text: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Returns the digits of the integer that each text spells (`11.0`: `11`; or the text), and where it fits int64."""
    digits, whole = _spelled(text)
    return digits, whole & _fits_int64(digits)


def _fits_int64(digits: pa.Array) -> np.ndarray:
    """Returns true where an integer, given by its digits, fits int64."""
    length = pc.utf8_length(pc.utf8_ltrim(digits, "-"))
    negative = pc.starts_with(digits, "-")
    small = pc.if_else(
        negative, pc.less_equal(pc.utf8_ltrim(digits, "-"), LARGEST[1]), pc.less_equal(digits, LARGEST[0])
    )
    fits = pc.or_(pc.less(length, 19), pc.and_(pc.equal(length, 19), small))
    return fits.to_numpy(zero_copy_only=False).astype(bool)


class IdCollector:
    """Hands out provisional codes in order of arrival; `finish` turns them into sorted rows.

    With `text` the format cannot tell integers from strings (CSV), so the ids are integers if all of them read so.
    Every unique id is in memory, with the row where it came first, and nothing else of the data.
    """

    def __init__(self, what: str, text: bool) -> None:
        self.what = what
        self.text = text
        self._codes: dict[Any, int] = {}
        self._seen_in: dict[str, str] = {}
        self._parts: list[tuple[int, str, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, values: pa.Array, where: str, rows: np.ndarray | None = None) -> Int32[np.ndarray, " rows"]:
        """Returns the codes of a batch of int64 or strings, -1 for null; `where` (a file) and `rows` are for errors."""
        if not pa.types.is_null(values.type) and values.null_count < len(values):
            self._seen_in.setdefault(str(values.type), where)
        encoded = values.dictionary_encode()
        indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        if pa.types.is_string(encoded.dictionary.type):  # at once: a column of long texts would be read to its end
            _refuse_long(encoded.dictionary, self.what, f"{where}: ")
        codes, before = self._codes, len(self._codes)
        unique = (codes.setdefault(value, len(codes)) for value in encoded.dictionary.to_pylist())
        lookup = np.append(np.fromiter(unique, np.int32, len(encoded.dictionary)), np.int32(-1))
        if len(codes) > before:
            first = np.zeros(len(lookup), np.int64)
            first[indices[::-1]] = np.arange(len(indices))[::-1]
            fresh = first[:-1][lookup[:-1] >= before]
            self._parts.append((before, where, fresh + 1 if rows is None else rows[fresh]))
        return lookup[indices]

    def origin(self, code: int) -> str:
        """Names the file and the row in which a code came first."""
        start, where, rows = next(part for part in reversed(self._parts) if part[0] <= code)
        return f"{where}: row {rows[code - start]}"

    @functools.cached_property
    def _settled(self) -> "Settled":
        if len(self._seen_in) > 1:
            self._refuse_mixed()
        return settle(list(self._codes), self.text or len(self._seen_in) > 1, self.what, self.origin)

    def _refuse_mixed(self) -> None:
        """Refuses text beside integers, unless it is their digits: it is a mistake in one of the files."""
        for value, code in self._codes.items():
            if isinstance(value, str) and not _spelled(pa.array([value]))[1][0]:
                (one, here), (other, there) = self._seen_in.items()
                raise UserError(
                    f"{self.what} ids are of different types: {one} in {here} but {other} in {there}"
                    f" ({value[:80]!r} in {self.origin(code)}); write them as one type in all files"
                )

    def values(self) -> np.ndarray:
        """Returns the id of each code, in order of the codes, as int64 or bytes."""
        settled = self._settled
        return settled.values[settled.index]

    def one_each(self) -> Int32[np.ndarray, " codes"] | None:
        """Returns the first code of each code's id; None where no two codes are of one id (`11` and `11.0`)."""
        index = self._settled.index
        if len(self._settled.values) == len(index):
            return None
        first = np.full(len(self._settled.values), len(index), np.int64)
        np.minimum.at(first, index, np.arange(len(index)))
        return first[index].astype(np.int32)

    def finish(self, keep: Bool[np.ndarray, " codes"], first: int) -> tuple[Ids, Int32[np.ndarray, " codes"]]:
        """Returns the kept ids, and each code's row (-1: not kept). The first code of an id decides for all."""
        values, same = self.values(), self.one_each()
        kept = np.flatnonzero(keep if same is None else keep & (same == np.arange(len(same))))
        order = kept[np.argsort(values[kept], kind="stable")]
        rows = np.full(len(values), -1, np.int32)
        rows[order] = np.arange(first, first + len(order), dtype=np.int32)
        return Ids(values[order], first), rows if same is None else rows[same]


@dataclasses.dataclass(frozen=True, eq=False)
class Settled:
    """Distinct ids (int64 or bytes, in order of arrival), and the index among them of each given id."""

    values: np.ndarray
    index: Int64[np.ndarray, " given"]


def settle(
    given: Sequence[Any],
    text: bool,
    what: str,
    origin: Callable[[int], str] | None = None,
    *,
    integers: bool | None = None,
) -> Settled:
    """Decides which ids integers and texts are, all of one column together.

    Where all are spelled as integers (`11`, `11.0`), equal numbers are one id. Otherwise all are exact text.

    Args:
      given: distinct integers or texts.
      text: the format cannot tell integers from text (CSV), so that `7` beside `007` may be a slip.
      what: what they are ids of, for errors.
      origin: names the place of one of them in errors.
      integers: text that is spelled as integers becomes int64 (default: if `text`), else it stays text.

    Raises:
      UserError: `text` that is no integer throughout and has entries that differ only in blanks around them,
      leading zeros or `.0`; ids that are too long.
    """
    if not given or all(isinstance(one, int) for one in given):
        return Settled(np.array(given, np.int64), np.arange(len(given)))
    integers = text if integers is None else integers
    strings = pa.array([str(one) for one in given], pa.string())
    digits, whole = _spelled(strings)
    if whole.all():
        encoded = digits.dictionary_encode()
        index = encoded.indices.to_numpy().astype(np.int64)
        if integers and pc.all(pc.match_substring_regex(encoded.dictionary, SAFE)).as_py():
            return Settled(pc.cast(encoded.dictionary, pa.int64()).to_numpy(), index)
        return Settled(_as_bytes(encoded.dictionary, what), index)
    if text:
        _refuse_ambiguous(strings, what, origin)
    return Settled(_as_bytes(strings, what), np.arange(len(given)))


def _refuse_ambiguous(strings: pa.Array, what: str, origin: Callable[[int], str] | None) -> None:
    trimmed = pc.utf8_trim_whitespace(strings)
    number = pc.replace_substring_regex(trimmed, r"^(-?)0*([0-9]+?)(\.0+)?$", r"\1\2")
    encoded = number.dictionary_encode()
    if len(encoded.dictionary) == len(strings):
        return
    codes = encoded.indices.to_numpy()
    first = np.full(len(encoded.dictionary), -1)
    for at, code in enumerate(codes):
        if first[code] < 0:
            first[code] = at
            continue
        one, other = (
            f"{strings[int(k)].as_py()[:80]!r}{f' ({origin(int(k))})' if origin else ''}" for k in (first[code], at)
        )
        raise UserError(
            f"{what}: {one} and {other} differ only in blanks around them, leading zeros or a trailing .0:"
            " are they one id or two? write every id in one form"
        )


def _as_bytes(strings: pa.Array, what: str) -> np.ndarray:
    _refuse_long(strings, what)
    if pc.any(pc.ends_with(strings, "\0")).as_py():
        raise UserError(f"a {what} id ends in a NUL character; such ids cannot be told apart from ones without")
    return np.array(pc.cast(strings, pa.binary()).to_numpy(zero_copy_only=False), dtype=bytes)


def _refuse_long(strings: pa.Array, what: str, where: str = "") -> None:
    lengths = pc.binary_length(strings).fill_null(0).to_numpy()
    if lengths.max(initial=0) > LONGEST:
        example = strings[int(lengths.argmax())].as_py()[:40]
        raise UserError(
            f"{where}{what} ids may be {LONGEST} bytes long; one has {lengths.max()} ({example!r}...): is it the right"
            " column?"
        )
