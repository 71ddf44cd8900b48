"""The exchange of table rows between their owners and the devices that read them: two all_to_alls each way.

The functions run inside `shard_map` over the batch axes, with two or more shards, on one device's part. The rows that a
shard reads are divided into passes by row number, not by position. So an owner gets all gradients of a row in one pass
and applies its optimizer once. There is one pass unless a plan says that its rows exceed the capacity.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Axes = tuple[str, ...]
Update = Callable[[Any, Int[Array, " n"], Float[Array, "n dim"]], Any]


def gather_rows_of_slots(
    table: Float[Array, "size dim"], stored: Int[Array, " ids"], passes: Int[Array, ""], axes: Axes, capacity: int
) -> Float[Array, "ids dim"]:
    """Returns the rows that this shard reads, zeros where `stored` is -1.

    Args:
      table: the rows that this device holds.
      stored: the distinct stored rows to read, sorted, -1 for padding.
      passes: number of passes, the same on all shards.
      axes: the batch axes of the mesh.
      capacity: most rows that a shard asks of one owner in a pass.
    """
    owners, size = jax.lax.axis_size(axes), table.shape[0]

    def one(at: Array, found: Array) -> Array:
        order, start, mine = _sorted_out(stored, at, passes, size, owners)
        asked = _asked(stored, order, start, size, capacity)
        rows = _swap(table.at[beyond(_swap(asked, axes), size)].get(mode="fill", fill_value=0), axes)
        rank = jax.lax.cond(passes == 1, lambda: order, lambda: jnp.argsort(order).astype(jnp.int32))
        owner = jnp.clip(stored // size, 0, owners - 1)
        place = jnp.where(mine, owner * capacity + rank - start[owner], owners * capacity)
        return jnp.where(mine[:, None], rows.at[place].get(mode="fill", fill_value=0), found)

    empty = jnp.zeros((stored.shape[0], table.shape[1]), table.dtype)
    return _repeat(passes, one, empty)


def scatter(
    state: Any,
    size: int,
    stored: Int[Array, " ids"],
    passes: Int[Array, ""],
    grads: Float[Array, "ids dim"],
    update: Update,
    axes: Axes,
    capacity: int,
) -> Any:
    """Calls `update(state, rows, gradients)` on the owners, with each touched row once and its gradients summed.

    Args:
      state: the arrays that this device holds, which `update` returns anew.
      size: number of rows that this device holds; rows given to `update` at or beyond it are padding.
      stored: the distinct stored rows that this shard has read, sorted, -1 for padding.
      passes: number of passes, the same on all shards.
      grads: gradients of these rows.
      update: the optimizer's update of the touched rows.
      axes: the batch axes of the mesh.
      capacity: most rows that a shard asks of one owner in a pass.
    """
    owners = jax.lax.axis_size(axes)

    def one(at: Array, state: Any) -> Any:
        order, start, _ = _sorted_out(stored, at, passes, size, owners)
        asked = _asked(stored, order, start, size, capacity)
        sent = grads[_places(order, start, capacity)[0]]  # for padding any gradient, which is dropped
        rows, got = _summed(_swap(asked, axes), _swap(sent, axes))
        return update(state, beyond(rows, size), got)

    return _repeat(passes, one, state)


def _sorted_out(
    stored: Int[Array, " ids"], at: Array, passes: Array, size: int, owners: int
) -> tuple[Int[Array, " ids"], Int[Array, " owners+1"], Bool[Array, " ids"]]:
    """Sorts the rows of pass `at` by owner.

    Returns the positions in `stored` of the pass's rows in order of row, the index in that list at which each owner's
    rows begin, and a mask over `stored` of the pass's rows.
    """
    mine = (stored >= 0) & (stored % passes == at)
    key = jnp.where(mine, stored, jnp.iinfo(jnp.int32).max)
    as_it_is = jnp.arange(stored.shape[0], dtype=jnp.int32)  # a plan is sorted already
    order = jax.lax.cond(passes == 1, lambda: as_it_is, lambda: jnp.argsort(key).astype(jnp.int32))
    ends = jnp.arange(owners + 1, dtype=jnp.int32) * size
    return order, jnp.searchsorted(key[order], ends).astype(jnp.int32), mine


def _places(order: Array, start: Array, capacity: int) -> tuple[Array, Array]:
    """Returns for each of [owners * capacity] requests the position of its row in `stored`, and a mask of real ones."""
    place = start[:-1, None] + jnp.arange(capacity, dtype=jnp.int32)[None]
    there = place < start[1:, None]
    return order[jnp.minimum(place, order.shape[0] - 1).reshape(-1)], there.reshape(-1)


def _asked(stored: Array, order: Array, start: Array, size: int, capacity: int) -> Int[Array, " requests"]:
    """Returns the rows to request of each owner, counted from the owner's first; -1 for no request."""
    place, there = _places(order, start, capacity)
    return jnp.where(there, stored[place] % size, -1)


def _summed(rows: Int[Array, " n"], grads: Float[Array, "n dim"]) -> tuple[Array, Array]:
    """Returns each row once with the sum of its gradients, padded with -1."""
    order = jnp.argsort(rows)
    rows, grads = rows[order], grads[order]
    first = jnp.concatenate([jnp.ones(1, bool), rows[1:] != rows[:-1]])
    segment = jnp.cumsum(first.astype(jnp.int32)) - 1
    total = jax.ops.segment_sum(grads, segment, rows.shape[0], indices_are_sorted=True)
    once = jnp.full_like(rows, -1).at[segment].max(rows, indices_are_sorted=True)
    return once, total


def beyond(rows: Int[Array, " n"], size: int) -> Int[Array, " n"]:
    """Replaces padding (-1) by distinct rows after the last: reading these gives zeros, writing them does nothing."""
    return jnp.where(rows < 0, size + jnp.arange(rows.shape[0], dtype=rows.dtype), rows)


def _swap(x: Array, axes: Axes) -> Array:
    """Exchanges parts of [owners * capacity, ...]: part k is sent to owner k, and part k received is from shard k."""
    return jax.lax.all_to_all(x, axes, 0, 0, tiled=True)


def _repeat(passes: Int[Array, ""], one: Callable[[Array, Any], Any], start: Any) -> Any:
    """Applies `one` to every pass; the first pass is outside of the loop, which usually has no iteration."""
    return jax.lax.fori_loop(1, passes, one, one(jnp.int32(0), start))
