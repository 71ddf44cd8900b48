"""Logistic regression on tables one wide: what a click model has to beat."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxops.config.part import Part
from jaxops.core.failures import UserError
from jaxops.core.sharding import Rule, constrain
from jaxops.models.functional import Params
from jaxops.models.inputs import ExampleFeatures, Input, pooled


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig(Part):
    """It has nothing to choose."""

    sort: ClassVar[str] = "click"
    label: ClassVar[str] = "Logistic regression"

    kind: Literal["linear"] = "linear"

    def problems(self) -> list[tuple[str, str]]:
        """None."""
        return []

    def build(self, data: ExampleFeatures) -> "LogisticRegression":
        """The model of this shape over the features of the data.

        Raises:
          UserError: the features do not suit it.
        """
        return LogisticRegression(self, data.inputs, data.numeric, data.outputs)


class LogisticRegression:
    """bias + the sum of the features' rows + weights of the numbers; every parameter begins at zero.

    Of several outputs a row has a number for each.

    Raises:
      UserError: a table that is not as wide as there are outputs (one, mostly).
    """

    padding: dict[str, str] = {}

    def __init__(self, config: LinearConfig, inputs: Sequence[Input], numeric: int, outputs: int = 1):
        wide = [feature.name for feature in inputs if feature.dim != outputs]
        if wide:
            raise UserError(
                f"linear adds up rows of dim {outputs}, a number for each label: set dim of {', '.join(wide)}"
            )
        self.config, self.inputs, self.numeric, self.outputs = config, tuple(inputs), numeric, outputs
        self.rules: list[Rule] = [(r".*", ())]
        self.shapes = {"bias": jax.ShapeDtypeStruct((outputs,), jnp.float32)}
        if numeric:
            self.shapes["numeric"] = jax.ShapeDtypeStruct((numeric, outputs), jnp.float32)

    def init(self, key: Key[Array, ""]) -> Params:
        """Zeros."""
        del key
        return {name: jnp.zeros(value.shape, value.dtype) for name, value in self.shapes.items()}

    def apply(self, params: Params, batch: Mapping[str, Any], key: Key[Array, ""] | None) -> Float[Array, "batch ..."]:
        """Logits, float32: [batch] of one output, else [batch, outputs]; `key` changes nothing."""
        total = jnp.broadcast_to(params["bias"].astype(jnp.float32)[None], (batch["id"].shape[0], self.outputs))
        for feature in self.inputs:
            total = total + pooled(batch, feature).astype(jnp.float32)
        if self.numeric:
            kernel = constrain(params["numeric"].astype(jnp.float32), ("embed", None))
            total = total + batch["numeric"].astype(jnp.float32) @ kernel
        return total[:, 0] if self.outputs == 1 else total
