"""The features that a model reads from tables: the rows of each one, pooled where it is a bag."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """One feature: its ids in batch[name], int32 [batch], or [batch, n] for a bag, where -1 marks an empty slot.

    Attributes:
      name: the feature's name.
      dim: width of its rows.
      bag: True where an example has several ids.
      pool: a bag's rows are summed or averaged, weighted by batch["NAME/weight"] [batch, n] where the batch has that.
    """

    name: str
    dim: int
    bag: bool = False
    pool: Literal["sum", "mean"] = "mean"


@dataclasses.dataclass(frozen=True)
class ItemSequences:
    """The facts about the data that a sequence model, or a user's own factory, is built from.

    Attributes:
      n_items: items are numbered 1..n_items; 0 is padding.
      pools: how the bags of a table's feature are pooled, by the feature's name.
    """

    n_items: int
    pools: Mapping[str, Literal["sum", "mean"]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ExampleFeatures:
    """The facts about the data that a click model is built from.

    Attributes:
      inputs: the features that are read from tables.
      numeric: number of numeric columns.
      outputs: number of labels.
    """

    inputs: tuple[Input, ...]
    numeric: int = 0
    outputs: int = 1


@dataclasses.dataclass(frozen=True)
class TowerFeatures:
    """The facts about the data that a two-tower model is built from: features of users, and features of items."""

    user: tuple[Input, ...]
    item: tuple[Input, ...]


def pooled(batch: Mapping[str, Any], feature: Input) -> Float[Array, "batch ... dim"]:
    """Returns one vector for each example, or each event of its history, from batch["rows"]; zeros for an empty bag."""
    rows = batch["rows"][feature.name]
    if not feature.bag:
        return rows
    weight = (batch[feature.name] >= 0).astype(rows.dtype)
    if f"{feature.name}/weight" in batch:
        weight = weight * batch[f"{feature.name}/weight"].astype(rows.dtype)
    total = jnp.sum(rows * weight[..., None], axis=-2)
    if feature.pool == "sum":
        return total
    share = jnp.sum(weight, axis=-1, keepdims=True)
    return total / jnp.where(share == 0, jnp.ones_like(share), share)


def gathered(
    batch: Mapping[str, Any], features: Sequence[Input], numeric: int, dtype: Any
) -> Float[Array, "batch width"]:
    """Concatenates the numeric columns, if there are any, and all pooled features.

    Args:
      batch: it holds "rows", the features' ids, and "numeric" [batch, numeric] where `numeric` is above 0.
      features: the features, in the order of the result.
      numeric: number of numeric columns.
      dtype: dtype of the result.
    """
    parts = [batch["numeric"].astype(dtype)] if numeric else []
    return jnp.concatenate([*parts, *(pooled(batch, feature).astype(dtype) for feature in features)], axis=-1)
