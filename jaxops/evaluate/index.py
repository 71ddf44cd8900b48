"""Exact or approximate search in a catalogue whose vectors are sharded by row: each device's best items are merged.

There is no index structure that could grow stale: a search is one matrix product and a top-k (Chern et al. 2022,
"TPU-KNN"). Tested in tests/evaluate/test_index.py, against `ranking.top_k_unseen` on one device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxops.core.failures import UserError, nearest
from jaxops.core.mesh import batch_axes, batch_shards, serialise_dispatch

Best = tuple[Float[Array, "batch k"], Int32[Array, "batch k"]]
Method = Callable[[Float[Array, "batch size"], int, int, float], Best]
"""A search of one device: (its scores, k <= size, rows of all devices, recall target) -> best scores, their columns."""


def exact(scores: Float[Array, "batch size"], k: int, rows: int, recall_target: float) -> Best:
    """Returns the k best scores and their columns, equal scores by column.

    Args:
      scores: scores of one device's rows.
      k: number of columns to return.
      rows: number of rows on all devices; not used.
      recall_target: not used.
    """
    best, place = jax.lax.top_k(scores, k)
    return best, place


def approx(scores: Float[Array, "batch size"], k: int, rows: int, recall_target: float) -> Best:
    """Returns each of the k best scores, and its column, with a chance of `recall_target` or more.

    Only a TPU gains by it; elsewhere it is exact and slower than `exact`.

    Args:
      scores: scores of one device's rows.
      k: number of columns to return.
      rows: number of rows on all devices, for which the recall is computed.
      recall_target: share of the true best k to find, in expectation.
    """
    best, place = jax.lax.approx_max_k(
        scores, k, recall_target=recall_target, reduction_input_size_override=rows, aggregate_to_topk=True
    )
    return best, place


METHODS: dict[str, Method] = {"exact": exact, "approx": approx}


class Index:
    """The vectors of a catalogue, [rows, dim], sharded by row over the batch axes of an Explicit mesh.

    A search holds float32 scores [batch, rows / shards] on each device: the batch size of a search is limited by
    memory.
    """

    def __init__(
        self,
        vectors: Float[Array, "rows dim"] | Float[np.ndarray, "rows dim"],
        mesh: Mesh,
        *,
        real: int | Bool[Array, " mask"] | Bool[np.ndarray, " mask"],
        method: str = "auto",
        recall_target: float = 0.95,
    ):
        """Places the vectors on the mesh; each process reads only its own devices' rows of a host array.

        Args:
          vectors: row i is item i; row 0 is no item. A host array (the same on every process), or one on `mesh`.
          mesh: a mesh with Explicit axes.
          real: the items are rows 1..real, or a mask of the rows that are items.
          method: `exact`, `approx`, or `auto`: `approx` on a TPU and `exact` elsewhere.
          recall_target: share of the true best k that `approx` should find, in expectation.

        Raises:
          UserError: the method is unknown, the recall target is not between 0 and 1, or items have no row.
        """
        if method != "auto" and method not in METHODS:
            known = ["auto", *METHODS]
            raise UserError(f"index: unknown method {method!r}{nearest(method, known)}; known are {', '.join(known)}")
        if not 0 < recall_target < 1:
            raise UserError(f"index: recall_target {recall_target} is not between 0 and 1; to miss nothing, take exact")
        if method == "auto":
            method = "approx" if mesh.devices.flat[0].platform == "tpu" else "exact"
        self.mesh, self.method, self.recall_target = mesh, method, recall_target
        self.axes, self.rows = batch_axes(mesh), len(vectors)
        self._real = _placed(_mask(real, self.rows), mesh)
        self._vectors = _placed(vectors, mesh)
        self._compiled = jax.jit(self._search, static_argnames=("k", "method"))

    def search(
        self,
        queries: Float[Array, "batch dim"] | Float[np.ndarray, "batch dim"],
        k: int,
        seen: Int32[Array, "batch seen"] | Int32[np.ndarray, "batch seen"] | None = None,
    ) -> tuple[Float[Array, "batch k"], Int32[Array, "batch k"]]:
        """Returns the items with the k highest dot products and their scores, best first, equal scores by item.

        Call it from the host, on every process with the same arguments. Queries are rounded to the dtype of the
        vectors, and products are summed in float32. On another number of devices the product may round differently in
        the last bit; the order and the merge of given scores are the same everywhere.

        Args:
          queries: one query in each row.
          k: number of items; a program is compiled for each k and each shape.
          seen: items to leave out for each query; an entry that is no item (0, -1) leaves out nothing.

        Returns:
          scores float32 and items int32, [batch, k], on every device. Where fewer than k items are left, a row ends in
            item 0, score -inf. A score that is not finite is never returned.

        Raises:
          UserError: k is below 1, or the queries are not as wide as the vectors.
        """
        return self._run(queries, k, seen, self.method)

    def recall(
        self,
        queries: Float[Array, "batch dim"] | Float[np.ndarray, "batch dim"],
        k: int,
        seen: Int32[Array, "batch seen"] | Int32[np.ndarray, "batch seen"] | None = None,
    ) -> float:
        """Returns the share of the exact top k of these queries that `search` finds; NaN if there is nothing to find.

        Raises:
          UserError: the same errors as `search`.
        """
        wanted, found = (np.asarray(self._run(queries, k, seen, way)[1]) for way in ("exact", self.method))
        row = np.arange(len(wanted))[:, None] * self.rows
        hits = np.isin(wanted + row, found + row) & (wanted > 0)
        left = np.count_nonzero(wanted)
        return np.count_nonzero(hits) / left if left else float("nan")

    def _run(
        self,
        queries: Array | np.ndarray,
        k: int,
        seen: Array | np.ndarray | None,
        method: str,
    ) -> Best:
        if k < 1:
            raise UserError(f"index: cannot search for {k} items: take 1 or more")
        wide = self._vectors.shape[1]
        if queries.shape[1] != wide:
            raise UserError(f"index: queries are {queries.shape[1]} wide, the vectors {wide}")
        seen = np.zeros((len(queries), 0), np.int32) if seen is None else seen
        with jax.set_mesh(self.mesh):
            result = self._compiled(self._vectors, self._real, queries, seen, k=k, method=method)
        return jax.block_until_ready(result) if serialise_dispatch(self.mesh) else result

    def _search(self, vectors: Array, real: Array, queries: Array, seen: Array, *, k: int, method: str) -> Best:
        queries, seen = (jax.sharding.reshard(x, P()) for x in (queries.astype(vectors.dtype), seen))
        best = lambda scores, n: METHODS[method](scores, n, len(vectors), self.recall_target)
        local = functools.partial(best_of_shard, axes=self.axes, k=k, best=best)
        shards = P(self.axes)
        return jax.shard_map(local, in_specs=(shards, shards, P(), P()), out_specs=P(), check_vma=False)(
            vectors, real, queries, seen
        )


def best_of_shard(
    vectors: Float[Array, "size dim"],
    real: Bool[Array, " size"],
    queries: Float[Array, "batch dim"],
    seen: Int[Array, "batch seen"],
    *,
    axes: tuple[str, ...],
    k: int,
    best: Callable[[Array, int], Best],
) -> Best:
    """Searches one device's rows, inside a `shard_map` over `axes`, and merges the best items of all devices.

    Args:
      vectors: this device's rows.
      real: True for the rows that are items.
      queries: one query in each row, the same on every device.
      seen: items to leave out for each query.
      axes: mesh axes that the rows are sharded over.
      k: number of items to return.
      best: returns the best scores of each query, and their columns.
    """
    size = vectors.shape[0]
    first = jax.lax.axis_index(axes) * size if axes else jnp.int32(0)
    # By default a TPU would round float32 to bfloat16 before it multiplies.
    precision = jax.lax.Precision.HIGHEST if vectors.dtype == jnp.float32 else None
    scores = jnp.einsum("bd,sd->bs", queries, vectors, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(scores == 0, jnp.zeros_like(scores), scores)  # top-k would order -0.0 behind 0.0
    scores = jnp.where(real[None] & jnp.isfinite(scores), scores, -jnp.inf)
    place = seen.astype(jnp.int32) - first
    place = jnp.where((place >= 0) & (place < size), place, size)
    row = jax.lax.broadcasted_iota(jnp.int32, place.shape, 0)
    scores = scores.at[row, place].set(-jnp.inf, mode="drop")
    found, place = best(scores, min(k, size))
    items = jnp.where(found > -jnp.inf, place.astype(jnp.int32) + first, 0)
    if axes:
        found, items = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (found, items))
    # Equal scores are ordered by item, whatever order the method and the devices return them in.
    behind, items = jax.lax.sort((-found, items), dimension=1, num_keys=2)
    missing = ((0, 0), (0, max(k - items.shape[1], 0)))
    return jnp.pad(-behind, missing, constant_values=-jnp.inf)[:, :k], jnp.pad(items, missing)[:, :k]


def _mask(real: int | Array | np.ndarray, rows: int) -> np.ndarray:
    """Returns a mask [rows] that is True for the rows that are items."""
    if isinstance(real, int):
        if not 0 <= real < rows:
            raise UserError(f"index: {real} items need {real + 1} rows (row 0 is no item), but there are {rows}")
        return (np.arange(rows) >= 1) & (np.arange(rows) <= real)
    if real.shape != (rows,):
        raise UserError(f"index: `real` has the shape {real.shape}, but there are {rows} rows")
    mask = np.array(real, bool)
    mask[:1] = False
    return mask


def _placed(x: Array | np.ndarray, mesh: Mesh) -> Array:
    """Shards an array by row over the batch axes, after padding it to whole shards."""
    spec = P(batch_axes(mesh))
    extra = ((0, -len(x) % batch_shards(mesh)), *[(0, 0)] * (x.ndim - 1))
    if isinstance(x, jax.Array) and getattr(x.sharding, "mesh", None) == mesh:
        with jax.set_mesh(mesh):
            padded = jax.jit(jax.sharding.auto_axes(lambda x: jnp.pad(x, extra), out_sharding=spec))(x)
        return jax.block_until_ready(padded) if serialise_dispatch(mesh) else padded
    whole = np.asarray(x)
    shape = (len(whole) + extra[0][1], *whole.shape[1:])

    def part(at: Any) -> np.ndarray:
        first, last, _ = at[0].indices(shape[0])
        rows = whole[first:last]
        return np.pad(rows, ((0, last - first - len(rows)), *extra[1:]))

    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)
