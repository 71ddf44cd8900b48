"""Two towers, of users and of items, whose dot product is the score; an index can search it (Yi et al. 2019)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxops.config.part import Part
from jaxops.core.random import example_keys
from jaxops.core.sharding import Rule
from jaxops.models.functional import Functional, Params
from jaxops.models.inputs import Input, TowerFeatures, gathered
from jaxops.models.mlp import MLP_RULES, Mlp, width_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTowerConfig(Part):
    """The shape of two towers.

    Attributes:
      user: features that the user tower reads.
      item: features that the item tower reads; `item` is among them.
      dim: width of the vectors that both towers return.
      user_hidden: widths of the user tower's hidden layers.
      item_hidden: widths of the item tower's hidden layers.
      history: number of most recent items in the feature `history`.
      normalise: True scales every vector to length one.
      dropout: rate after each hidden layer.
    """

    sort: ClassVar[str] = "retrieval"
    label: ClassVar[str] = "Two towers"

    kind: Literal["two_tower"] = "two_tower"
    user: tuple[str, ...] = ("user",)
    item: tuple[str, ...] = ("item",)
    dim: int = 64
    user_hidden: tuple[int, ...] = (128,)
    item_hidden: tuple[int, ...] = (128,)
    history: int = 50
    normalise: bool = True
    dropout: float = 0.0

    def problems(self) -> list[tuple[str, str]]:
        """Returns the errors that no value of another section could mend, as (dotted path, message)."""
        found = width_problems(user_hidden=self.user_hidden, item_hidden=self.item_hidden)
        found += [(name, "expected a positive number") for name in ("dim", "history") if getattr(self, name) < 1]
        if not self.user:
            found.append(("user", "expected at least one feature"))
        if "item" not in self.item:
            found.append(("item", "the item tower reads at least the feature `item`"))
        return found + ([] if 0 <= self.dropout < 1 else [("dropout", "expected a rate in [0, 1)")])

    def build(self, data: TowerFeatures) -> "TwoTower":
        """Builds the model for the features of this data."""
        return TwoTower(self, data.user, data.item)


class _Towers(nnx.Module):
    def __init__(self, config: TwoTowerConfig, user: int, item: int, rngs: nnx.Rngs):
        self.user = Mlp(user, config.user_hidden, config.dropout, last=config.dim, rngs=rngs)
        self.item = Mlp(item, config.item_hidden, config.dropout, last=config.dim, rngs=rngs)


class TwoTower:
    """A user tower and an item tower; parameters are plain dicts and every method is pure."""

    padding: dict[str, str] = {}

    def __init__(self, config: TwoTowerConfig, user_inputs: Sequence[Input], item_inputs: Sequence[Input]):
        self.config, self.user_inputs, self.item_inputs = config, tuple(user_inputs), tuple(item_inputs)
        widths = [sum(feature.dim for feature in inputs) for inputs in (user_inputs, item_inputs)]
        self._pure = Functional.of(_Towers, config, *widths)
        self.rules: list[Rule] = MLP_RULES
        self.shapes = self._pure.shapes

    def init(self, key: Key[Array, ""]) -> Params:
        """Draws fresh parameters: He normal before a ReLU, Glorot normal above, biases zero."""
        return self._pure.init(key)

    def users(self, params: Params, batch: Mapping[str, Any], key: Key[Array, ""] | None) -> Float[Array, "batch dim"]:
        """Returns a vector for each example's user; a normalised one has length one, or zero where nothing is known."""
        return self._vectors("user", self.user_inputs, params, batch, key, 0)

    def items(self, params: Params, batch: Mapping[str, Any], key: Key[Array, ""] | None) -> Float[Array, "batch dim"]:
        """Returns a vector for each example's item; a normalised one has length one, or zero where nothing is known."""
        return self._vectors("item", self.item_inputs, params, batch, key, len(self.config.user_hidden))

    def _vectors(
        self,
        tower: str,
        inputs: Sequence[Input],
        params: Params,
        batch: Mapping[str, Any],
        key: Key[Array, ""] | None,
        site: int,
    ) -> Float[Array, "batch dim"]:
        x = gathered(batch, inputs, 0, params[tower]["out"]["kernel"].dtype)
        x = getattr(self._pure.bind(params), tower)(x, example_keys(key, batch["id"]), site)
        if not self.config.normalise:
            return x
        wide = x.astype(jnp.float32)
        # With all ReLUs off and biases zero the vector has no direction. An epsilon under the root would multiply the
        # rounding noise of its gradient a million times.
        square = jnp.sum(wide * wide, axis=-1, keepdims=True)
        there = square > 1e-12
        return jnp.where(there, wide * jax.lax.rsqrt(jnp.where(there, square, 1.0)), 0.0).astype(x.dtype)
