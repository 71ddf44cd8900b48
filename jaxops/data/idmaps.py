"""Maps from ids of any kind to rows of a table: vocabularies, hashing, integer ranges. Row 0 is for unknown ids.

A map is frozen when training begins. An id that it lacks reads row 0 and never ends a run. (Maps that grow, with
admission and eviction, have their place in this union.)
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int32
from pydantic import Field

from jaxops.core.failures import UserError
from jaxops.data.ids import Ids, settle, spelled_integers
from jaxops.data.values import plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ids that training has at least `min_count` times get rows 1, 2, ... in sorted order."""

    kind: Literal["vocabulary"] = "vocabulary"
    min_count: Annotated[int, Field(ge=1)] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hashed:
    """Every id has a row, which others may share. With `apart`, features of one table are hashed with their names."""

    kind: Literal["hash"] = "hash"
    salt: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    apart: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Integers 0, 1, ... are rows 1, 2, ..."""

    kind: Literal["range"] = "range"


IdMap = Vocabulary | Hashed | Range


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A frozen map onto `rows` rows; `known` are a vocabulary's ids, in the order of their rows."""

    config: IdMap
    rows: int
    known: Ids | None = None

    def encode(self, values: pa.Array, feature: str = "") -> Int32[np.ndarray, " n"]:
        """Returns the row of each id, 0 where it is null or unknown; `feature` is for maps that keep them apart."""
        ids = plain(values).dictionary_encode()
        distinct = ids.dictionary
        of_distinct = np.concatenate([self._rows(distinct, feature), np.zeros(1, np.int32)])
        codes = ids.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False)
        return of_distinct[codes].astype(np.int32)

    def _rows(self, distinct: pa.Array, feature: str) -> np.ndarray:
        if isinstance(self.config, Hashed):
            key = self.config.salt.to_bytes(8, "little", signed=True)
            digest = functools.partial(hashlib.blake2b, digest_size=8, key=key)
            prefix = f"{feature}\0" if self.config.apart else ""
            texts = spelled_integers(pc.cast(distinct, pa.string()))[0].to_pylist()
            hashes = [int.from_bytes(digest(f"{prefix}{text}".encode()).digest(), "little") for text in texts]
            return np.array([1 + value % (self.rows - 1) for value in hashes], np.int32)
        if isinstance(self.config, Range):
            numbers = _integers(distinct)
            inside = (numbers >= 0) & (numbers < self.rows - 1)
            return np.where(inside, numbers + 1, 0).astype(np.int32)
        if self.known is None or not len(self.known) or not len(distinct):
            return np.zeros(len(distinct), np.int32)
        return np.maximum(self.known.rows(distinct.to_numpy(zero_copy_only=False)), 0)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays from which `restore_map` makes the map again."""
        out = {"rows": np.int64(self.rows).reshape(1)}
        return out | ({} if self.known is None else {"ids": np.asarray(self.known.values)})


def fit_map(config: IdMap, name: str, values: pa.Array, rows: int | None, *, text: bool = False) -> Fitted:
    """Makes the map of a table from the ids that training has; `rows` (row 0 too) is None where the vocabulary decides.

    Where a vocabulary has more ids than there are rows the most frequent get them, equals in sorted order.

    Args:
      config: the kind of map.
      name: the table.
      values: the ids.
      rows: the rows of the table.
      text: the values are from a format that cannot tell integers from text.

    Raises:
      UserError: hashing or a range without a number of rows; ids of a type that none can have.
    """
    if not isinstance(config, Vocabulary):
        if rows is None:
            raise UserError(f"tables.{name}.rows: ids: {config.kind} needs a number of rows")
        return Fitted(config, rows)
    counted = pc.value_counts(plain(values).drop_null())
    ids, counts = counted.field("values"), counted.field("counts").to_numpy(zero_copy_only=False)
    settled = settle(ids.to_pylist(), text, f"tables.{name}", integers=False)
    sorted_ids = settled.values
    counts = np.bincount(settled.index, counts, minlength=len(sorted_ids)).astype(np.int64)
    order = np.argsort(sorted_ids, kind="stable")
    order = order[counts[order] >= config.min_count]
    if rows is not None and len(order) > rows - 1:
        frequent = order[np.argsort(-counts[order], kind="stable")[: rows - 1]]
        order = frequent[np.argsort(sorted_ids[frequent], kind="stable")]
    return Fitted(config, rows or max(len(order) + 1, 2), Ids(sorted_ids[order], first=1))


def restore_map(config: IdMap, read: Callable[[str], np.ndarray]) -> Fitted:
    """Returns the map whose `Fitted.arrays` are given; `read` returns them by name."""
    known = Ids.of(read("ids"), first=1) if isinstance(config, Vocabulary) else None
    return Fitted(config, int(read("rows")[0]), known)


def _integers(values: pa.Array) -> np.ndarray:
    """Returns int64, -1 for text that is no integer."""
    if pa.types.is_integer(values.type):
        return values.to_numpy(zero_copy_only=False)
    digits, fits = spelled_integers(values)
    return pc.cast(pc.if_else(pa.array(fits), digits, "-1"), pa.int64()).to_numpy(zero_copy_only=False)
