"""Preference optimisation without a reward model: DPO, cDPO and IPO, on logprobs of a policy and a reference.

The losses are pure functions of log ratios. Their objectives read the reference's logprobs from the batch, "reference"
[batch, 2] (sums over trained tokens, from `logprobs_of_pairs`); `against_reference` computes them in the step.
The batch is that of `objectives/preference.py`, without margins. Tested in tests/objectives/test_direct_preference.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree
from pydantic import Field

from jaxops.config.part import Part
from jaxops.core.sums import Sum, Sums
from jaxops.objectives.language import LanguageModel
from jaxops.objectives.preference import (
    Batch,
    Objective,
    agreement,
    bradley_terry,
    decided,
    label_of,
    side_by_side,
    smoothed,
)
from jaxops.objectives.token_logprobs import token_logprobs

Normalisation = Literal["sequence", "token_mean"]
Loss = Callable[[Float[Array, "batch 2"], Float[Array, " batch"], Float[Array, "batch 2"]], Float[Array, " batch"]]
"""A loss of (log ratios of policy to reference, label, trained tokens of each text) for each pair."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo(Part):
    """Direct preference optimisation; with `label_smoothing` it is cDPO.

    Attributes:
      beta: strength of the pull to the reference; it scales the implicit rewards.
      label_smoothing: share of labels that are taken to be wrong.
      chunk: number of tokens of a device whose logits exist at a time; null chooses by the size of the vocabulary.
    """

    sort: ClassVar[str] = "pairs"

    kind: Literal["dpo"] = "dpo"
    beta: Annotated[float, Field(gt=0)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    chunk: Annotated[int, Field(ge=1)] | None = None

    def build(self, model: LanguageModel) -> Objective:
        """Builds the objective for this model."""
        return direct_preference(model, "dpo", self.loss, beta=self.beta, chunk=self.chunk)

    def loss(
        self, ratios: Float[Array, "batch 2"], label: Float[Array, " batch"], tokens: Float[Array, "batch 2"]
    ) -> Float[Array, " batch"]:
        """Returns the loss of each pair; it is a `Loss`."""
        del tokens
        return dpo(ratios, smoothed(label, self.label_smoothing), self.beta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ipo(Part):
    """Identity preference optimisation: a squared error on the difference of log ratios.

    Attributes:
      beta: strength of the pull to the reference (the paper's tau).
      normalisation: `token_mean` divides each log ratio by its number of trained tokens, as TRL does; `sequence` takes
        the sum, as the paper's equation has it and as OpenRLHF does.
      label_smoothing: share of labels that are taken to be wrong.
      chunk: number of tokens of a device whose logits exist at a time; null chooses by the size of the vocabulary.
    """

    sort: ClassVar[str] = "pairs"

    kind: Literal["ipo"] = "ipo"
    beta: Annotated[float, Field(gt=0)] = 0.1
    normalisation: Normalisation = "token_mean"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    chunk: Annotated[int, Field(ge=1)] | None = None

    def build(self, model: LanguageModel) -> Objective:
        """Builds the objective for this model."""
        return direct_preference(model, "ipo", self.loss, beta=self.beta, chunk=self.chunk)

    def loss(
        self, ratios: Float[Array, "batch 2"], label: Float[Array, " batch"], tokens: Float[Array, "batch 2"]
    ) -> Float[Array, " batch"]:
        """Returns the loss of each pair; it is a `Loss`."""
        return ipo(ratios, smoothed(label, self.label_smoothing), self.beta, tokens, self.normalisation)


def dpo(ratios: Float[Array, "*batch 2"], label: Float[Array, "*batch"], beta: float) -> Float[Array, "*batch"]:
    """Returns the DPO loss of each pair, float32: Bradley-Terry on the implicit rewards beta * log ratio.

    A label of 1 is DPO (Rafailov et al. 2023, eq. 7), one of 1 - e is cDPO with noise e (Mitchell 2023, eq. 3), and one
    of 0.5 is a tie, which pulls the two rewards together.

    Args:
      ratios: log-probability under the policy less that under the reference, of the first and the second text.
      label: the probability that the first is better.
      beta: the scale of the implicit rewards.

    Example:
      loss = dpo(policy - reference, jnp.ones(policy.shape[0]), beta=0.1)
    """
    ratios = ratios.astype(jnp.float32)
    return bradley_terry(beta * (ratios[..., 0] - ratios[..., 1]), label)


def ipo(
    ratios: Float[Array, "*batch 2"],
    label: Float[Array, "*batch"],
    beta: float,
    tokens: Float[Array, "*batch 2"],
    normalisation: Normalisation,
) -> Float[Array, "*batch"]:
    """Returns the IPO loss of each pair, float32: (h - 1 / (2 beta))^2 for the difference h of log ratios.

    A label p is the mixture p * (h - 1 / (2 beta))^2 + (1 - p) * (h + 1 / (2 beta))^2 (Azar et al. 2023, eq. 17).

    Args:
      ratios: log-probability under the policy less that under the reference, of the first and the second text.
      label: the probability that the first is better.
      beta: the strength of the pull to the reference.
      tokens: number of trained tokens of each text.
      normalisation: `token_mean` divides each log ratio by its tokens first; `sequence` does not. The two differ in
        scale by the length of the texts, so a beta of one does not fit the other.
    """
    ratios, label = ratios.astype(jnp.float32), label.astype(jnp.float32)
    if normalisation == "token_mean":
        ratios = ratios / jnp.maximum(tokens, 1)
    difference, goal = ratios[..., 0] - ratios[..., 1], 1 / (2 * beta)
    return label * jnp.square(difference - goal) + (1 - label) * jnp.square(difference + goal)


def logprobs_of_pairs(
    model: LanguageModel, params: PyTree, batch: Batch, key: Key[Array, ""] | None = None, *, chunk: int | None = None
) -> Float[Array, "batch 2"]:
    """Returns the log-probability of each text: the sum over its tokens whose mask is not zero, float32.

    For a reference, `key` is None: it has no dropout.

    Args:
      model: the model.
      params: its parameters, or those of the reference.
      batch: pairs.
      key: the update's key; None in evaluation.
      chunk: see `token_logprobs`.
    """
    rows, keys = side_by_side(batch, key)
    scores = token_logprobs(
        model.hidden(params, rows["tokens"], rows["segment"], rows["position"], keys),
        model.head(params),
        rows["targets"],
        real_vocab=model.real_vocab,
        soft_cap=model.soft_cap,
        chunk=chunk,
    )
    return jnp.sum(jnp.where(rows["mask"] != 0, scores.logprobs, 0.0), axis=1).reshape(batch["mask"].shape[:2])


def direct_preference(
    model: LanguageModel, name: str, loss: Loss, *, beta: float, chunk: int | None = None
) -> Objective:
    """Builds a loss on log ratios, `loss/NAME`, with metrics of the implicit rewards beta * log ratio.

    `accuracy` is the share of pairs whose better text has the higher implicit reward. `reward_margin` is the difference
    of the rewards of better and worse, which are `reward_chosen` and `reward_rejected`; `logprob_chosen` and
    `logprob_rejected` are their log-probabilities under the policy. All of these leave ties out.

    Args:
      model: the policy.
      name: the name of the loss term.
      loss: the loss of each pair.
      beta: the scale of the implicit rewards.
      chunk: see `token_logprobs`.
    """

    def objective(params: PyTree, batch: Batch, key: Key[Array, ""] | None) -> Sums:
        policy = logprobs_of_pairs(model, params, batch, key, chunk=chunk)
        ratios = policy - jax.lax.stop_gradient(batch["reference"].astype(jnp.float32))
        tokens = jnp.sum((batch["mask"] != 0).astype(jnp.float32), axis=-1)
        label, rewards, counted = label_of(batch), beta * ratios, decided(batch)
        difference, first = rewards[:, 0] - rewards[:, 1], label > 0.5
        sums: Sums = {
            f"loss/{name}": Sum.of(loss(ratios, label, tokens), batch["weight"]),
            "accuracy": Sum.of(agreement(difference, label), counted),
            "reward_margin": Sum.of(difference * jnp.sign(label - 0.5), counted),
        }
        for what, values in (("reward", rewards), ("logprob", policy)):
            sums[f"{what}_chosen"] = Sum.of(jnp.where(first, values[:, 0], values[:, 1]), counted)
            sums[f"{what}_rejected"] = Sum.of(jnp.where(first, values[:, 1], values[:, 0]), counted)
        return sums

    return objective


def against_reference(
    objective: Callable[[PyTree, dict[str, Any], Key[Array, ""] | None], Sums],
    model: LanguageModel,
    policy: Callable[[PyTree], PyTree],
    reference: Callable[[PyTree], PyTree],
    *,
    chunk: int | None = None,
) -> Objective:
    """Returns an objective on pairs as one of parameters that hold policy and reference.

    The reference's logprobs are computed in the step, without dropout. No gradient reaches them.

    Args:
      objective: reads the policy's parameters, and "reference" in the batch.
      model: policy and reference are two sets of its parameters.
      policy: picks the policy's out of all parameters.
      reference: picks the reference's.
      chunk: see `token_logprobs`.
    """

    def both(params: PyTree, batch: Batch, key: Key[Array, ""] | None) -> Sums:
        held = jax.lax.stop_gradient(reference(params))
        known: dict[str, Any] = {**batch, "reference": logprobs_of_pairs(model, held, batch, chunk=chunk)}
        return objective(policy(params), known, key)

    return both
