"""Gradients of an objective: microbatches, normalisation by global counts, and the reduction over devices.

The loss is the weighted sum of total / count over the terms named `loss/...`, each over the count of the whole
global batch. The counts come first in a pass of their own (XLA removes the model from it), so the number of
microbatches cannot change an update. Tested in tests/property/test_layouts.py.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from jaxops.core.failures import UserError
from jaxops.core.mesh import batch_axes
from jaxops.core.sums import LOSS, Max, Sum, Sums, merge, wide_dtype

Batch = dict[str, Any]
Objective = Callable[[PyTree, Batch, Array | None], Sums]
Reduction = Literal["plain", "after_loop"]
Gradients = Callable[[PyTree, PyTree, PyTree, Batch, Array], tuple[Sums, PyTree, PyTree]]


def choose_reduction(
    sizes: Mapping[str, int], *, replicated: bool, accumulation: int, tables: bool
) -> tuple[Reduction, str]:
    """Chooses where gradients are summed over devices, and says why; every row of this table is covered by a test.

    `after_loop` accumulates on each device and reduces once. It requires that every device holds all parameters and
    that the mesh divides nothing but the batch. All else is `plain`: XLA places the reductions, inside the loop too.

    Args:
      sizes: the size of each mesh axis.
      replicated: whether every device holds all parameters.
      accumulation: the number of microbatches.
      tables: whether the model has embedding tables.
    """
    if accumulation == 1:
        return "plain", "one microbatch: XLA reduces once after the backward pass"
    if tables:
        return "plain", "looked-up rows are exchanged by shard_map of their own"
    if not replicated:
        return "plain", "parameters are sharded: each microbatch gathers and scatters them"
    cut = [axis for axis in ("tensor", "sequence") if sizes.get(axis, 1) > 1]
    if cut:
        return "plain", f"the {cut[0]} axis cuts the computation inside an example"
    if sizes.get("replica", 1) * sizes.get("data", 1) * sizes.get("fsdp", 1) == 1:
        return "plain", "nothing to reduce over"
    return "after_loop", "replicated parameters, batch axes only: one reduction after the accumulation loop"


def weighted_loss(sums: Sums, counts: Mapping[str, Float[Array, ""]], weights: Mapping[str, float]) -> Float[Array, ""]:
    """Returns the scalar to minimise: the sum of weight * total / count over loss terms, zero for a count of zero."""
    loss = jnp.zeros((), jnp.float32)
    for name, count in counts.items():
        entry = sums[name]
        assert isinstance(entry, Sum)
        share = jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)
        loss += weights.get(name, 1.0) * entry.total * share
    return loss


def loss_counts(sums: Sums) -> dict[str, Float[Array, ""]]:
    """Returns the counts of the loss terms by name; no gradient flows through them."""
    return {
        name: jax.lax.stop_gradient(entry.count)
        for name, entry in sums.items()
        if name.startswith(LOSS) and isinstance(entry, Sum)
    }


def check_sums(sums: Any, weights: Mapping[str, float]) -> None:
    """Refuses, while tracing, sums that an objective must not return.

    Raises:
      UserError: the sums are no dict of Sum and Max, have no `loss/...` term or one that is not a scalar Sum, or a
        weight names a term that does not exist.
    """
    if not isinstance(sums, dict) or not all(isinstance(entry, Sum | Max) for entry in sums.values()):
        got = {k: type(v).__name__ for k, v in sums.items()} if isinstance(sums, dict) else type(sums).__name__
        raise UserError(f"objective: expected a dict of Sum or Max (Sum.of(per_example, weight)), got {got}")
    terms = [name for name in sums if name.startswith(LOSS)]
    if not terms:
        raise UserError(f"objective: nothing to minimise: no entry is named 'loss/...' (there are: {', '.join(sums)})")
    for name in terms:
        entry = sums[name]
        if not isinstance(entry, Sum) or entry.total.ndim or entry.count.ndim:
            raise UserError(f"objective: {name} must be a scalar Sum")
    unknown = [name for name in weights if name not in terms]
    if unknown:
        raise UserError(f"objective: weight for {unknown[0]}, but the loss terms are {', '.join(terms)}")


def zeros_like_sums(shapes: Sums) -> Sums:
    """Returns the identity of `merge` for sums of these shapes."""
    return {
        name: Sum(jnp.zeros(s.total.shape, jnp.float32), jnp.zeros(s.count.shape, jnp.float32), s.finalize)
        if isinstance(s, Sum)
        else Max(jnp.full(s.maximum.shape, -jnp.inf, jnp.float32), s.finalize)
        for name, s in shapes.items()
    }


def microbatches(batch: Batch, count: int, block: int) -> Batch:
    """Reshapes [batch, ...] to [count, batch / count, ...] without splitting a block of `block` neighbours.

    Microbatch k takes every count-th block from block k on, so each device keeps its own rows and no data moves.

    Raises:
      UserError: the batch does not divide.
    """

    def cut(x: Array) -> Array:
        size, rest = x.shape[0], x.shape[1:]
        if size % (count * block):
            blocks = f" of blocks of {block}" if block > 1 else ""
            raise UserError(f"batch: {size} examples do not divide into {count} microbatches{blocks}")
        x = x.reshape(size // (count * block), count, block, *rest)
        return jnp.moveaxis(x, 1, 0).reshape(count, size // count, *rest)

    return jax.tree.map(cut, batch)


def build_gradients(
    objective: Objective,
    mesh: Mesh,
    *,
    accumulation: int = 1,
    block: int = 1,
    weights: Mapping[str, float] | None = None,
    reduction: Reduction = "plain",
) -> Gradients:
    """Builds (params, frozen, rows, batch, key) -> (sums, d/d params, d/d rows), each for the whole global batch.

    Gradients have the dtype of their parameters or rows, and are accumulated in the `wide_dtype` of it.

    Args:
      objective: is called with ((params, frozen), batch, key); looked-up rows are in `batch["rows"]`.
      mesh: the mesh that the batch is sharded over.
      accumulation: the number of microbatches.
      block: the number of neighbouring examples that no microbatch splits.
      weights: the weight of each loss term (default 1).
      reduction: the place of the sum over devices, from `choose_reduction`.
    """
    weights = weights or {}

    def evaluate(params: PyTree, frozen: PyTree, rows: PyTree, batch: Batch, key: Array) -> Sums:
        sums = objective((params, frozen), batch if rows is None else {**batch, "rows": rows}, key)
        check_sums(sums, weights)
        return sums

    if reduction == "plain":
        run = jax.sharding.auto_axes(evaluate, out_sharding=P())
        return _accumulated(run, lambda counts: counts, accumulation, block, weights)
    axes = batch_axes(mesh)
    summed = lambda tree: jax.lax.psum(tree, axes)
    local = _accumulated(evaluate, summed, accumulation, block, weights)

    def after_loop(
        params: PyTree, frozen: PyTree, rows: PyTree, batch: Batch, key: Array
    ) -> tuple[Sums, PyTree, PyTree]:
        sums, grads, row_grads = local(params, frozen, rows, batch, key)
        return _over_devices(sums, axes), summed(grads), summed(row_grads)

    # check_vma=False: the user's scans start from constants, which the varying-axes check would refuse; nothing is
    # differentiated through the psums, so gradients stay local until the one reduction.
    return jax.shard_map(
        after_loop,
        mesh=mesh,
        in_specs=(P(), P(), P(), P(axes), P()),
        out_specs=(P(), P(), P()),
        check_vma=False,
    )


def _accumulated(
    run: Callable[..., Sums],
    reduce_counts: Callable[[Any], Any],
    accumulation: int,
    block: int,
    weights: Mapping[str, float],
) -> Gradients:
    """Returns the gradients of `run`, microbatch by microbatch; `reduce_counts` sums counts over the global batch."""

    def gradients(
        params: PyTree, frozen: PyTree, rows: PyTree, batch: Batch, key: Array
    ) -> tuple[Sums, PyTree, PyTree]:
        if accumulation > 1:
            with _told_of_blocks(batch, accumulation, block):
                return accumulated(params, frozen, rows, batch, key)
        return accumulated(params, frozen, rows, batch, key)

    def accumulated(
        params: PyTree, frozen: PyTree, rows: PyTree, batch: Batch, key: Array
    ) -> tuple[Sums, PyTree, PyTree]:
        def loss(params: PyTree, rows: PyTree, micro: Batch, counts: Any) -> tuple[Array, Sums]:
            sums = run(params, frozen, rows, micro, key)
            return weighted_loss(sums, loss_counts(sums) if counts is None else counts, weights), sums

        differentiate = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        if accumulation == 1:
            (_, sums), (grads, row_grads) = differentiate(params, rows, batch, None)
            return sums, grads, row_grads

        micro = microbatches(batch, accumulation, block)

        def count(total: Any, part: Batch) -> tuple[Any, None]:
            counts = loss_counts(run(params, frozen, rows, part, key))
            return jax.tree.map(jnp.add, total, counts), None

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            sums, grads = carry
            (_, more), step = differentiate(params, rows, part, counts)
            grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, step)
            return (merge(sums, more), grads), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(run, params, frozen, rows, first, key)
        empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), loss_counts_shape(shapes))
        counts = reduce_counts(jax.lax.scan(count, empty, micro)[0])
        wide = jax.tree.map(lambda x: jnp.zeros_like(x, wide_dtype(x.dtype)), (params, rows))
        (sums, grads), _ = jax.lax.scan(add, (zeros_like_sums(shapes), wide), micro)
        grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, (params, rows))
        return sums, *grads

    return gradients


@contextlib.contextmanager
def _told_of_blocks(batch: Batch, count: int, block: int) -> Iterator[None]:
    """Adds the size of the microbatch and the block to an error of shapes inside an objective."""
    try:
        yield
    except (TypeError, ValueError) as error:
        size = jax.tree.leaves(batch)[0].shape[0]
        error.add_note(
            f"the objective was given a microbatch of {size // count} of {size} examples; one that couples neighbours"
            f" says of how many by block= (it is {block})"
        )
        raise


def _over_devices(sums: Sums, axes: tuple[str, ...]) -> Sums:
    """Merges the sums of all devices, inside a `shard_map`."""
    return {
        name: Sum(jax.lax.psum(s.total, axes), jax.lax.psum(s.count, axes), s.finalize)
        if isinstance(s, Sum)
        else Max(jax.lax.pmax(s.maximum, axes), s.finalize)
        for name, s in sums.items()
    }


def loss_counts_shape(shapes: Sums) -> dict[str, Any]:
    """Returns the shapes of `loss_counts`, from the shapes of the sums."""
    return {name: s.count for name, s in shapes.items() if name.startswith(LOSS) and isinstance(s, Sum)}
