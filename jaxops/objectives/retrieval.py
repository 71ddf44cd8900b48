"""Losses of two-tower retrieval: a softmax of a user's item against the items of its block, corrected for popularity.

Examples are coupled only inside blocks of neighbours, which microbatching never splits (`Task.block`). Tested in
tests/objectives/test_retrieval.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree
from pydantic import Field

from jaxops.config.part import Part
from jaxops.core.sums import Sum, Sums

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InBatchSoftmax(Part):
    """A softmax of each example's item against the items of its `block` of neighbours.

    Attributes:
      temperature: divides the scores.
      logq: True subtracts the log of how often an item appears, estimated during training.
      decay: factor by which those counts fade at each step.
      block: number of examples in a block; null is the whole batch over all devices, which then has no microbatches.
    """

    sort: ClassVar[str] = "retrieval"

    kind: Literal["in_batch_softmax"] = "in_batch_softmax"
    temperature: Annotated[float, Field(gt=0)] = 0.05
    logq: bool = True
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    block: Annotated[int, Field(ge=2)] | None = None

    def problems_in(self, run: Any) -> list[tuple[str, str]]:
        """Returns everything in the `run` config that does not go with this objective, as (dotted path, message)."""
        if self.block and run.batch.global_ % self.block:
            return [("objective.block", f"{self.block} does not divide batch.global {run.batch.global_}")]
        return []

    def build(self, model: "Towers", batch_size: int) -> Callable[..., Sums]:
        """Builds the objective for this model and batches of this size."""
        return in_batch_softmax(model, self.block or batch_size, temperature=self.temperature)


@runtime_checkable
class Towers(Protocol):
    """The part of a model that the loss needs: vectors of users and of items, whose dot product is the score."""

    def users(self, params: PyTree, batch: Batch, key: Array | None) -> Float[Array, "batch dim"]: ...

    def items(self, params: PyTree, batch: Batch, key: Array | None) -> Float[Array, "batch dim"]: ...


def in_batch_cross_entropy(
    scores: Float[Array, "*blocks n n"],
    item: Int[Array, "*blocks n"],
    log_q: Float[Array, "*blocks n"] | None = None,
    weight: Float[Array, "*blocks n"] | None = None,
) -> Float[Array, "*blocks n"]:
    """Returns -log of the softmax share of each row's own item (the diagonal) among the items of its block, float32.

    Args:
      scores: score of user r with the item of example c.
      item: the item of each example. Another example with the row's own item is left out (an accidental hit).
      log_q: log of how often each item appears in a batch. It is subtracted from the item's score, since popular items
        are negatives more often (Yi et al. 2019). The target is corrected like the others.
      weight: weight of each example; one of weight zero (padding) is a negative of no other example.
    """
    scores = scores.astype(jnp.float32)
    if log_q is not None:
        scores = scores - log_q.astype(jnp.float32)[..., None, :]
    own = jnp.broadcast_to(jnp.eye(scores.shape[-1], dtype=bool), scores.shape)
    out = item[..., :, None] == item[..., None, :]
    if weight is not None:
        out |= jnp.broadcast_to((weight == 0)[..., None, :], out.shape)
    scores = jnp.where(out & ~own, -1e9, scores)
    return jax.nn.logsumexp(scores, axis=-1) - jnp.diagonal(scores, axis1=-2, axis2=-1)


def in_batch_softmax(
    model: Towers, block: int, *, temperature: float = 1.0
) -> Callable[[PyTree, Batch, Key[Array, ""] | None], Sums]:
    """Builds the loss; a batch holds "item" and "weight" [batch], and "log_q" [batch] where scores are to be corrected.

    Raises:
      ValueError: `block` is below two (there would be no negatives), or `temperature` is not positive.
    """
    if block < 2 or temperature <= 0:
        raise ValueError(f"in_batch_softmax: block must be at least 2 and temperature positive: {block}, {temperature}")

    def objective(params: PyTree, batch: Batch, key: Key[Array, ""] | None) -> Sums:
        cut = lambda x: x.reshape(-1, block, *x.shape[1:])
        users, items = cut(model.users(params, batch, key)), cut(model.items(params, batch, key))
        scores = jnp.einsum("kud,kid->kui", users, items, preferred_element_type=jnp.float32) / temperature
        log_q = cut(batch["log_q"]) if "log_q" in batch else None
        loss = in_batch_cross_entropy(scores, cut(batch["item"]), log_q, cut(batch["weight"]))
        return {"loss/in_batch_softmax": Sum.of(loss, cut(batch["weight"]))}

    return objective


class Frequencies(NamedTuple):
    """Fading counts of how often each item appeared.

    Attributes:
      counts: count of each item, as of the step in `last`.
      last: step at which the item last appeared.
      step: number of batches counted.
    """

    counts: Float[Array, " items"]
    last: Int[Array, " items"]
    step: Int[Array, ""]


def no_frequencies(items: int) -> Frequencies:
    """Returns the counts before the first batch."""
    return Frequencies(jnp.zeros(items), jnp.zeros(items, jnp.int32), jnp.int32(0))


def count_items(seen: Frequencies, item: Int[Array, " batch"], decay: float = 0.999) -> Frequencies:
    """Returns the counts after one more batch; an item that appears twice in the batch counts twice.

    The estimator of Yi et al. 2019 keeps the number of steps between two appearances of an item, and cannot tell two
    appearances in one batch from one (tensorflow/recommenders issue 635).
    """
    step = seen.step + 1
    faded = seen.counts[item] * decay ** (step - seen.last[item]).astype(jnp.float32)
    count = seen.counts.at[item].set(faded).at[item].add(1.0)
    return Frequencies(count, seen.last.at[item].set(step), step)


def log_frequency(seen: Frequencies, item: Int[Array, " n"], decay: float = 0.999) -> Float[Array, " n"]:
    """Returns the log of the estimated share of each item among the examples; the least count is 0.5."""
    count = seen.counts[item] * decay ** (seen.step - seen.last[item]).astype(jnp.float32)
    total = jnp.sum(seen.counts * decay ** (seen.step - seen.last).astype(jnp.float32))
    return jnp.log(jnp.maximum(count, 0.5) / jnp.maximum(total, 1.0))
