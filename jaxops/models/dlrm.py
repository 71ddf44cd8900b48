"""DLRM: products of all pairs of features, between a tower for the numbers and one above (Naumov et al. 2019)."""

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
    """Hidden layers of the `bottom` tower (which ends as wide as the tables) and of the `top`; `heads` of each task."""

    sort: ClassVar[str] = "click"
    label: ClassVar[str] = "DLRM"

    kind: Literal["dlrm"] = "dlrm"
    bottom: tuple[int, ...] = (64,)
    top: tuple[int, ...] = (128, 64)
    heads: tuple[int, ...] = ()
    dropout: float = 0.0

    def problems(self) -> list[tuple[str, str]]:
        """What no value of another section could make right (dotted path, message)."""
        found = width_problems(bottom=self.bottom, top=self.top, heads=self.heads)
        return found + ([] if 0 <= self.dropout < 1 else [("dropout", "expected a rate in [0, 1)")])

    def build(self, data: ExampleFeatures) -> "DLRM":
        """The model of this shape over the features of the data.

        Raises:
          UserError: the features do not suit it.
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
    """DLRM of features that share one width; parameters are plain dicts, every method is pure.

    Raises:
      UserError: features of different widths, or fewer than two vectors to multiply.
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
        self._pure = Functional(lambda rngs: _DLRM(config, inputs[0].dim, vectors, numeric, outputs, rngs))
        self.rules, self.shapes = MLP_RULES, self._pure.shapes

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters: He normal before a ReLU, Glorot normal above, biases at zero."""
        return self._pure.init(key)

    def apply(self, params: Params, batch: Mapping[str, Any], key: Key[Array, ""] | None) -> Float[Array, "batch ..."]:
        """Logits, float32: [batch] of one output, else [batch, outputs]; no dropout where `key` is None."""
        dtype = params["heads"]["head_0"]["out"]["kernel"].dtype
        rows = [pooled(batch, feature).astype(dtype) for feature in self.inputs]
        numbers = batch["numeric"].astype(dtype) if self.numeric else None
        return self._pure.bind(params)(numbers, rows, example_keys(key, batch["id"]))
