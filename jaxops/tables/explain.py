"""The cost of tables on a mesh before anything is compiled: bytes per device, bytes exchanged, why placed so."""

import dataclasses
from collections.abc import Mapping

from jaxops.core.failures import UserError
from jaxops.tables.spec import REPLICATED_ROWS, TableSpec
from jaxops.tables.tables import EmbeddingTables

WIDE = 4
"""Bytes of an exchanged number: rows and gradients are sent in float32, ids as int32."""


@dataclasses.dataclass(frozen=True)
class TableCost:
    """The cost of a table (or a stack of tables) on a mesh.

    Attributes:
      name: name of the table or stack.
      members: names of the tables in it.
      rows: number of ids.
      dim: width of a row.
      optimizer: kind of its optimizer.
      placement: `row` or `replicated`.
      why: reason of the placement, in words.
      bytes_per_device: bytes of rows and slots on each device.
      exchanged: bytes that a device sends in a step of one pass.
      runner_up: the other placement.
      runner_up_bytes: bytes per device under the other placement.
      runner_up_exchanged: bytes sent in a step under the other placement.
    """

    name: str
    members: tuple[str, ...]
    rows: int
    dim: int
    optimizer: str
    placement: str
    why: str
    bytes_per_device: int
    exchanged: int
    runner_up: str
    runner_up_bytes: int
    runner_up_exchanged: int


def costs(tables: EmbeddingTables, asked: Mapping[str, TableSpec]) -> list[TableCost]:
    """Returns one entry per table or stack; every table of `asked` is in exactly one entry.

    Raises:
      UserError: a table is missing from the plan.
    """
    found = [_cost(tables, name, spec) for name, spec in tables.specs.items()]
    planned = [member for cost in found for member in cost.members]
    missing = [name for name in asked if planned.count(name) != 1]
    if missing:
        raise UserError(f"tables: {', '.join(missing)} left out of the plan")
    return found


def _cost(tables: EmbeddingTables, name: str, spec: TableSpec) -> TableCost:
    divided = spec.placed == "row"
    other = dataclasses.replace(spec, placement="replicated" if divided else "row")
    by_size = f"{spec.rows:,} rows, {'more than' if divided else 'at most'} {REPLICATED_ROWS:,}"
    capacity = tables.capacities.get(name) or tables.needed(name)
    return TableCost(
        name=name,
        members=tuple(member.name for member in spec.members) or (name,),
        rows=spec.rows,
        dim=spec.dim,
        optimizer=spec.optimizer.kind,
        placement=spec.placed,
        why=by_size if spec.placement == "auto" or spec.members else "as the config says",
        bytes_per_device=_bytes(spec, tables.shards),
        exchanged=_exchanged(spec, tables.shards, capacity),
        runner_up=other.placed,
        runner_up_bytes=_bytes(other, tables.shards),
        runner_up_exchanged=_exchanged(other, tables.shards, capacity),
    )


def _bytes(spec: TableSpec, shards: int) -> int:
    return spec.bytes() // (shards if spec.placed == "row" else 1)


def _exchanged(spec: TableSpec, shards: int, capacity: int) -> int:
    """Returns the bytes that a device sends to others in a step of one pass.

    A `row` table sends requests (once for look-up and update), rows and gradients; a replicated one all-reduces
    gradients.
    """
    if spec.placed == "replicated":
        return 2 * (shards - 1) * spec.rows * (spec.dim + 1) * WIDE // shards
    return (shards - 1) * capacity * (2 * spec.dim + 1) * WIDE


def require_room(tables: EmbeddingTables, limit: int | None, what: str) -> None:
    """Refuses tables that are too large for a device, before anything is compiled.

    Raises:
      UserError: the tables and their slots take more than `limit` bytes of a device.
    """
    held = tables.bytes_per_device()
    total = sum(held.values())
    if limit is None or total <= limit:
        return
    largest = max(held, key=lambda name: held[name])
    raise UserError(
        f"tables: {total / 2**30:,.1f} GiB a device with their slots, and {what} has {limit / 2**30:,.1f} GiB; the"
        f" largest is {largest} ({held[largest] / 2**30:,.1f} GiB, {tables.specs[largest].placed}). Divide rows over"
        f" more devices, or take a smaller dim, a row-wise optimizer or dtype bfloat16"
    )
