"""Original ids and their rows: rows are handed out in sorted order of the ids, so never in order of arrival.

Integers sort numerically, strings by their UTF-8 bytes. Kept as int64 or fixed-width bytes, both
memory-mappable.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int32, Int64

from jaxops.core.failures import UserError

LONGEST = 1000
"""Bytes of an id; a longer one is surely a text column named by mistake."""

DECIMAL = r"^(0|-?[1-9][0-9]{0,17}|-?[1-8][0-9]{18})$"
"""The plain decimal form of an integer that fits int64 for certain."""


@dataclasses.dataclass(frozen=True, eq=False)
class Ids:
    """The way between rows and original ids: row `first + i` is `values[i]`, and `values` is sorted."""

    values: np.ndarray
    first: int

    @staticmethod
    def of(values: np.ndarray, first: int) -> "Ids":
        """Those of sorted integers, bytes or text."""
        return Ids(values if values.dtype.kind in "iS" else np.char.encode(values.astype(str), "utf-8"), first)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def kind(self) -> str:
        """`integer` or `string`."""
        return "integer" if self.values.dtype.kind == "i" else "string"

    def originals(self, rows: Any) -> np.ndarray:
        """The original ids of `rows`, any shape: int64, or numpy strings.

        Raises:
          IndexError: a row that is none (the padding row 0 of items among them).
        """
        index = np.asarray(rows, np.int64) - self.first
        if index.size and (index.min() < 0 or index.max() >= len(self.values)):
            raise IndexError(f"rows run from {self.first} to {self.first + len(self.values) - 1}")
        found = np.asarray(self.values[index])
        return found if found.dtype.kind == "i" else np.char.decode(found, "utf-8")

    def rows(self, originals: Any) -> Int32[np.ndarray, " ids"]:
        """The row of each original id; -1 where it is not known."""
        if self.values.dtype.kind == "i":
            wanted, known = _as_integers(np.asarray(originals))
        else:
            text = np.char.encode(np.asarray(originals).astype(str), "utf-8")
            # Cast first: searchsorted would otherwise widen (and copy) the whole table of ids.
            known = np.char.str_len(text) <= self.values.dtype.itemsize
            wanted = text.astype(self.values.dtype)
        at = np.minimum(np.searchsorted(self.values, wanted), len(self.values) - 1)
        known &= self.values[at] == wanted
        return np.where(known, at + self.first, -1).astype(np.int32)

    def positions(self, originals: pa.Array) -> Int64[np.ndarray, " ids"]:
        """As `rows`, of an Arrow array; -1 for null too."""
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
    """The integers, and where there is one; strings (a CSV's, say) are read, anything else is no integer."""
    if originals.dtype.kind in "iu":
        return originals, np.ones(originals.shape, bool)
    text = pa.array(originals.astype(str).ravel())
    proper = pc.match_substring_regex(text, DECIMAL)
    numbers = pc.cast(pc.if_else(proper, text, "0"), pa.int64()).to_numpy()
    return numbers.reshape(originals.shape), proper.to_numpy(zero_copy_only=False).reshape(originals.shape)


class IdCollector:
    """Hands out provisional codes in order of arrival; `finish` turns them into sorted rows.

    `text`: the format cannot tell integers from strings (CSV), so the ids are integers if all of them read
    so. Holds every unique id in memory, and nothing else of the data.
    """

    def __init__(self, what: str, text: bool) -> None:
        self.what = what
        self.text = text
        self._codes: dict[Any, int] = {}
        self._type: pa.DataType | None = None
        self._seen_in = ""

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, values: pa.Array, where: str) -> Int32[np.ndarray, " rows"]:
        """Codes of a batch, int64 or string, -1 for null; `where` names its file in errors.

        Raises:
          UserError: integers here and strings in an earlier file.
        """
        if self._type is None:
            self._type, self._seen_in = values.type, where
        elif values.type != self._type:
            raise UserError(
                f"{self.what} ids are of different types: {self._type} in {self._seen_in} but {values.type} "
                f"in {where}; write them as one type in all files"
            )
        encoded = values.dictionary_encode()
        codes = self._codes
        unique = (codes.setdefault(value, len(codes)) for value in encoded.dictionary.to_pylist())
        lookup = np.append(np.fromiter(unique, np.int32, len(encoded.dictionary)), np.int32(-1))
        return lookup[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]

    def values(self) -> np.ndarray:
        """What the codes stand for, in their order: int64 or bytes."""
        return sortable(list(self._codes), self.text, self.what)

    def finish(self, keep: Bool[np.ndarray, " codes"], first: int) -> tuple[Ids, Int32[np.ndarray, " codes"]]:
        """The kept ids as `Ids`, and each code's row (-1: not kept)."""
        values = self.values()
        kept = np.flatnonzero(keep)
        order = kept[np.argsort(values[kept], kind="stable")]
        rows = np.full(len(values), -1, np.int32)
        rows[order] = np.arange(first, first + len(order), dtype=np.int32)
        return Ids(values[order], first), rows


def sortable(ids: Sequence[Any], text: bool, what: str) -> np.ndarray:
    """int64 or bytes; text becomes integers only if every id is the plain decimal form of one (not `007`)."""
    if not ids or isinstance(ids[0], int):
        return np.array(ids, np.int64)
    strings = pa.array(ids, pa.large_string())
    if text and pc.all(pc.match_substring_regex(strings, DECIMAL)).as_py():
        return pc.cast(strings, pa.int64()).to_numpy()
    lengths = pc.binary_length(strings).to_numpy()
    if lengths.max() > LONGEST:
        example = ids[int(lengths.argmax())][:40]
        raise UserError(
            f"{what} ids may be {LONGEST} bytes long; one has {lengths.max()} ({example!r}...): is it the right column?"
        )
    if pc.any(pc.ends_with(strings, "\0")).as_py():
        raise UserError(f"a {what} id ends in a NUL character; such ids cannot be told apart from ones without")
    return np.array(pc.cast(strings, pa.large_binary()).to_numpy(zero_copy_only=False), dtype=bytes)
