"""Rows of a global batch: those that this process builds, their assembly into global arrays, and the way back.

The ranges come from the sharding, not from the number of the process: an axis that does not divide the batch may
span hosts, and then two of them hold the same rows. Work that must be done once for each row (a judge that costs
money) uses `owned_rows`, and `gather_rows` brings its results to all processes.
Tested in tests/core/test_rows.py, tests/core/test_rows_processes.py and tests/recovery/.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxops.core import distributed
from jaxops.core.mesh import batch_sharding

Rows = list[tuple[int, int]]


def local_rows(mesh: Mesh, size: int) -> Rows | None:
    """Returns the rows of a batch of `size` that this process's devices hold, as ranges; None with one process."""
    if jax.process_count() == 1:
        return None
    index = batch_sharding(mesh).addressable_devices_indices_map((size,))
    return _merged(_bounds(slices[0], size) for slices in index.values() if slices is not None)


def _merged(ranges: Iterable[tuple[int, int]]) -> Rows:
    """Sorts ranges of rows, and merges those that touch."""
    merged: Rows = []
    for start, stop in sorted(set(ranges)):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _bounds(rows: slice, size: int) -> tuple[int, int]:
    return rows.start or 0, size if rows.stop is None else rows.stop


def global_arrays(mesh: Mesh, size: int) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Returns a function from this process's rows (those of `local_rows`) to global arrays of `size` rows.

    With one process the function returns the batch as it is. Entries may be nested. An entry may have one row for each
    of several examples, as the plans of tables have one for each batch shard.
    """
    ranges = local_rows(mesh, size)
    if ranges is None:
        return lambda batch: batch
    sharding = batch_sharding(mesh)
    offsets, at = {}, 0
    for start, stop in ranges:
        offsets[start, stop] = at - start
        at += stop - start

    def rows(values: np.ndarray, index: Any, each: int) -> np.ndarray:
        start, stop = (bound * each for bound in _bounds(index[0], size // each))
        shift = next(shift for (low, high), shift in offsets.items() if low <= start and stop <= high)
        return values[(start + shift) // each : (stop + shift) // each]

    def one(values: np.ndarray) -> jax.Array:
        each = at // len(values)
        shape = (size // each, *values.shape[1:])
        return jax.make_array_from_callback(
            shape, sharding, lambda index: rows(values, index, each), dtype=values.dtype
        )

    return lambda batch: cast(Mapping[str, Any], jax.tree.map(one, dict(batch)))


def local_batches(
    batches: Any, mesh: Mesh, size: int, finish: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
) -> Iterator[Mapping[str, Any]]:
    """Yields evaluation batches of `size` rows as global arrays.

    Args:
      batches: the batches; where it has `rows(k, start, stop)`, each process builds only its own rows of batch k.
      mesh: the mesh that the batches are sharded over.
      size: the number of rows of a batch.
      finish: is applied to the part that this process built, for example to add the plan of tables.
    """
    ranges = local_rows(mesh, size)
    if ranges is None:
        yield from map(finish, batches)
        return
    place = global_arrays(mesh, size)
    by_rows = hasattr(batches, "rows")
    for k, whole in enumerate(range(len(batches)) if by_rows else batches):
        parts = [
            batches.rows(k, start, stop) if by_rows else {name: x[start:stop] for name, x in whole.items()}
            for start, stop in ranges
        ]
        yield place(finish({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}))


def abstract_placed(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Returns the shapes and dtypes of a batch with the sharding of its rows; entries may be nested."""
    rows = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), dict(batch))


def put(value: np.ndarray, like: jax.Array) -> jax.Array:
    """Makes one global array, sharded as `like` is, from a host array that is the same on every process."""
    return cast(jax.Array, jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index]))


def local(mesh: Mesh, tree: PyTree) -> PyTree:
    """Returns the rows of global arrays that this process holds, as numpy: the inverse of `global_arrays`.

    The leading dimension of a leaf is sharded over the batch axes, or is the same on all processes. The rows are in the
    order of `local_rows`; with one process they are all rows.

    Raises:
      ValueError: a leaf has no rows, or this process does not hold its rows completely, because another dimension
        is divided over processes, or because the rows are sharded unlike those of a batch.
    """
    return jax.tree.map(lambda leaf: _local(mesh, leaf), tree)


def _local(mesh: Mesh, leaf: Any) -> np.ndarray:
    if not np.ndim(leaf):
        raise ValueError("rows.local: a leaf has no dimension, so it has no rows")
    ranges = local_rows(mesh, len(leaf))
    if ranges is None or not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        whole = np.asarray(leaf)
        return whole if ranges is None else np.concatenate([whole[start:stop] for start, stop in ranges])
    rows = np.concatenate([np.arange(start, stop) for start, stop in ranges])
    position = np.full(len(leaf), -1)
    position[rows] = np.arange(len(rows))
    values = np.empty((len(rows), *leaf.shape[1:]), leaf.dtype)
    entries = np.zeros(len(rows), np.int64)
    seen = set()
    for shard in leaf.addressable_shards:
        part = tuple(_bounds(index, size) for index, size in zip(shard.index, leaf.shape, strict=True))
        if part not in seen and shard.data.size:
            seen.add(part)
            at = position[shard.index[0]]
            values[(at[at >= 0], *shard.index[1:])] = np.asarray(shard.data)[at >= 0]
            entries[at[at >= 0]] += shard.data.size // len(at)
    if (entries != leaf.size // len(leaf)).any():
        raise ValueError(
            f"rows.local: {leaf.dtype}{list(leaf.shape)} on {leaf.sharding} is not whole in the rows {ranges} of"
            f" process {jax.process_index()}: only the leading dimension may be divided over processes, as a batch's is"
        )
    return values


def owned_rows(mesh: Mesh, size: int, process: int | None = None) -> Rows:
    """Returns the rows of a batch of `size` that this process (or `process`) owns, as ranges.

    Every row is owned by exactly one process, and that process holds it. Where several processes hold the same rows (a
    tensor axis spans them), they divide the rows evenly. All processes compute the same division.
    """
    return _ownership(mesh, size)[jax.process_index() if process is None else process]


def _ownership(mesh: Mesh, size: int) -> dict[int, Rows]:
    """Returns the rows that each process of the mesh owns."""
    holders: dict[tuple[int, int], set[int]] = collections.defaultdict(set)
    index: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((size,))
    for device, slices in index.items():
        holders[_bounds(slices[0], size)].add(device.process_index)
    owned: dict[int, Rows] = {process: [] for process in sorted(set.union(*holders.values()))}
    for at, (start, stop) in enumerate(sorted(holders)):
        sharing = sorted(holders[start, stop])
        cuts = [start + (stop - start) * k // len(sharing) for k in range(len(sharing) + 1)]
        for k, (low, high) in enumerate(itertools.pairwise(cuts)):
            if low < high:  # the process with the larger part changes from range to range
                owned[sharing[(k + at) % len(sharing)]].append((low, high))
    return {process: _merged(ranges) for process, ranges in owned.items()}


def owned(mesh: Mesh, tree: PyTree) -> PyTree:
    """Returns the rows of global arrays that this process owns, as numpy; raises the errors of `local`."""

    def one(leaf: Any) -> np.ndarray:
        size = len(leaf)
        held = local_rows(mesh, size) or [(0, size)]
        numbers = np.concatenate([np.arange(start, stop) for start, stop in held])
        mine = np.zeros(size, bool)
        for start, stop in owned_rows(mesh, size):
            mine[start:stop] = True
        return _local(mesh, leaf)[mine[numbers]]

    return jax.tree.map(one, tree)


def gather_rows(mesh: Mesh, size: int, tree: PyTree, what: str = "rows") -> PyTree:
    """Gathers all `size` rows on every process, in global order, from the rows that each process owns.

    Every process calls it. The dtypes stay as they are, float64 too.

    Args:
      mesh: the mesh that the batch is sharded over.
      size: the number of rows of the batch.
      tree: numpy leaves whose rows are those of `owned_rows(mesh, size)`, in that order.
      what: the name of the exchange in the message about a process that does not join it.

    Raises:
      ValueError: a leaf has another number of rows than this process owns.
      RunFailed: a process failed, or did not join within JAXOPS_BARRIER_SECONDS.
    """
    ownership = _ownership(mesh, size)
    counts = {process: sum(stop - start for start, stop in rows) for process, rows in ownership.items()}
    mine = counts.get(jax.process_index(), 0)
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    for leaf in leaves:
        if not leaf.ndim or len(leaf) != mine:
            raise ValueError(
                f"gather_rows: {leaf.dtype}{list(leaf.shape)}, but process {jax.process_index()} owns {mine} of the"
                f" {size} rows"
            )
    if not distributed.is_distributed():
        return tree if not leaves else jax.tree.unflatten(structure, leaves)
    distributed.barrier(what)  # has a time limit and names missing processes; the collective below does neither
    most = max(counts.values())
    return jax.tree.unflatten(structure, [_gathered(leaf, size, ownership, most) for leaf in leaves])


def _gathered(leaf: np.ndarray, size: int, ownership: Mapping[int, Rows], most: int) -> np.ndarray:
    width = leaf.dtype.itemsize * int(np.prod(leaf.shape[1:]))
    padded = np.zeros((most, width), np.uint8)  # as bytes, since jax would turn float64 into float32
    padded[: len(leaf)] = np.ascontiguousarray(leaf).view(np.uint8).reshape(len(leaf), width)
    parts = multihost_utils.process_allgather(padded)
    whole = np.empty((size, width), np.uint8)
    for process, rows in ownership.items():
        at = 0
        for start, stop in rows:
            whole[start:stop] = parts[process][at : at + stop - start]
            at += stop - start
    return whole.view(leaf.dtype).reshape(size, *leaf.shape[1:])
