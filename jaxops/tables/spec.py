"""The spec of an embedding table, and the order in which its rows are stored, which is the same on every mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxops.core.failures import UserError
from jaxops.tables.optimizers import RowwiseAdagrad, TableOptimizer

GROUPS = 1024
"""Number of virtual shards, a power of two: row i is in group i % GROUPS, and a device holds whole groups.

So neighbouring ids, which are often alike in popularity, are spread over the devices. The number of batch shards must
divide this number."""
REPLICATED_ROWS = 20_000
"""The most rows of a table that `auto` replicates; about up to here it is cheaper to hold and update it everywhere."""

Placement = Literal["auto", "replicated", "row"]
Init = Literal["normal", "uniform"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A table inside a stack, whose ids `first`, `first + 1`, ... are its rows.

    Attributes:
      name: name of the table.
      first: the stack's id of the table's id 0.
      rows: number of ids.
      unknown: id that is read for ids outside of the table.
      features: batch entries with ids of the table.
    """

    name: str
    first: int
    rows: int
    unknown: int
    features: tuple[str, ...]

    def within(self, ids: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """Converts ids of this table to ids of the stack, int64; -1 stays -1."""
        known = np.where((ids >= self.rows) | (ids < -1), self.unknown, ids.astype(np.int64))
        return np.where(known < 0, -1, known + self.first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSpec:
    """An embedding table with ids 0..rows-1 and rows of width `dim`, read by the batch entries in `features`.

    Attributes:
      rows: number of ids.
      dim: width of a row.
      features: entries of the batch with ids, int32 of any shape [batch, ...]; -1 means none, and reads zeros. An id
        outside of the table reads row `unknown`.
      dtype: dtype of the rows.
      init: initial rows: `normal` with standard deviation `scale`, or `uniform` between -scale and scale.
      scale: scale of the initial rows; 0 gives zeros.
      optimizer: the rule that updates touched rows.
      placement: `row` shards the rows over the batch axes, `replicated` holds all of them on every device, and `auto`
        replicates tables of up to REPLICATED_ROWS rows.
      ema: decay of a moving average of the rows, which evaluation and serving read; the average needs as much memory as
        the rows. None keeps no average.
      capacity: most rows that a device asks of another in one exchange; None derives it from a first batch, with room
        to spare.
      unknown: id that is read for ids outside of the table.
      members: the tables that this one is a stack of (`stack`); a feature's ids are then those of its member.
    """

    rows: int
    dim: int
    features: tuple[str, ...]
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    init: Init = "normal"
    scale: float = 0.01
    optimizer: TableOptimizer = RowwiseAdagrad()
    placement: Placement = "auto"
    ema: float | None = None
    capacity: int | None = None
    unknown: int = 0
    members: tuple[Member, ...] = ()

    def problems(self) -> list[tuple[str, str]]:
        """Returns the invalid values as (field, message)."""
        found = [(name, "expected a positive number") for name in ("rows", "dim") if getattr(self, name) < 1]
        if not self.features:
            found.append(("features", "expected the batch entries that hold its ids"))
        if self.scale < 0:
            found.append(("scale", "expected zero or more"))
        if self.capacity is not None and self.capacity < 1:
            found.append(("capacity", "expected a positive number, or null"))
        if self.ema is not None and not 0 < self.ema < 1:
            found.append(("ema", "expected a decay between 0 and 1, or null for none"))
        if not 0 <= self.unknown < max(self.rows, 1):
            found.append(("unknown", f"expected a row of the table, 0 to {self.rows - 1}"))
        return found + [(f"optimizer.{name}", what) for name, what in self.optimizer.problems()]

    @property
    def placed(self) -> Literal["replicated", "row"]:
        """The placement, with `auto` resolved."""
        if self.placement != "auto":
            return self.placement
        return "replicated" if self.rows <= REPLICATED_ROWS else "row"

    @property
    def stored_rows(self) -> int:
        """The number of rows of the arrays, which is padded so that all groups have one size."""
        return self.rows if self.placed == "replicated" else -(-self.rows // GROUPS) * GROUPS

    def stored(self, ids: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """Returns the row of the arrays that holds each id, int64: -1 for -1, the row of `unknown` for unknown ids."""
        ids = ids.astype(np.int64)
        known = np.where((ids >= self.rows) | (ids < -1), self.unknown, ids)
        if self.placed == "replicated":
            return known
        group = known & (GROUPS - 1)  # this is known % GROUPS in a tenth of the time
        return np.where(known < 0, -1, group * (self.stored_rows // GROUPS) + known // GROUPS)

    def ids_of(self, feature: str, ids: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """Converts a feature's ids to ids of this table; they differ only in a stack."""
        for member in self.members:
            if feature in member.features:
                return member.within(ids)
        return ids

    def bytes(self) -> int:
        """Returns the bytes of rows and slots: of all devices together for `row`, of each device for `replicated`."""
        numbers = sum(int(np.prod(shape)) for shape, _ in self.optimizer.slots(self.dim).values())
        numbers += self.dim + 1 if self.ema else 0
        wide = max(4, jnp.dtype(self.dtype).itemsize)
        return self.stored_rows * (self.dim * jnp.dtype(self.dtype).itemsize + numbers * wide)


def stack(specs: Mapping[str, TableSpec]) -> dict[str, TableSpec]:
    """Joins tables of one width, dtype, optimizer, placement, average and init into stacks, exchanged together.

    A table that matches no other, or has a capacity of its own, stays as it is.
    """
    sorts: dict[Any, list[str]] = {}
    for name, spec in specs.items():
        alone = name if spec.capacity is not None else None
        begin = (spec.init, spec.scale)
        sort = (spec.dim, spec.dtype, spec.optimizer, spec.placed, begin, spec.ema, alone)
        sorts.setdefault(sort, []).append(name)
    return dict(_stacked(specs, names) for names in sorts.values())


def stored_rows(name: str, spec: TableSpec) -> dict[str, Callable[[Int[np.ndarray, "..."]], Int[np.ndarray, "..."]]]:
    """Returns a function from ids to stored rows for each table that `spec` holds: itself, or its stack's members."""
    if not spec.members:
        return {name: spec.stored}
    of = lambda member: lambda ids: spec.stored(member.within(ids))
    return {member.name: of(member) for member in spec.members}


def _stacked(specs: Mapping[str, TableSpec], names: list[str]) -> tuple[str, TableSpec]:
    first = specs[names[0]]
    if len(names) == 1:
        return names[0], first
    ends = np.cumsum([specs[name].rows for name in names]).tolist()
    members = tuple(
        Member(name=name, first=end - spec.rows, rows=spec.rows, unknown=spec.unknown, features=spec.features)
        for name, end, spec in zip(names, ends, (specs[name] for name in names), strict=True)
    )
    features = tuple(feature for member in members for feature in member.features)
    whole = dataclasses.replace(
        first, rows=ends[-1], features=features, placement=first.placed, unknown=0, members=members
    )
    return f"{names[0]}_and_{len(names) - 1}_more", whole


def check_specs(specs: dict[str, TableSpec]) -> None:
    """Checks all specs, and reports all invalid values in one error.

    Raises:
      UserError: a value is out of range, or a feature belongs to two tables.
    """
    wrong = [f"tables.{name}.{field}: {what}" for name, spec in specs.items() for field, what in spec.problems()]
    owner: dict[str, str] = {}
    for name, spec in specs.items():
        for feature in spec.features:
            if owner.setdefault(feature, name) != name:
                wrong.append(f"tables.{name}.features: {feature!r} is read from {owner[feature]!r} already")
    if wrong:
        raise UserError("\n".join(wrong))
