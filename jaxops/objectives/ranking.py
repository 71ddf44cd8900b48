"""Losses of next-item ranking: pure functions per position, made by factories that take the model.

A batch holds "items", "targets" and "weight", all [batch, length], and "id" [batch]. The weight of a position without a
target is zero. Shared negatives depend only on the step's key, so every microbatch and device draws the same ones.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree
from pydantic import Field

from jaxops.config.part import Part
from jaxops.core.random import example_keys, shared_draws
from jaxops.core.sharding import constrain
from jaxops.core.sums import Sum, Sums

Batch = Mapping[str, Any]
Objective = Callable[[PyTree, Batch, Key[Array, ""] | None], Sums]

_NEGATIVES = 2**31 - 1
"""A number that is folded into a key to draw negatives; it is far from the sites of dropout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(Part):
    """Cross-entropy over the whole catalogue."""

    sort: ClassVar[str] = "sequence"

    kind: Literal["softmax"] = "softmax"

    def build(self, model: "Ranker") -> "Objective":
        """Builds the objective for this model."""
        return softmax(model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledSoftmax(Part):
    """Softmax against uniform negatives that the whole step shares, with sampling correction.

    For a model that reads its items from a table, each example has its own negatives, which the host draws.
    """

    sort: ClassVar[str] = "sequence"

    kind: Literal["sampled_softmax"] = "sampled_softmax"
    negatives: Annotated[int, Field(ge=1)] = 256

    def build(self, model: "Ranker") -> "Objective":
        """Builds the objective for this model."""
        on_tables = getattr(model, "on_tables", False)
        return sampled_softmax_on_tables(model) if on_tables else sampled_softmax(model, self.negatives)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bce(Part):
    """Binary cross-entropy with negatives drawn for each position (SASRec as published)."""

    sort: ClassVar[str] = "sequence"

    kind: Literal["bce"] = "bce"
    negatives: Annotated[int, Field(ge=1)] = 1

    def build(self, model: "Ranker") -> "Objective":
        """Builds the objective for this model."""
        return bce_loss(model, self.negatives)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gbce(Part):
    """Generalised BCE (gSASRec), calibrated by `t` in [0, 1]."""

    sort: ClassVar[str] = "sequence"

    kind: Literal["gbce"] = "gbce"
    negatives: Annotated[int, Field(ge=1)] = 256
    t: Annotated[float, Field(ge=0, le=1)] = 0.75

    def build(self, model: "Ranker") -> "Objective":
        """Builds the objective for this model."""
        return gbce_loss(model, self.negatives, self.t)


@runtime_checkable
class Ranker(Protocol):
    """The part of a model that these losses need; items are rows 1..n_items of its item matrix."""

    n_items: int

    def encode(self, params: PyTree, batch: Batch, key: Array | None) -> Float[Array, "batch length dim"]: ...

    def item_vectors(self, params: PyTree) -> Float[Array, "rows dim"]: ...

    def logits(self, params: PyTree, hidden: Float[Array, "... dim"]) -> Float[Array, "... rows"]: ...


def softmax_cross_entropy(logits: Float[Array, "... rows"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns -log softmax(logits)[target], per entry, float32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def sampled_softmax_cross_entropy(
    positive: Float[Array, "..."], negatives: Float[Array, "... n"], hits: Array, expected: float
) -> Float[Array, "..."]:
    """Returns the cross-entropy over the target and `n` sampled negatives, per entry, float32.

    Each negative stands for 1 / `expected` items, hence the correction -log(expected) on its logit. The target is
    always present and needs no correction (Bengio & Senecal 2008; Jean et al. 2015).

    Args:
      positive: logit of the target.
      negatives: logits of the sampled negatives.
      hits: True for the negatives that are the target; these are left out.
      expected: expected number of draws of each item.
    """
    positive = positive.astype(jnp.float32)
    corrected = jnp.where(hits, -1e9, negatives.astype(jnp.float32) - math.log(expected))
    everything = jnp.concatenate([positive[..., None], corrected], axis=-1)
    return jax.nn.logsumexp(everything, axis=-1) - positive


def gbce(positive: Float[Array, "..."], negatives: Float[Array, "... n"], beta: float) -> Float[Array, "..."]:
    """Returns generalised binary cross-entropy, per entry: the mean over one positive and `n` negatives.

    The probability of the positive is raised to the power beta. beta = 1 is plain BCE over 1 + n logits (Petrov &
    Macdonald 2023, eq. 9).
    """
    positive, negatives = positive.astype(jnp.float32), negatives.astype(jnp.float32)
    total = beta * jax.nn.softplus(-positive) + jnp.sum(jax.nn.softplus(negatives), axis=-1)
    return total / (1 + negatives.shape[-1])


def gbce_beta(negatives: int, n_items: int, t: float) -> float:
    """Returns the power that calibrates gBCE: t = 1 undoes the overconfidence of sampling, t = 0 is BCE."""
    alpha = negatives / max(n_items - 1, 1)
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)


def _dot(form: str, *operands: Array) -> Array:
    """Computes an einsum whose result is float32 for any input dtype, because rounded scores would tie."""
    return jnp.einsum(form, *operands, preferred_element_type=jnp.float32)


def _looked_up(model: Ranker, params: PyTree) -> Float[Array, "rows dim"]:
    """Returns the item matrix, gathered over fsdp, so that a look-up does not gather whole batches."""
    return constrain(model.item_vectors(params), ("vocab", "embed"))


def _sums(name: str, loss: Array, batch: Batch) -> Sums:
    return {f"loss/{name}": Sum.of(loss, batch["weight"])}


def softmax(model: Ranker) -> Objective:
    """Builds the cross-entropy over the whole catalogue at every position."""

    def objective(params: PyTree, batch: Batch, key: Key[Array, ""] | None) -> Sums:
        logits = model.logits(params, model.encode(params, batch, key))
        logits = constrain(logits, ("batch", "length", "vocab"))
        return _sums("softmax", softmax_cross_entropy(logits, batch["targets"]), batch)

    return objective


def sampled_softmax(model: Ranker, negatives: int = 256) -> Objective:
    """Builds a softmax against `negatives` uniform draws (with replacement) that the whole step shares, corrected.

    Without a key (evaluation) no negatives can be drawn, and the loss is the full softmax.

    Raises:
      ValueError: `negatives` is below one.
    """
    if negatives < 1:
        raise ValueError(f"sampled_softmax: negatives must be at least 1, got {negatives}")
    full = softmax(model)

    def objective(params: PyTree, batch: Batch, key: Key[Array, ""] | None) -> Sums:
        if key is None:
            return {"loss/sampled_softmax": full(params, batch, None)["loss/softmax"]}
        hidden, vectors = model.encode(params, batch, key), _looked_up(model, params)
        drawn = jax.random.randint(jax.random.fold_in(key, _NEGATIVES), (negatives,), 1, model.n_items + 1)
        positive = _dot("bld,bld->bl", hidden, vectors[batch["targets"]])
        others = _dot("bld,nd->bln", hidden, vectors[drawn])
        hits = drawn[None, None] == batch["targets"][..., None]
        loss = sampled_softmax_cross_entropy(positive, others, hits, negatives / model.n_items)
        return _sums("sampled_softmax", loss, batch)

    return shared_draws(objective, "the negatives")


def sampled_softmax_on_tables(model: Ranker) -> Objective:
    """Builds a softmax against each example's own uniform negatives, batch["negatives"] [batch, n] (items), corrected.

    The rows of targets and negatives are read from the items' table: batch["rows"]["target_item"] [batch, length, dim]
    and ["negative_item"] [batch, n, dim]. The host draws the negatives, because a plan must know which rows a step
    reads.
    """

    def objective(params: PyTree, batch: Batch, key: Key[Array, ""] | None) -> Sums:
        hidden, rows = model.encode(params, batch, key), batch["rows"]
        positive = _dot("bld,bld->bl", hidden, rows["target_item"])
        others = _dot("bld,bnd->bln", hidden, rows["negative_item"])
        drawn, targets = batch["negatives"], batch["targets"]
        hits = drawn[:, None, :] == targets[..., None]
        loss = sampled_softmax_cross_entropy(positive, others, hits, drawn.shape[1] / model.n_items)
        return _sums("sampled_softmax", loss, batch)

    return objective


def _per_position(model: Ranker, negatives: int, name: str, beta: float) -> Objective:
    """Builds BCE against draws for each position, from the example's key; a draw is never the target."""

    def objective(params: PyTree, batch: Batch, key: Key[Array, ""] | None) -> Sums:
        hidden, vectors = model.encode(params, batch, key), _looked_up(model, params)
        targets = batch["targets"]
        keys = example_keys(jax.random.key(0) if key is None else key, batch["id"])
        shape = (targets.shape[1], negatives)
        # Draws from 1..n_items without the target: one item fewer, and the draw steps over the target.
        draw = jax.vmap(lambda k: jax.random.randint(jax.random.fold_in(k, _NEGATIVES), shape, 1, model.n_items))(keys)
        drawn = draw + (draw >= targets[..., None]).astype(draw.dtype)
        positive = _dot("bld,bld->bl", hidden, vectors[targets])
        others = _dot("bld,blnd->bln", hidden, vectors[drawn])
        return _sums(name, gbce(positive, others, beta), batch)

    return objective


def bce_loss(model: Ranker, negatives: int = 1) -> Objective:
    """Builds binary cross-entropy against `negatives` uniform draws for each position, as SASRec was published.

    Raises:
      ValueError: `negatives` is below one.
    """
    if negatives < 1:
        raise ValueError(f"bce: negatives must be at least 1, got {negatives}")
    return _per_position(model, negatives, "bce", 1.0)


def gbce_loss(model: Ranker, negatives: int = 256, t: float = 0.75) -> Objective:
    """Builds the gBCE of gSASRec with calibration `t` in [0, 1].

    Raises:
      ValueError: `negatives` is below one, or `t` is outside [0, 1].
    """
    if negatives < 1 or not 0 <= t <= 1:
        raise ValueError(f"gbce: negatives must be at least 1 and t in [0, 1], got {negatives} and {t}")
    return _per_position(model, negatives, "gbce", gbce_beta(negatives, model.n_items, t))
