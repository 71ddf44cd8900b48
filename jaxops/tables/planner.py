"""Plans on the host, made in the input workers: each batch shard's distinct rows, and the place of each id in them.

This module does not use jax. A host plans only for the batch shards that it builds, without knowledge of the others.
Tested in tests/tables/test_planner.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxops.core.failures import UserError, nearest
from jaxops.tables.spec import TableSpec

PLAN, SLOTS = "plan", "slots"
"""Entries of a planned batch.

`plan[table]` has "stored", int32 [shards, width], the sorted distinct rows that a shard reads, padded with -1, and
"passes", int32 [shards]. `slots[feature]`, int32 of the feature's shape, is the place of each id among those rows."""


class Planner:
    """The planner for a mesh with `shards` batch shards of `examples` each, which own equal numbers of stored rows.

    The width of a table's plan is that in `widths`, widened by `wider` until it holds all distinct rows. For a table
    that `widths` does not name it is the number of ids.

    Args:
      specs: the tables by name.
      shards: number of batch shards of the mesh.
      examples: examples per batch shard.
      capacities: most rows that a shard asks of one owner in a pass, by `row` table.
      widths: initial width of the plan, by table.
    """

    def __init__(
        self,
        specs: Mapping[str, TableSpec],
        shards: int,
        examples: int,
        capacities: Mapping[str, int],
        widths: Mapping[str, int] | None = None,
    ):
        self._specs, self._shards, self._examples, self._capacities = specs, shards, examples, capacities
        self._widths = widths or {}

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Returns the batch with its plan; `batch` is a whole batch, or the rows of the shards that a process builds.

        Raises:
          UserError: a table's feature is not in the batch, or does not divide into whole shards.
        """
        plan, slots = {}, {}
        for name, spec in self._specs.items():
            found = [spec.ids_of(feature, self._feature(batch, name, feature)) for feature in spec.features]
            shards = len(found[0])
            rows, places = distinct(spec.stored(np.concatenate(found, axis=1)))
            ends = np.cumsum([one.shape[1] for one in found])[:-1]
            for feature, place in zip(spec.features, np.split(places, ends, axis=1), strict=True):
                slots[feature] = place.reshape(batch[feature].shape)
            passes = np.ones(shards, np.int32)
            if spec.placed == "row" and self._shards > 1:
                size = spec.stored_rows // self._shards
                passes = np.array([passes_needed(one, size, self._shards, self._capacities[name]) for one in rows])
            rows = np.ascontiguousarray(rows[:, : self._width(name, rows)])
            plan[name] = {"stored": rows, "passes": passes.astype(np.int32)}
        return {**batch, PLAN: plan, SLOTS: slots}

    def _width(self, name: str, rows: np.ndarray) -> int:
        width, distinct = self._widths.get(name, rows.shape[1]), most_distinct(rows)
        while width < distinct:
            width = wider(width)
        return width

    def _feature(self, batch: Mapping[str, np.ndarray], table: str, feature: str) -> np.ndarray:
        if feature not in batch:
            raise UserError(f"tables.{table}.features: {feature!r} is not in the batch{nearest(feature, list(batch))}")
        ids = batch[feature]
        if len(ids) % self._examples:
            raise UserError(f"tables.{table}: {len(ids)} examples are not whole batch shards of {self._examples}")
        return ids.reshape(len(ids) // self._examples, -1)


def distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct rows of each shard, sorted and padded with -1, and the place of each entry among them.

    `rows` is [shards, n], as are both results. It does the work of `np.unique` with its inverse in one sort of numbers
    that hold row and position at once. Numpy sorts those with vector instructions; an argsort takes ten times as long.
    """
    stored, places = np.full(rows.shape, -1, np.int32), np.empty(rows.shape, np.int32)
    order = np.arange(rows.shape[1])
    for shard, asked in enumerate(rows):
        key = (asked << 32) | order
        key.sort()
        row = key >> 32
        first = np.diff(row, prepend=-2) != 0
        found = row[first]
        missing = np.count_nonzero(found < 0)  # -1 means no row, and its place is -1
        places[shard, key & 0xFFFFFFFF] = np.cumsum(first, dtype=np.int32) - np.int32(1 + missing)
        stored[shard, : len(found) - missing] = found[missing:]
    return stored, places


def most_distinct(stored: np.ndarray) -> int:
    """Returns the largest number of distinct rows that a shard reads."""
    return int((stored >= 0).sum(1).max(initial=0))


def wider(rows: int) -> int:
    """Returns a multiple of 8 that has room for a quarter more than `rows`, and for at least 8 more."""
    return -(-rows * 5 // 4 // 8) * 8 + 8


def largest_share(stored: np.ndarray, size: int, owners: int) -> int:
    """Returns the largest number of rows that a shard asks of one owner, where an owner holds `size` rows."""
    return max((int(np.bincount(one[one >= 0] // size, minlength=owners).max()) for one in stored), default=0)


def passes_needed(stored: np.ndarray, size: int, owners: int, capacity: int) -> int:
    """Returns the number of passes that a shard needs so that it asks no owner for more than `capacity` rows in a pass.

    It is the least power of two P for which no owner is asked for more than `capacity` rows of one residue modulo P. So
    a row belongs to the same pass on every shard.

    Args:
      stored: the distinct stored rows that the shard reads, -1 for padding.
      size: number of rows that an owner holds.
      owners: number of owners (not used).
      capacity: most rows that the shard asks of one owner in a pass.
    """
    rows = stored[stored >= 0].astype(np.int64)
    passes = 1
    while np.bincount(rows // size * passes + rows % passes, minlength=1).max(initial=0) > capacity:
        passes *= 2
    return passes
