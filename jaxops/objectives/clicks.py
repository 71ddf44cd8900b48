"""Binary cross-entropy of clicks for one label, or for several with a term each (`loss_weights` weighs them)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxops.config.part import Part
from jaxops.core.sums import Sum, Sums

Batch = Mapping[str, Any]
Objective = Callable[[PyTree, Batch, Key[Array, ""] | None], Sums]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clicks(Part):
    """Binary cross-entropy of each label in the data; several are weighted by `loss_weights`."""

    sort: ClassVar[str] = "click"

    kind: Literal["clicks"] = "clicks"

    def build(self, model: "ClickModel", labels: Sequence[str]) -> "Objective":
        """Builds the objective for this model, with a term for each label."""
        return bce(model) if len(labels) == 1 else multi_task(model, labels)


@runtime_checkable
class ClickModel(Protocol):
    """The part of a model that the loss needs: logits, [batch] for one label and [batch, labels] for several."""

    def apply(self, params: PyTree, batch: Batch, key: Array | None) -> Float[Array, "batch ..."]: ...


def binary_cross_entropy(logits: Float[Array, " n"], label: Float[Array, " n"]) -> Float[Array, " n"]:
    """Returns -log of the probability of the observed label, per entry, float32; it is stable for any logit."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(logits) - label.astype(jnp.float32) * logits


def bce(model: ClickModel) -> Objective:
    """Builds the loss of one label, batch["label"] [batch]; an example whose label is NaN (not known) is left out."""
    return multi_task(model, ("bce",))


def multi_task(model: ClickModel, names: Sequence[str]) -> Objective:
    """Builds a loss with a term `loss/NAME` for each column of batch["label"] [batch, labels].

    A label that is NaN is not known; each term covers the examples whose label is known.

    Raises:
      ValueError: there are no names, or one appears twice.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"multi_task: expected the names of one or more labels, each once, got {tuple(names)}")

    def objective(params: PyTree, batch: Batch, key: Key[Array, ""] | None) -> Sums:
        shape = (batch["weight"].shape[0], len(names))
        logits, label = model.apply(params, batch, key).reshape(shape), batch["label"].reshape(shape)
        known = ~jnp.isnan(label)
        weight = batch["weight"][:, None] * known.astype(jnp.float32)
        label = jnp.where(known, label, 0)
        return {
            f"loss/{name}": Sum.of(binary_cross_entropy(logits[:, at], label[:, at]), weight[:, at])
            for at, name in enumerate(names)
        }

    return objective
