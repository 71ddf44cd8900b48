"""DCNv2: explicit feature crosses of bounded degree beside, or below, a deep tower (Wang et al. 2021)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxops.config.part import Part
from jaxops.core.failures import UserError
from jaxops.core.random import example_keys
from jaxops.core.sharding import Rule
from jaxops.models.dense import Dense
from jaxops.models.functional import Functional, Params
from jaxops.models.heads import Heads
from jaxops.models.inputs import ExampleFeatures, Input, gathered
from jaxops.models.mlp import MLP_RULES, Mlp, width_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCNv2Config(Part):
    """The shape of DCNv2: `cross_layers` layers x0 * (W x + b) + x, and a deep tower.

    Attributes:
      cross_layers: how many cross layers there are.
      rank: W is a product of two matrices of this rank; null is a full matrix.
      deep: widths of the deep tower's hidden layers.
      structure: the deep tower reads the features (`parallel`) or the output of the crosses (`stacked`).
      heads: widths of the hidden layers in each label's own head.
      dropout: rate after each hidden layer of the deep tower.
    """

    sort: ClassVar[str] = "click"
    label: ClassVar[str] = "DCNv2"

    kind: Literal["dcnv2"] = "dcnv2"
    cross_layers: int = 3
    rank: int | None = None
    deep: tuple[int, ...] = (128, 64)
    structure: Literal["parallel", "stacked"] = "parallel"
    heads: tuple[int, ...] = ()
    dropout: float = 0.0

    def problems(self) -> list[tuple[str, str]]:
        """Returns the errors that no value of another section could mend, as (dotted path, message)."""
        found = width_problems(deep=self.deep, heads=self.heads)
        if self.cross_layers < 1:
            found.append(("cross_layers", "expected 1 or more"))
        if self.rank is not None and self.rank < 1:
            found.append(("rank", "expected a positive number, or null for full matrices"))
        return found + ([] if 0 <= self.dropout < 1 else [("dropout", "expected a rate in [0, 1)")])

    def build(self, data: ExampleFeatures) -> "DCNv2":
        """Builds the model for the features of this data.

        Raises:
          UserError: the features do not suit the model.
        """
        return DCNv2(self, data.inputs, data.numeric, data.outputs)


class _Cross(nnx.Module):
    """One cross layer: x0 * (U V x + b) + x."""

    def __init__(self, width: int, rank: int | None, *, rngs: nnx.Rngs):
        init = nnx.initializers.glorot_normal()
        if rank is not None:
            self.down = Dense(width, rank, ("embed", None), bias=False, kernel_init=init, rngs=rngs)
        self.up = Dense(rank or width, width, (None, "embed"), kernel_init=init, rngs=rngs)
        self.low = rank is not None

    def __call__(self, first: Array, x: Array) -> Array:
        return first * self.up(self.down(x) if self.low else x) + x


class _DCNv2(nnx.Module):
    def __init__(self, config: DCNv2Config, width: int, outputs: int, rngs: nnx.Rngs):
        self.layers, self.stacked = config.cross_layers, config.structure == "stacked"
        for at in range(config.cross_layers):
            setattr(self, f"cross_{at}", _Cross(width, config.rank, rngs=rngs))
        self.deep = Mlp(width, config.deep, config.dropout, rngs=rngs)
        above = self.deep.width if self.stacked else width + self.deep.width
        self.heads = Heads(above, config.heads, outputs, rngs=rngs)

    def __call__(self, first: Array, keys: Array | None) -> Array:
        x = first
        for at in range(self.layers):
            x = getattr(self, f"cross_{at}")(first, x)
        if self.stacked:
            return self.heads(self.deep(x, keys))
        return self.heads(jnp.concatenate([x, self.deep(first, keys)], axis=-1))


class DCNv2:
    """DCNv2 over features of any widths; parameters are plain dicts and every method is pure.

    Args:
      config: the model's shape.
      inputs: the features that are read from tables.
      numeric: number of numeric columns, which are crossed too.
      outputs: number of labels.

    Raises:
      UserError: there are neither features nor numeric columns.
    """

    padding: dict[str, str] = {}

    def __init__(self, config: DCNv2Config, inputs: Sequence[Input], numeric: int, outputs: int = 1):
        self.config, self.inputs, self.numeric = config, tuple(inputs), numeric
        width = sum(feature.dim for feature in inputs) + numeric
        if not width:
            raise UserError("dcnv2 crosses features with each other: expected at least one feature or number")
        self._pure = Functional.of(_DCNv2, config, width, outputs)
        self.rules: list[Rule] = MLP_RULES
        self.shapes = self._pure.shapes

    def init(self, key: Key[Array, ""]) -> Params:
        """Draws fresh parameters: He normal before a ReLU, Glorot normal elsewhere, biases zero."""
        return self._pure.init(key)

    def apply(self, params: Params, batch: Mapping[str, Any], key: Key[Array, ""] | None) -> Float[Array, "batch ..."]:
        """Returns the logits, float32: [batch] for one label, else [batch, outputs]. A key turns dropout on."""
        dtype = params["cross_0"]["up"]["kernel"].dtype
        first = gathered(batch, self.inputs, self.numeric, dtype)
        return self._pure.bind(params)(first, example_keys(key, batch["id"]))
