"""DLRM: dot products of all pairs of features, between a bottom and a top tower (Naumov et al. 2019)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxops.config.part import Part
from jaxops.core.failures import UserError
from jaxops.core.random import example_keys
from jaxops.models.functional import Functional, Params
from jaxops.models.heads import Heads
from jaxops.models.inputs import ExampleFeatures, Input, pooled
from jaxops.models.mlp import MLP_RULES, Mlp, width_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class DLRMConfig(Part):
    """The shape of DLRM: widths of the hidden layers of its towers.

    Attributes:
      bottom: hidden layers over the numeric columns; the tower's output is as wide as the tables.
      top: hidden layers above the products.
      heads: hidden layers in each label's own head.
      dropout: rate after each hidden layer of both towers.
    """

    sort: ClassVar[str] = "click"
    label: ClassVar[str] = "DLRM"

    kind: Literal["dlrm"] = "dlrm"
    bottom: tuple[int, ...] = (64,)
    top: tuple[int, ...] = (128, 64)
    heads: tuple[int, ...] = ()
    dropout: float = 0.0

    def problems(self) -> list[tuple[str, str]]:
        """Returns the errors that no value of another section could mend, as (dotted path, message)."""
        found = width_problems(bottom=self.bottom, top=self.top, heads=self.heads)
        return found + ([] if 0 <= self.dropout < 1 else [("dropout", "expected a rate in [0, 1)")])

    def build(self, data: ExampleFeatures) -> "DLRM":
        """Builds the model for the features of this data.

        Raises:
          UserError: the features do not suit the model.
        """
        return DLRM(self, data.inputs, data.numeric, data.outputs)


class _DLRM(nnx.Module):
    def __init__(self, config: DLRMConfig, dim: int, vectors: int, numeric: int, outputs: int, rngs: nnx.Rngs):
        if numeric:
            self.bottom = Mlp(numeric, config.bottom, config.dropout, last=dim, rngs=rngs)
        self.numeric, self.depth = numeric, len(config.bottom)
        width = vectors * (vectors - 1) // 2 + (dim if numeric else 0)
        self.top = Mlp(width, config.top, config.dropout, rngs=rngs)
        self.heads = Heads(self.top.width, config.heads, outputs, rngs=rngs)

    def __call__(self, numbers: Array | None, rows: Sequence[Array], keys: Array | None) -> Array:
        bottom = [] if numbers is None else [self.bottom(numbers, keys)]
        vectors = jnp.stack([*bottom, *rows], axis=1)
        products = jnp.einsum("bid,bjd->bij", vectors, vectors)
        below = np.tril_indices(vectors.shape[1], -1)
        pairs = products[:, below[0], below[1]]
        return self.heads(self.top(jnp.concatenate([*bottom, pairs], axis=-1), keys, self.depth))


class DLRM:
    """DLRM over features that share one width; parameters are plain dicts and every method is pure.

    Args:
      config: the model's shape.
      inputs: the features that are read from tables.
      numeric: number of numeric columns; the bottom tower makes one more vector of them.
      outputs: number of labels.

    Raises:
      UserError: the features differ in width, or there are fewer than two vectors to multiply.
    """

    padding: dict[str, str] = {}

    def __init__(self, config: DLRMConfig, inputs: Sequence[Input], numeric: int, outputs: int = 1):
        dims = {feature.dim for feature in inputs}
        vectors = len(inputs) + bool(numeric)
        if len(dims) != 1 or vectors < 2:
            widths = ", ".join(f"{feature.name} {feature.dim}" for feature in inputs)
            raise UserError(
                f"dlrm multiplies features with each other: expected two or more of one width, got {widths}"
            )
        self.config, self.inputs, self.numeric = config, tuple(inputs), numeric
        self._pure = Functional.of(_DLRM, config, inputs[0].dim, vectors, numeric, outputs)
        self.rules, self.shapes = MLP_RULES, self._pure.shapes

    def init(self, key: Key[Array, ""]) -> Params:
        """Draws fresh parameters: He normal before a ReLU, Glorot normal elsewhere, biases zero."""
        return self._pure.init(key)

    def apply(self, params: Params, batch: Mapping[str, Any], key: Key[Array, ""] | None) -> Float[Array, "batch ..."]:
        """Returns the logits, float32: [batch] for one label, else [batch, outputs]. A key turns dropout on."""
        dtype = params["heads"]["head_0"]["out"]["kernel"].dtype
        rows = [pooled(batch, feature).astype(dtype) for feature in self.inputs]
        numbers = batch["numeric"].astype(dtype) if self.numeric else None
        return self._pure.bind(params)(numbers, rows, example_keys(key, batch["id"]))
