"""Plans on the host, in the input workers: which rows each batch shard reads, once each, and where an id finds its own.

No jax. A host plans for the shards of the batch that it builds and knows nothing of the others. Held by
tests/tables/test_planner.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxops.core.failures import UserError, nearest
from jaxops.tables.spec import TableSpec

PLAN, SLOTS = "plan", "slots"
"""Entries of a planned batch. `plan[table]`: "stored" int32 [shards, width], the rows that a shard reads, sorted, -1
in the rest; "passes" int32 [shards]. `slots[feature]`: int32, shaped as the feature, where an id is among those
rows."""


class Planner:
    """Plans for a mesh with `shards` batch shards of `examples` each, every one the owner of as many stored rows.

    A plan is as wide as `widths` says by table, or the next `wider` that holds all distinct rows; as wide as there are
    ids where `widths` does not name the table.
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
        """The batch with its plan; the whole batch, or the rows of some of its shards, as a process builds them.

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
    """[shards, n] rows to the distinct ones of each shard, sorted and padded with -1, and each one's place there.

    As `np.unique` with its inverse, but of one sort of numbers that hold row and place at once: numpy sorts those with
    vector instructions, and indices by a key ten times as slowly.
    """
    stored, places = np.full(rows.shape, -1, np.int32), np.empty(rows.shape, np.int32)
    order = np.arange(rows.shape[1])
    for shard, asked in enumerate(rows):
        key = (asked << 32) | order
        key.sort()
        row = key >> 32
        first = np.diff(row, prepend=-2) != 0
        found = row[first]
        missing = np.count_nonzero(found < 0)  # -1 is no row, and its place is -1
        places[shard, key & 0xFFFFFFFF] = np.cumsum(first, dtype=np.int32) - np.int32(1 + missing)
        stored[shard, : len(found) - missing] = found[missing:]
    return stored, places


def most_distinct(stored: np.ndarray) -> int:
    """The most rows that one shard reads."""
    return int((stored >= 0).sum(1).max(initial=0))


def wider(rows: int) -> int:
    """Room for a quarter more than so many rows, and for a few where they are few; in eights."""
    return -(-rows * 5 // 4 // 8) * 8 + 8


def largest_share(stored: np.ndarray, size: int, owners: int) -> int:
    """The most rows that one shard asks of one owner; an owner holds `size` rows."""
    return max((int(np.bincount(one[one >= 0] // size, minlength=owners).max()) for one in stored), default=0)


def passes_needed(stored: np.ndarray, size: int, owners: int, capacity: int) -> int:
    """Exchanges after which nothing is left: the least power of two P so that no owner is asked for more than
    `capacity` rows of one residue modulo P. The same row falls to the same pass on every shard.
    """
    rows = stored[stored >= 0].astype(np.int64)
    passes = 1
    while np.bincount(rows // size * passes + rows % passes, minlength=1).max(initial=0) > capacity:
        passes *= 2
    return passes
