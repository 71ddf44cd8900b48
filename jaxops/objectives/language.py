"""The loss of language models: cross-entropy of each next token, with z-loss and label smoothing.

A batch holds "tokens", "targets", "segment" and "position" [batch, length] int32, "mask" [batch, length] (the loss
weight of each target), "id" [batch], and "weight" [batch], which is zero for padding examples. The loss is a mean over
the trained tokens of the global batch: a long answer counts for more than a short one, however the batch is divided.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree
from pydantic import Field

from jaxops.config.part import Part
from jaxops.core.random import example_keys
from jaxops.core.sums import Sum, Sums
from jaxops.objectives.token_logprobs import TokenScores as TokenScores
from jaxops.objectives.token_logprobs import token_logprobs as token_logprobs

Batch = Mapping[str, Any]
Objective = Callable[[PyTree, Batch, Key[Array, ""] | None], Sums]


@runtime_checkable
class LanguageModel(Protocol):
    """The part of a model that the loss needs.

    Attributes:
      real_vocab: number of tokens; further columns of the head are padding.
      soft_cap: the bound on logits, or None.
    """

    real_vocab: int
    soft_cap: float | None

    def hidden(
        self,
        params: PyTree,
        tokens: Int[Array, "batch length"],
        segment: Int[Array, "batch length"],
        position: Int[Array, "batch length"],
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch length dim"]:
        """Returns the last hidden states.

        Args:
          params: the parameters.
          tokens: token ids.
          segment: the text of each token, from 1; 0 is padding.
          position: the position of each token in its text.
          keys: a key for each example; None in evaluation.
        """
        ...

    def head(self, params: PyTree) -> Float[Array, "dim rows"]:
        """Returns the output kernel, gathered over fsdp."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextTokenConfig(Part):
    """Cross-entropy of the next token, over the targets that the data's mask trains.

    Attributes:
      z_loss: weight of the squared log-sum of logits, which keeps logits from drifting (PaLM uses 1e-4).
      label_smoothing: share of the target's probability that is spread evenly over the vocabulary.
      chunk: number of tokens of a device whose logits exist at a time; null chooses by the size of the vocabulary.
    """

    sort: ClassVar[str] = "text"

    kind: Literal["next_token"] = "next_token"
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    chunk: Annotated[int, Field(ge=1)] | None = None

    def build(self, model: LanguageModel) -> Objective:
        """Builds the objective for this model."""
        return next_token(model, z_loss=self.z_loss, label_smoothing=self.label_smoothing, chunk=self.chunk)


def next_token(
    model: LanguageModel, *, z_loss: float = 0.0, label_smoothing: float = 0.0, chunk: int | None = None
) -> Objective:
    """Builds the cross-entropy of each next token, with metrics `perplexity`, `accuracy` and `entropy`.

    `loss/nll` is always the plain negative log-likelihood, so that perplexities can be compared. Smoothing by e and a
    z-loss by c add terms of their own: `loss/smoothing` with e * (mean NLL over the vocabulary - NLL of the target)
    (Szegedy et al. 2016), and `loss/z` with c * logsumexp^2 (Chowdhery et al. 2022).

    Args:
      model: the model.
      z_loss: the weight c; zero leaves the term out.
      label_smoothing: the share e; zero leaves the term out.
      chunk: see `token_logprobs`.

    Raises:
      ValueError: `z_loss` is negative, or `label_smoothing` is not in [0, 1).

    Example:
      objective = next_token(model, z_loss=1e-4)
      step = jaxops.build_step(objective, optax.adamw(1e-4), mesh, rules=model.rules)
    """
    if z_loss < 0 or not 0 <= label_smoothing < 1:
        raise ValueError(
            f"next_token: z_loss must be at least 0 and label_smoothing in [0, 1), got {z_loss} and {label_smoothing}"
        )

    def objective(params: PyTree, batch: Batch, key: Key[Array, ""] | None) -> Sums:
        scores = scores_of_batch(model, params, batch, key, chunk=chunk)
        weight = batch["mask"] * batch["weight"][:, None]
        nll = Sum.of(-scores.logprobs, weight)
        sums: Sums = {"loss/nll": nll}
        if label_smoothing:
            sums["loss/smoothing"] = Sum.of(label_smoothing * (scores.logprobs - scores.mean_logprob), weight)
        if z_loss:
            sums["loss/z"] = Sum.of(z_loss * jnp.square(scores.logsumexp), weight)
        sums["perplexity"] = dataclasses.replace(nll, finalize=_perplexity)
        sums["accuracy"] = Sum.of(scores.best == batch["targets"], weight)
        sums["entropy"] = Sum.of(scores.entropy, weight)
        return sums

    return objective


def scores_of_batch(
    model: LanguageModel,
    params: PyTree,
    batch: Batch,
    key: Key[Array, ""] | None,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> TokenScores:
    """Returns the `TokenScores` of a batch's targets under the model.

    Args:
      model: the model.
      params: its parameters.
      batch: "tokens", "targets", "segment" and "position" [batch, length], and "id" [batch].
      key: the update's key, from which each example's own is made; None in evaluation.
      temperature: divides the logits.
      chunk: see `token_logprobs`.
    """
    keys = example_keys(key, batch["id"])
    hidden = model.hidden(params, batch["tokens"], batch["segment"], batch["position"], keys)
    return token_logprobs(
        hidden,
        model.head(params),
        batch["targets"],
        real_vocab=model.real_vocab,
        soft_cap=model.soft_cap,
        temperature=temperature,
        chunk=chunk,
    )


def _perplexity(nll: np.ndarray) -> float:
    """Returns exp(nll), infinite above what a float holds."""
    return math.inf if nll > 700 else math.exp(nll)
