"""What a model reads from tables: the rows of each feature, pooled where it is a bag."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """A feature: batch[name] int32 [batch], or [batch, n] of a `bag` (-1: nothing there); its rows are `dim` wide.

    A bag's rows are summed or averaged, by batch["NAME/weight"] [batch, n] where there is that.
    """

    name: str
    dim: int
    bag: bool = False
    pool: Literal["sum", "mean"] = "mean"


@dataclasses.dataclass(frozen=True)
class ItemSequences:
    """The data of a sequence model, which its config or a user's own factory is built for.

    Items are 1..n_items and 0 is padding. `pools` says by name of a table's feature how its bags are pooled.
    """

    n_items: int
    pools: Mapping[str, Literal["sum", "mean"]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ExampleFeatures:
    """The data of a click model: its features on tables, how many numeric columns and how many labels there are."""

    inputs: tuple[Input, ...]
    numeric: int = 0
    outputs: int = 1


@dataclasses.dataclass(frozen=True)
class TowerFeatures:
    """The data of a two-tower model: the features of users and those of items."""

    user: tuple[Input, ...]
    item: tuple[Input, ...]


def pooled(batch: Mapping[str, Any], feature: Input) -> Float[Array, "batch ... dim"]:
    """One vector an example (or an event of it), from batch["rows"]; zeros of an empty bag."""
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
    """The numeric columns (if there are any) and all pooled features side by side."""
    parts = [batch["numeric"].astype(dtype)] if numeric else []
    return jnp.concatenate([*parts, *(pooled(batch, feature).astype(dtype) for feature in features)], axis=-1)
