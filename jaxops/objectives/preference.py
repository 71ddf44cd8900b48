"""Losses of reward models: Bradley-Terry on pairs, with margins, ties and soft labels, and a softmax on best-of-k.

The losses are pure functions of scores. Their objectives ask a model for one score of each text. A batch of pairs holds
"tokens", "targets", "mask", "segment" and "position" [batch, 2, length], the chosen text first, "id" and "weight"
[batch]. It may hold "margin" [batch], by how much the first is better, and "label" [batch], the probability that the
first is better (1 where there is none, 0.5 for a tie). Tested in tests/objectives/test_preference.py.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
from pydantic import Field

from jaxops.config.part import Part
from jaxops.core.random import example_keys
from jaxops.core.sums import Sum, Sums

Batch = Mapping[str, Any]
Objective = Callable[[PyTree, Batch, Key[Array, ""] | None], Sums]


@runtime_checkable
class TextScorer(Protocol):
    """The part of a model that the losses need: one score for each row, read at the row's last token."""

    def score(
        self,
        params: PyTree,
        tokens: Int[Array, "batch length"],
        segment: Int[Array, "batch length"],
        position: Int[Array, "batch length"],
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, " batch"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class BradleyTerry(Part):
    """The probability that the chosen text beats the rejected one is the sigmoid of the difference of their scores.

    Attributes:
      tie: threshold of Rao & Kupper below which scores count as equal; null counts a tie as half a win for each.
      label_smoothing: share of labels that are taken to be wrong; it moves each label towards 0.5.
      center: weight of the squared sum of the two scores, which keeps scores around zero.
    """

    kind: Literal["bradley_terry"] = "bradley_terry"
    tie: Annotated[float, Field(gt=0)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    center: Annotated[float, Field(ge=0)] = 0.0

    def build(self, model: TextScorer) -> Objective:
        """Builds the objective for this model."""
        return reward_of_pairs(model, tie=self.tie, label_smoothing=self.label_smoothing, center=self.center)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfK(Part):
    """The probability that a text is the best of its candidates is the softmax of their scores.

    Attributes:
      center: weight of the squared mean of an example's scores, which keeps scores around zero.
    """

    kind: Literal["best_of_k"] = "best_of_k"
    center: Annotated[float, Field(ge=0)] = 0.0

    def build(self, model: TextScorer) -> Objective:
        """Builds the objective for this model."""
        return reward_of_best(model, center=self.center)


def bradley_terry(
    difference: Float[Array, "*batch"],
    label: Float[Array, "*batch"] | None = None,
    margin: Float[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Returns -log of the probability of the label, under P(first wins) = sigmoid(difference), float32.

    A label p between 0 and 1 is the mixture p * loss(win) + (1 - p) * loss(defeat); 0.5 is a tie that counts half for
    each (Bradley & Terry 1952; Christiano et al. 2017 for the tie).

    Args:
      difference: score of the first less score of the second.
      label: the probability that the first is better; None is 1 everywhere.
      margin: the difference that the winner must exceed (Touvron et al. 2023); None is 0.

    Example:
      loss = bradley_terry(scores[:, 0] - scores[:, 1], label=jnp.asarray([1.0, 0.5]))
    """
    difference = difference.astype(jnp.float32)
    need = jnp.zeros_like(difference) if margin is None else margin.astype(jnp.float32)
    win = jax.nn.softplus(need - difference)
    if label is None:
        return win
    label = label.astype(jnp.float32)
    return label * win + (1 - label) * jax.nn.softplus(need + difference)


def rao_kupper(
    difference: Float[Array, "*batch"],
    label: Float[Array, "*batch"],
    threshold: float,
    margin: Float[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Returns -log of the probability of the label in a model with ties, float32.

    P(first wins) = sigmoid(difference - threshold), the same for the second, and the rest is a tie (Rao & Kupper 1967,
    whose theta is exp(threshold)). A label of exactly 0.5 is a tie; any other mixes win and defeat.

    Args:
      difference: score of the first less score of the second.
      label: the probability that the first is better, 0.5 for a tie.
      threshold: positive; the larger it is, the more ties are expected.
      margin: what the winner must exceed in addition to the threshold; None is 0. Ties know none.

    Raises:
      ValueError: `threshold` is not positive.
    """
    if threshold <= 0:
        raise ValueError(f"rao_kupper: threshold must be positive, got {threshold}")
    difference = difference.astype(jnp.float32)
    need = threshold + (jnp.zeros_like(difference) if margin is None else margin.astype(jnp.float32))
    decided = bradley_terry(difference, label, need)
    tied = jax.nn.softplus(threshold - difference) + jax.nn.softplus(threshold + difference)
    return jnp.where(label == 0.5, tied - math.log(math.expm1(2 * threshold)), decided)


def centering(scores: Float[Array, "*batch k"]) -> Float[Array, "*batch"]:
    """Returns the squared sum of a pair's scores, or for k scores of (2 * mean), float32.

    Preferences determine scores up to a constant for each prompt; this penalty fixes it at a mean of zero (Eisenstein
    et al. 2023).
    """
    return jnp.square(2 * jnp.mean(scores.astype(jnp.float32), axis=-1))


def best_of_k(
    scores: Float[Array, "*batch k"], best: Int[Array, "*batch"], valid: Bool[Array, "*batch k"] | None = None
) -> Float[Array, "*batch"]:
    """Returns -log of the softmax share of the best candidate (Ziegler et al. 2019, eq. 1), float32.

    Args:
      scores: a score for each candidate.
      best: index of the best one.
      valid: False for candidates that are padding; None has none. The loss is NaN where the best one is padding.
    """
    scores = scores.astype(jnp.float32)
    hit = jnp.arange(scores.shape[-1]).reshape((1,) * best.ndim + (-1,)) == best[..., None]
    if valid is not None:
        hit, scores = hit & valid, jnp.where(valid, scores, -1e30)  # finite, so that an example of padding alone is
    picked = jnp.sum(jnp.where(hit, scores, 0.0), axis=-1)
    return jax.nn.logsumexp(scores, axis=-1) - jnp.where(jnp.any(hit, axis=-1), picked, jnp.nan)


def smoothed(label: Float[Array, "*batch"], share: float) -> Float[Array, "*batch"]:
    """Returns the probability of the label where a share of all labels is wrong: p (1 - e) + (1 - p) e."""
    return 0.5 + (label - 0.5) * (1 - 2 * share)  # so that a tie stays exactly 0.5


def agreement(difference: Float[Array, "*batch"], label: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Returns 1 where the sign of the difference agrees with the label, 0 where not, 0.5 where the scores are equal.

    Labels of 0.5 say nothing about the sign: leave them out by `decided`.
    """
    return 0.5 + 0.5 * jnp.sign(difference.astype(jnp.float32)) * jnp.sign(label.astype(jnp.float32) - 0.5)


def label_of(batch: Batch) -> Float[Array, " batch"]:
    """Returns the probability that the first of each pair is better; it is 1 in a batch without labels."""
    return batch["label"] if "label" in batch else jnp.ones_like(batch["weight"])


def decided(batch: Batch) -> Float[Array, " batch"]:
    """Returns the weights of the pairs that are not ties."""
    return batch["weight"] * (label_of(batch) != 0.5).astype(batch["weight"].dtype)


def side_by_side(batch: Batch, key: Key[Array, ""] | None) -> tuple[dict[str, Any], Key[Array, " rows"] | None]:
    """Returns a batch of [batch, k, length] as rows of [batch * k, length], and a key for each row.

    The rows of an example draw independently of each other; their keys depend on nothing but its id and their place.
    """
    names = ("tokens", "targets", "mask", "segment", "position")
    rows = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in names if name in batch}
    keys = example_keys(key, batch["id"])
    if keys is not None:
        places = jnp.arange(batch["tokens"].shape[1])
        keys = jax.vmap(lambda one: jax.vmap(lambda at: jax.random.fold_in(one, at))(places))(keys).reshape(-1)
    return rows, keys


def scores_of(model: TextScorer, params: PyTree, batch: Batch, key: Key[Array, ""] | None) -> Float[Array, "batch k"]:
    """Returns the scores of the k texts of each example."""
    rows, keys = side_by_side(batch, key)
    scores = model.score(params, rows["tokens"], rows["segment"], rows["position"], keys)
    return scores.astype(jnp.float32).reshape(batch["tokens"].shape[:2])


def reward_of_pairs(
    model: TextScorer, *, tie: float | None = None, label_smoothing: float = 0.0, center: float = 0.0
) -> Objective:
    """Builds the Bradley-Terry loss, with metrics `accuracy` (without ties), `score_margin` and `score`.

    Args:
      model: the reward model.
      tie: the threshold of `rao_kupper`; None counts a tie as half a win for each.
      label_smoothing: see `smoothed`; a tie stays one.
      center: weight of `centering`, as a term `loss/center`; zero leaves it out.
    """

    def objective(params: PyTree, batch: Batch, key: Key[Array, ""] | None) -> Sums:
        scores, weight = scores_of(model, params, batch, key), batch["weight"]
        difference, label = scores[:, 0] - scores[:, 1], smoothed(label_of(batch), label_smoothing)
        if tie is None:
            loss = bradley_terry(difference, label, batch.get("margin"))
        else:
            loss = rao_kupper(difference, label, tie, batch.get("margin"))
        sums: Sums = {"loss/preference": Sum.of(loss, weight)}
        if center:
            sums["loss/center"] = Sum.of(center * centering(scores), weight)
        sums["accuracy"] = Sum.of(agreement(difference, label_of(batch)), decided(batch))
        sums["score_margin"] = Sum.of(difference * jnp.sign(label_of(batch) - 0.5), decided(batch))
        sums["score"] = Sum.of(jnp.mean(scores, axis=1), weight)
        return sums

    return objective


def reward_of_best(model: TextScorer, *, center: float = 0.0) -> Objective:
    """Builds the softmax over k candidates, with metrics `top1` (the best one has the highest score) and `score`.

    A batch is one of [batch, k, length] with "best" [batch], the index of the best candidate. It may hold "valid"
    [batch, k], False for candidates that are padding.

    Args:
      model: the reward model.
      center: weight of the squared (2 * mean) of the valid scores, as a term `loss/center`; zero leaves it out.
    """

    def objective(params: PyTree, batch: Batch, key: Key[Array, ""] | None) -> Sums:
        scores, weight = scores_of(model, params, batch, key), batch["weight"]
        valid = batch["valid"] if "valid" in batch else jnp.ones(scores.shape, bool)
        there = jnp.maximum(jnp.sum(valid.astype(jnp.float32), axis=1), 1)
        mean = jnp.sum(jnp.where(valid, scores, 0.0), axis=1) / there
        sums: Sums = {"loss/preference": Sum.of(best_of_k(scores, batch["best"], valid), weight)}
        if center:
            sums["loss/center"] = Sum.of(center * centering(mean[:, None]), weight)
        first = jnp.argmax(jnp.where(valid, scores, -jnp.inf), axis=1)
        sums["top1"] = Sum.of(first == batch["best"], weight)
        sums["score"] = Sum.of(mean, weight)
        return sums

    return objective
