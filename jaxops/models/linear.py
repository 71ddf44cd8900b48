"""Logistic regression on tables of width one: the baseline that a click model has to beat."""

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
    """Logistic regression, which has no settings."""

    sort: ClassVar[str] = "click"
    label: ClassVar[str] = "Logistic regression"

    kind: Literal["linear"] = "linear"

    def problems(self) -> list[tuple[str, str]]:
        """Returns no errors: there is nothing to set."""
        return []

    def build(self, data: ExampleFeatures) -> "LogisticRegression":
        """Builds the model for the features of this data.

        Raises:
          UserError: the features do not suit the model.
        """
        return LogisticRegression(self, data.inputs, data.numeric, data.outputs)


class LogisticRegression:
    """The sum of a bias, the rows of the features and the weighted numeric columns; every parameter starts at zero.

    With several labels each row holds one number for each label.

    Args:
      config: it has no settings.
      inputs: the features that are read from tables.
      numeric: number of numeric columns.
      outputs: number of labels.

    Raises:
      UserError: a table's width is not the number of labels (mostly one).
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
        """Returns zeros; the key changes nothing."""
        del key
        return {name: jnp.zeros(value.shape, value.dtype) for name, value in self.shapes.items()}

    def apply(self, params: Params, batch: Mapping[str, Any], key: Key[Array, ""] | None) -> Float[Array, "batch ..."]:
        """Returns the logits, float32: [batch] for one label, else [batch, outputs]. The key changes nothing."""
        total = jnp.broadcast_to(params["bias"].astype(jnp.float32)[None], (batch["id"].shape[0], self.outputs))
        for feature in self.inputs:
            total = total + pooled(batch, feature).astype(jnp.float32)
        if self.numeric:
            kernel = constrain(params["numeric"].astype(jnp.float32), ("embed", None))
            total = total + batch["numeric"].astype(jnp.float32) @ kernel
        return total[:, 0] if self.outputs == 1 else total
