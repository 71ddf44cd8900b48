"""The one contract: an objective returns sums and counts, so the division of a batch cannot change an update.

A `Sum` keeps total and count apart until the very end. Merging is addition, so microbatches, devices and hosts
merge in any grouping to the same number. Tested in tests/property.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LOSS = "loss/"
"""The prefix of loss terms: entries named `loss/...` are minimised, and every other entry is a metric."""


def wide_dtype(dtype: Any) -> Any:
    """Returns the dtype in which values of this floating dtype are summed: float64 for float64, otherwise float32."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _identity(value: np.ndarray) -> Any:
    return value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum:
    """A weighted sum and its weight, both float32 and of one shape (any); its value is total / count.

    Attributes:
      total: the sum of the weighted values.
      count: the sum of the weights.
      finalize: is applied on the host to total / count, for example a square root for a standard deviation.

    Example:
      def objective(params, batch, key):
          error = (batch["x"] @ params["w"])[:, 0] - batch["y"]
          return {"loss/mse": jaxops.Sum.of(error**2, batch["weight"]), "bias": jaxops.Sum.of(error)}
    """

    total: Float[Array, "..."]
    count: Float[Array, "..."]
    finalize: Callable[[np.ndarray], Any] = dataclasses.field(default=_identity, metadata={"static": True})

    @classmethod
    def of(cls, values: Array, weight: Array | None = None) -> "Sum":
        """Returns the sum of `weight * values` over all entries, with the sum of `weight` as its count.

        `weight` (default 1) has the leading dimensions of `values` and broadcasts over the others. Entries of weight
        zero are left out even where their value is not finite, since padding may hold anything. The gradient of such an
        entry is zero where the derivative of its value is finite; where that is not finite, the gradient is NaN.
        """
        values = jnp.asarray(values).astype(jnp.float32)
        if weight is None:
            return cls(jnp.sum(values), jnp.asarray(values.size, jnp.float32))
        weight = jnp.asarray(weight).astype(jnp.float32)
        weight = jnp.broadcast_to(weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim)), values.shape)
        return cls(jnp.sum(jnp.where(weight != 0, values, 0.0) * weight), jnp.sum(weight))

    def merge(self, other: "Sum") -> "Sum":
        """Adds totals and counts."""
        return dataclasses.replace(self, total=self.total + other.total, count=self.count + other.count)

    def value(self) -> Any:
        """Returns `finalize(total / count)` in float64 on the host; entries with a count of zero are NaN."""
        total, count = np.asarray(self.total, np.float64), np.asarray(self.count, np.float64)
        return self.finalize(np.divide(total, count, out=np.full_like(total, np.nan), where=count != 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Max:
    """A running maximum, float32 of any shape; `finalize` is applied to it on the host.

    Example:
      logits = batch["x"] @ params["w"]
      metrics = {"largest_logit": jaxops.Max(jnp.max(logits))}
    """

    maximum: Float[Array, "..."]
    finalize: Callable[[np.ndarray], Any] = dataclasses.field(default=_identity, metadata={"static": True})

    def merge(self, other: "Max") -> "Max":
        """Takes the larger entry of the two at each position."""
        return dataclasses.replace(self, maximum=jnp.maximum(self.maximum, other.maximum))

    def value(self) -> Any:
        """Returns `finalize(maximum)` in float64 on the host."""
        return self.finalize(np.asarray(self.maximum, np.float64))


Sums = dict[str, Sum | Max]
"""The loss terms and metrics of an objective, by name."""


def merge(a: Mapping[str, Sum | Max], b: Mapping[str, Sum | Max]) -> Sums:
    """Merges two sets of sums entry by entry; both must have the same names.

    Raises:
      ValueError: the names differ.
    """
    if a.keys() != b.keys():
        raise ValueError(f"cannot merge metrics of different names: {sorted(a.keys() ^ b.keys())}")
    return {name: a[name].merge(b[name]) for name in a}  # type: ignore[arg-type]


def finalize(sums: Mapping[str, Sum | Max]) -> dict[str, Any]:
    """Returns the host-side values: a float for a scalar entry, otherwise the result of the entry's `finalize`."""
    out = {}
    for name, entry in sums.items():
        value = entry.value()
        out[name] = float(value) if np.ndim(value) == 0 else value
    return out
