"""Two towers, of users and of items, whose vectors meet in one product: what an index can search (Yi et al. 2019)."""

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
    """Features and hidden layers of both towers; `history`: how many latest items the feature of that name holds."""

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
        """What no value of another section could make right (dotted path, message)."""
        found = width_problems(user_hidden=self.user_hidden, item_hidden=self.item_hidden)
        found += [(name, "expected a positive number") for name in ("dim", "history") if getattr(self, name) < 1]
        if not self.user:
            found.append(("user", "expected at least one feature"))
        if "item" not in self.item:
            found.append(("item", "the item tower reads at least the feature `item`"))
        return found + ([] if 0 <= self.dropout < 1 else [("dropout", "expected a rate in [0, 1)")])

    def build(self, data: TowerFeatures) -> "TwoTower":
        """The model of this shape over the features of the data."""
        return TwoTower(self, data.user, data.item)


class _Towers(nnx.Module):
    def __init__(self, config: TwoTowerConfig, user: int, item: int, rngs: nnx.Rngs):
        self.user = Mlp(user, config.user_hidden, config.dropout, last=config.dim, rngs=rngs)
        self.item = Mlp(item, config.item_hidden, config.dropout, last=config.dim, rngs=rngs)


class TwoTower:
    """Both towers; parameters are plain dicts, every method is pure."""

    padding: dict[str, str] = {}

    def __init__(self, config: TwoTowerConfig, user_inputs: Sequence[Input], item_inputs: Sequence[Input]):
        self.config, self.user_inputs, self.item_inputs = config, tuple(user_inputs), tuple(item_inputs)
        widths = [sum(feature.dim for feature in inputs) for inputs in (user_inputs, item_inputs)]
        self._pure = Functional(lambda rngs: _Towers(config, widths[0], widths[1], rngs))
        self.rules: list[Rule] = MLP_RULES
        self.shapes = self._pure.shapes

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters: He normal before a ReLU, Glorot normal above, biases at zero."""
        return self._pure.init(key)

    def users(self, params: Params, batch: Mapping[str, Any], key: Key[Array, ""] | None) -> Float[Array, "batch dim"]:
        """A vector for each example's user, of length one where the config normalises (or zero: nothing known)."""
        return self._vectors("user", self.user_inputs, params, batch, key, 0)

    def items(self, params: Params, batch: Mapping[str, Any], key: Key[Array, ""] | None) -> Float[Array, "batch dim"]:
        """A vector for each example's item."""
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
        # all ReLUs off and biases at zero: such a vector has no direction, and an epsilon under the root would multiply
        # rounding noise in its gradient a million times
        square = jnp.sum(wide * wide, axis=-1, keepdims=True)
        there = square > 1e-12
        return jnp.where(there, wide * jax.lax.rsqrt(jnp.where(there, square, 1.0)), 0.0).astype(x.dtype)
