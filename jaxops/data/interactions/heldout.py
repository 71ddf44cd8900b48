"""Held-out events as values: queries, the split that they belong to, and the SHA-256 that publishes it.

A split holds no events of its own, only counts into the interactions: the number of first events that train, and of
those that precede a target.
"""

import dataclasses
import functools
import hashlib
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int32, Int64

from jaxops.data.interactions.interactions import Interactions
from jaxops.data.interactions.ranges import user_ranges

CHUNK = 1 << 20
"""The number of events that are hashed at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Queries:
    """One prediction each: given the first `history` events of `user`, rank `target` (an item row) high."""

    user: Int32[np.ndarray, " queries"]
    history: Int64[np.ndarray, " queries"]
    target: Int32[np.ndarray, " queries"]

    def __len__(self) -> int:
        return len(self.user)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The first `train_end[u]` events of user u are training; `valid` and `test` hold the queries.

    `boundaries` are the unix times (valid_from, test_from) of a global split. `counts` says how many queries
    there are, how many of them have a cold user (no training event) or a cold item (a target never trained
    on; they stay in), and how many users were left out of a part because nothing came before their target
    (`no_history`).
    """

    inter: Interactions = dataclasses.field(repr=False)
    kind: Literal["leave_one_out", "global_time"]
    train_end: Int64[np.ndarray, " users"]
    valid: Queries
    test: Queries
    boundaries: tuple[float, float] | None = None
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256 of the split in original ids, which lets anyone compare theirs.

        It is over UTF-8 lines, one a user in order of the original ids: `user \\t items, in order, apart by spaces
        \\t train_end \\t history of the validation query \\t history of the test query \\n`, `-` where there
        is no such query.
        """
        return _digest(self)


def _digest(split: Split) -> str:
    inter, digest = split.inter, hashlib.sha256()
    histories = []
    for part in (split.valid, split.test):
        column = np.full(inter.n_users, -1, np.int64)
        column[part.user] = part.history
        histories.append(column)
    for start, stop in user_ranges(inter.offsets, CHUNK):
        first, last = int(inter.offsets[start]), int(inter.offsets[stop])
        items = pc.cast(inter.item_ids.table.take(pa.array(inter.item[first:last] - 1)), pa.string())
        lists = pa.ListArray.from_arrays((inter.offsets[start : stop + 1] - first).astype(np.int32), items)
        columns = [
            pc.cast(inter.user_ids.table.slice(start, stop - start), pa.string()),
            pc.binary_join(lists, " "),
            *(_text(column[start:stop]) for column in (split.train_end, *histories)),
        ]
        lines = pc.binary_join_element_wise(*columns, pa.scalar("\t", pa.string()))
        digest.update("".join(f"{line}\n" for line in lines.to_pylist()).encode())
    return digest.hexdigest()


def _text(counts: Int64[np.ndarray, " users"]) -> pa.Array:
    numbers = pc.cast(pa.array(counts), pa.string())
    return pc.if_else(pa.array(counts >= 0), numbers, pa.scalar("-", pa.string()))
