"""Which rows of a global batch this process builds, and how they become global arrays.

The ranges are read off the sharding, not off the number of the process: an axis that does not divide the batch may
span hosts, and then two of them hold the same rows. Held by tests/core/test_rows.py and tests/recovery/.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from jaxops.core.mesh import batch_sharding

Rows = list[tuple[int, int]]


def local_rows(mesh: Mesh, size: int) -> Rows | None:
    """The rows of a batch of `size` that this process's devices hold, as ranges; None where it is all of them."""
    if jax.process_count() == 1:
        return None
    index = batch_sharding(mesh).addressable_devices_indices_map((size,))
    ranges = sorted({_bounds(slices[0], size) for slices in index.values() if slices is not None})
    merged: Rows = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _bounds(rows: slice, size: int) -> tuple[int, int]:
    return rows.start or 0, size if rows.stop is None else rows.stop


def global_arrays(mesh: Mesh, size: int) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """A function from this process's rows (as `local_rows` has them) to global arrays of `size` rows.

    With one process a batch goes to jit as it is. Entries may be nested, and may have one row for each of several
    examples, as the plans of tables have one for each batch shard.
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
    """Evaluation batches of `size` rows as global arrays: of `batches.rows(k, start, stop)` where there is that.

    `finish` is applied to what this process built: the plan of tables, say.
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


def put(value: np.ndarray, like: jax.Array) -> jax.Array:
    """The same host array on every process, as one global array placed as `like` is."""
    return cast(jax.Array, jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index]))
