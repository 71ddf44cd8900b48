"""Embedding tables without dense gradients: a step reads rows, differentiates by these rows, and writes them back.

`build_step(tables=...)` takes an `EmbeddingTables`, and a loader passes its batches through `EmbeddingTables.plan`.
Tested in tests/tables/: tables on one device, replicated and sharded ones agree with a dense reference.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from jaxops.core.failures import UserError
from jaxops.core.mesh import batch_axes, batch_shards
from jaxops.core.sums import Max, Sums, wide_dtype
from jaxops.tables import exchange
from jaxops.tables.average import AVERAGE, SINCE, caught_up, moved
from jaxops.tables.optimizers import clip_rows
from jaxops.tables.planner import PLAN, SLOTS, Planner, largest_share, most_distinct, wider
from jaxops.tables.spec import GROUPS, TableSpec, check_specs

Batch = Mapping[str, Any]
State = dict[str, dict[str, Array]]


def sharding(spec: TableSpec, mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the rows and slots of a table."""
    return NamedSharding(mesh, P(batch_axes(mesh)) if spec.placed == "row" and batch_axes(mesh) else P())


def evaluated(spec: TableSpec, table: Mapping[str, Array]) -> Array:
    """Returns the rows that evaluation and serving read: the current moving average if the table has one."""
    if spec.ema is None:
        return table["rows"]
    now = caught_up(table[AVERAGE], table[SINCE], table["rows"], table["count"], spec.ema)
    return now.astype(table["rows"].dtype)


def reading(specs: Mapping[str, TableSpec], mesh: Mesh, first: Batch) -> "EmbeddingTables":
    """Returns the tables that batches like `first` read, for batches that lack some features.

    `first` is a whole batch, the same on every process.
    """
    present = {
        name: dataclasses.replace(spec, features=tuple(f for f in spec.features if f in first), capacity=None)
        for name, spec in specs.items()
    }
    return EmbeddingTables({name: spec for name, spec in present.items() if spec.features}, mesh, first)


def _width(spec: TableSpec, first: np.ndarray, several: bool) -> int:
    """Returns the initial width of plans: as `first` needs with room to spare, since most ids of a batch repeat.

    A single process widens its plans when a batch needs it; there are few widths, and each new one recompiles the step.
    With `several` processes, which would have to agree, the width is an upper bound for every batch: the number of ids,
    or of rows of the table.
    """
    most = min(first.shape[1], spec.stored_rows)
    return most if several else min(wider(most_distinct(first)), most)


class EmbeddingTables:
    """The tables of a model on a mesh.

    The state of each table has "rows" [stored rows, dim], the slots of the optimizer and of the moving average, and
    "count", the number of steps that wrote to it. Rows and slots are sharded over the batch axes by row, or replicated.
    """

    def __init__(self, specs: Mapping[str, TableSpec], mesh: Mesh, first: Batch):
        """Lays the tables out on a mesh, with capacities that fit the batch `first` where a spec gives none.

        `first` is a whole batch, the same on every process.

        Raises:
          UserError: a spec is invalid (`check_specs`), the number of batch shards of the mesh does not divide GROUPS
            or the batch, or `first` lacks a feature.
        """
        check_specs(dict(specs))
        self.specs, self.mesh = dict(specs), mesh
        self.axes, self.shards = batch_axes(mesh), batch_shards(mesh)
        divided = [name for name, spec in specs.items() if spec.placed == "row"]
        if divided and GROUPS % self.shards:
            raise UserError(
                f"tables.{divided[0]}: {self.shards} batch shards of the mesh do not divide {GROUPS};"
                " take a number that does, or placement: replicated"
            )
        size = max((len(x) for x in first.values()), default=0)
        if size % self.shards or not size:
            raise UserError(f"tables: {size} examples do not divide over {self.shards} batch shards of the mesh")
        examples = size // self.shards
        whole = Planner(specs, self.shards, examples, dict.fromkeys(specs, 2**31))(first)
        self._first = {name: whole[PLAN][name]["stored"] for name in specs}
        self.capacities = {name: self.specs[name].capacity or self.needed(name) for name in divided}
        several = len({device.process_index for device in mesh.devices.flat}) > 1
        widths = {name: _width(spec, self._first[name], several) for name, spec in self.specs.items()}
        self.plan = Planner(self.specs, self.shards, examples, self.capacities, widths)

    def needed(self, name: str) -> int:
        """Returns the rows that a device asks of another in one exchange, if the table is sharded by row.

        It is a quarter more than the first batch needs, rounded up (`wider`), and at most the number of ids of a shard.
        """
        spec = dataclasses.replace(self.specs[name], placement="row")
        stored = self._first[name]
        if self.specs[name].placed == "replicated":
            stored = np.sort(spec.stored(stored).astype(np.int32), axis=1)
        most = largest_share(stored, spec.stored_rows // self.shards, self.shards)
        return min(wider(most), max(stored.shape[1], 1))

    def sharding(self, name: str) -> NamedSharding:
        """Returns the sharding of the rows and slots of a table."""
        return sharding(self.specs[name], self.mesh)

    def init(self, key: Array) -> State:
        """Returns initial rows and slots, made on the devices that hold them, with the same values on every mesh."""
        return {name: self._init(name, jax.random.fold_in(key, at)) for at, name in enumerate(sorted(self.specs))}

    def _init(self, name: str, key: Array) -> dict[str, Array]:
        spec, wide = self.specs[name], wide_dtype(jnp.dtype(self.specs[name].dtype))
        groups, each = (GROUPS, self.shards) if spec.placed == "row" else (1, 1)
        size = spec.stored_rows // groups
        centred = functools.partial(jax.random.uniform, minval=-1, maxval=1)
        draw: Callable[..., Array] = jax.random.normal if spec.init == "normal" else centred

        def local(key: Array) -> dict[str, Array]:
            # Groups are drawn one by one: the temporaries of a whole table's draw would take several times its memory.
            first = jax.lax.axis_index(self.axes) * (groups // each) if each > 1 else 0

            def rows(group: Array) -> Array:
                drawn = draw(jax.random.fold_in(key, group), (size, spec.dim), wide)
                return (drawn * jnp.asarray(spec.scale, wide)).astype(spec.dtype)

            made = jax.lax.map(rows, first + jnp.arange(groups // each, dtype=jnp.int32))
            made = made.reshape(-1, spec.dim)
            slots = spec.optimizer.slots(spec.dim).items()
            kept = {slot: jnp.full((made.shape[0], *shape), value, wide) for slot, (shape, value) in slots}
            if spec.ema:
                kept |= {AVERAGE: made.astype(wide), SINCE: jnp.zeros(made.shape[0], jnp.int32)}
            return {"rows": made, **kept, "count": jnp.zeros((), jnp.int32)}

        lies = self.sharding(name).spec
        averages = (AVERAGE, SINCE) if spec.ema else ()
        out = dict.fromkeys(("rows", *spec.optimizer.slots(spec.dim), *averages), lies) | {"count": P()}
        return jax.jit(self._map(local, P(), out))(key)

    def lookup(self, tables: State, batch: Batch) -> dict[str, Array]:
        """Returns by table the distinct rows that each batch shard reads, float32 or wider, [shards * width, dim]."""
        return {name: self._lookup(name, tables[name]["rows"], batch[PLAN][name]) for name in self.specs}

    def _lookup(self, name: str, rows: Array, plan: Mapping[str, Array]) -> Array:
        spec = self.specs[name]

        def local(rows: Array, stored: Array, passes: Array) -> Array:
            if spec.placed == "replicated" or self.shards == 1:
                found = rows.at[exchange.beyond(stored[0], rows.shape[0])].get(mode="fill", fill_value=0)
            else:
                most = jax.lax.pmax(passes[0], self.axes)
                found = exchange.gather_rows_of_slots(rows, stored[0], most, self.axes, self.capacities[name])
            return found.astype(wide_dtype(found.dtype))

        shards = P(self.axes)
        return self._map(local, (self.sharding(name).spec, shards, shards), shards)(
            rows, plan["stored"], plan["passes"]
        )

    def expand(self, rows: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
        """Returns by feature the row of each id, [batch, ..., dim], zeros for -1; it needs no communication."""

        def local(rows: Array, slots: Array) -> Array:
            place = jnp.where(slots < 0, rows.shape[0], slots)
            return rows.at[place].get(mode="fill", fill_value=0)

        shards = P(self.axes)
        # With `check_vma` the transpose knows that nothing varies over the other axes; else it would sum over them.
        take = jax.shard_map(local, in_specs=(shards, shards), out_specs=shards, check_vma=True)
        return {
            feature: take(rows[name], batch[SLOTS][feature])
            for name, spec in self.specs.items()
            for feature in spec.features
        }

    def metrics(self, batch: Batch) -> Sums:
        """Returns `tables/NAME/passes` of every `row` table: exchanges per step, above 1 if a capacity was exceeded."""
        return {
            f"tables/{name}/passes": Max(jnp.max(batch[PLAN][name]["passes"]).astype(jnp.float32))
            for name in self.capacities
        }

    def apply(self, tables: State, batch: Batch, row_grads: Mapping[str, Array], keep: Bool[Array, ""]) -> State:
        """Returns the tables after the optimizers' update of the touched rows.

        Args:
          tables: state of the tables.
          batch: the planned batch.
          row_grads: by table, the gradients of the rows that `lookup` returned.
          keep: false for a skipped step, which changes nothing.
        """
        return {name: self._apply(name, tables[name], batch[PLAN][name], row_grads[name], keep) for name in self.specs}

    def _apply(
        self, name: str, table: dict[str, Array], plan: Mapping[str, Array], grads: Array, keep: Array
    ) -> dict[str, Array]:
        spec, rule = self.specs[name], self.specs[name].optimizer
        count = table["count"] + keep.astype(jnp.int32)
        arrays = {slot: x for slot, x in table.items() if slot != "count"}

        def local(
            arrays: dict[str, Array], count: Array, stored: Array, passes: Array, grads: Array, keep: Array
        ) -> Any:
            def update(arrays: dict[str, Array], rows: Array, grads: Array) -> dict[str, Array]:
                read = {slot: x.at[rows].get(mode="fill", fill_value=0) for slot, x in arrays.items()}
                old, slots = read["rows"], {slot: read[slot] for slot in rule.slots(spec.dim)}
                new, slots = rule.update(old.astype(grads.dtype), slots, clip_rows(grads, rule.clip), count)
                put = {"rows": new.astype(old.dtype), **slots}
                if spec.ema:
                    wide = moved(read[AVERAGE], read[SINCE], old.astype(grads.dtype), new, count, spec.ema)
                    put |= {AVERAGE: wide, SINCE: jnp.broadcast_to(count, read[SINCE].shape)}
                put = {slot: jnp.where(keep, x, read[slot]) for slot, x in put.items()}
                return {slot: x.at[rows].set(put[slot], mode="drop", unique_indices=True) for slot, x in arrays.items()}

            size = arrays["rows"].shape[0]
            if self.shards == 1:  # a plan has each row once, so nothing is exchanged or summed
                return update(arrays, exchange.beyond(stored[0], size), grads)
            if spec.placed == "replicated":
                return self._whole(arrays, size, stored[0], grads, update)
            most = jax.lax.pmax(passes[0], self.axes)
            return exchange.scatter(arrays, size, stored[0], most, grads, update, self.axes, self.capacities[name])

        shards, lies = P(self.axes), self.sharding(name).spec
        where = dict.fromkeys(arrays, lies)
        written = self._map(local, (where, P(), shards, shards, shards, P()), where)(
            arrays, count, plan["stored"], plan["passes"], grads, keep
        )
        return {**written, "count": count}

    def _whole(self, arrays: Any, size: int, stored: Array, grads: Array, update: exchange.Update) -> Any:
        """Updates a replicated table; the summed gradients have the size of the table."""
        rows = exchange.beyond(stored, size)
        total = jnp.zeros((size, grads.shape[1]), grads.dtype).at[rows].set(grads, mode="drop", unique_indices=True)
        touched = jnp.zeros(size, jnp.int32).at[rows].set(1, mode="drop", unique_indices=True)
        total, touched = jax.lax.psum((total, touched), self.axes)
        at = jnp.where(touched > 0, jnp.arange(size, dtype=jnp.int32), -1)
        return update(arrays, exchange.beyond(at, size), total)

    def _map(self, local: Callable[..., Any], ins: Any, out: Any) -> Callable[..., Any]:
        """Maps `local` over the devices; its results may vary over the batch axes only through its arguments."""
        return jax.shard_map(local, in_specs=ins, out_specs=out, check_vma=False)

    def bytes_per_device(self) -> dict[str, int]:
        """Returns the bytes of rows and slots on each device, by table."""
        return {name: spec.bytes() // (self.shards if spec.placed == "row" else 1) for name, spec in self.specs.items()}
