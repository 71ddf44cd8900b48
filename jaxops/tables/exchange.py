"""Rows to the devices that read them, and their gradients back to those that hold them: two all_to_alls each way.

All of it runs inside `shard_map` over the batch axes, on what one device holds. What a shard reads is cut into passes
by row, not by place, so that an owner sees all gradients of a row in one pass and applies its optimizer once. There is
one pass unless a plan says that its rows do not fit the capacity.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Axes = tuple[str, ...]
Update = Callable[[Any, Int[Array, " n"], Float[Array, "n dim"]], Any]


def gather(
    table: Float[Array, "size dim"], stored: Int[Array, " ids"], passes: Int[Array, ""], axes: Axes, capacity: int
) -> Float[Array, "ids dim"]:
    """The rows that this shard reads, zeros where `stored` is -1."""
    owners = _count(axes)

    def one(at: Array, found: Array) -> Array:
        asked, place, mine = _requests(stored, at, passes, table.shape[0], owners, capacity)
        wanted = _swap(asked, axes)
        rows = _swap(table.at[beyond(wanted, table.shape[0])].get(mode="fill", fill_value=0), axes)
        return jnp.where(mine[:, None], rows.at[place].get(mode="fill", fill_value=0), found)

    empty = jnp.zeros((stored.shape[0], table.shape[1]), table.dtype)
    return _repeat(passes, one, empty)


def scatter(
    state: Any,
    size: int,
    stored: Int[Array, " ids"],
    passes: Int[Array, ""],
    grads: Float[Array, "ids dim"],
    keep: Bool[Array, ""],
    update: Update,
    axes: Axes,
    capacity: int,
) -> Any:
    """`update(state, rows, gradients)` on the owners, of each touched row once and with its gradients summed.

    `size` is how many rows this device holds; rows that `update` is given beyond it are padding.
    """
    owners = _count(axes)

    def one(at: Array, state: Any) -> Any:
        asked, place, _ = _requests(stored, at, passes, size, owners, capacity)
        sent = jnp.zeros((owners * capacity, grads.shape[1]), grads.dtype)
        sent = sent.at[place].set(grads, mode="drop", unique_indices=True)
        rows, got = _swap(asked, axes), _swap(sent, axes)
        if owners > 1:
            rows, got = _summed(rows, got)
        return update(state, beyond(jnp.where(keep, rows, -1), size), got)

    return _repeat(passes, one, state)


def _requests(
    stored: Array, at: Array, passes: Array, size: int, owners: int, capacity: int
) -> tuple[Array, Array, Array]:
    """What to ask of each owner in pass `at` [owners * capacity], rows counted from its first, -1 for nothing; where
    each of `stored` is among them (beyond the end: nowhere); and which of `stored` this pass is about.
    """
    mine = (stored >= 0) & (stored % passes == at)
    owner = jnp.where(stored < 0, owners - 1, stored // size)
    count = jnp.cumsum(mine.astype(jnp.int32))
    before = jnp.zeros(owners, jnp.int32).at[owner].max(count, mode="drop", indices_are_sorted=True)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jax.lax.cummax(before)[:-1]])
    place = jnp.where(mine, owner * capacity + count - 1 - before[owner], owners * capacity)
    place = jnp.where(mine, place, owners * capacity + jnp.arange(stored.shape[0], dtype=jnp.int32))
    asked = jnp.full(owners * capacity, -1, jnp.int32)
    return asked.at[place].set(stored % size, mode="drop", unique_indices=True), place, mine


def _summed(rows: Int[Array, " n"], grads: Float[Array, "n dim"]) -> tuple[Array, Array]:
    """Each row once, with the sum of its gradients; -1 in the rest."""
    order = jnp.argsort(rows)
    rows, grads = rows[order], grads[order]
    first = jnp.concatenate([jnp.ones(1, bool), rows[1:] != rows[:-1]])
    segment = jnp.cumsum(first.astype(jnp.int32)) - 1
    total = jax.ops.segment_sum(grads, segment, rows.shape[0], indices_are_sorted=True)
    once = jnp.full_like(rows, -1).at[segment].max(rows, indices_are_sorted=True)
    return once, total


def beyond(rows: Int[Array, " n"], size: int) -> Int[Array, " n"]:
    """Padding (-1) as distinct rows after the last: reading them gives zeros, writing them does nothing."""
    return jnp.where(rows < 0, size + jnp.arange(rows.shape[0], dtype=rows.dtype), rows)


def _swap(x: Array, axes: Axes) -> Array:
    """[owners * capacity, ...]: part k goes to owner k, and comes from shard k."""
    return jax.lax.all_to_all(x, axes, 0, 0, tiled=True) if axes else x


def _repeat(passes: Int[Array, ""], one: Callable[[Array, Any], Any], start: Any) -> Any:
    """`one` of every pass; the first is not part of the loop, which mostly has nothing to do."""
    return jax.lax.fori_loop(1, passes, one, one(jnp.int32(0), start))


def _count(axes: Axes) -> int:
    return jax.lax.axis_size(axes) if axes else 1
