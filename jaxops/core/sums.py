"""The one contract: what an objective returns is sums and counts, so how a batch is cut up cannot change an update.

A `Sum` keeps total and count apart until the very end; merging is addition, so microbatches, devices and hosts
merge in any grouping to the same number. Held by tests/property.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LOSS = "loss/"
"""Terms named `loss/...` are minimised; every other entry is a metric."""


def _identity(value: np.ndarray) -> Any:
    return value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum:
    """A weighted sum and its weight, both float32 and of any (equal) shape; its value is total / count.

    `finalize` is applied on the host to total / count (a square root for a standard deviation, say).
    """

    total: Float[Array, "..."]
    count: Float[Array, "..."]
    finalize: Callable[[np.ndarray], Any] = dataclasses.field(default=_identity, metadata={"static": True})

    @classmethod
    def of(cls, values: Array, weight: Array | None = None) -> "Sum":
        """Sum of `values` and of `weight` over all entries; `weight` (default one) broadcasts to `values`.

        Entries of weight zero are left out even when their value is not finite (padding may hold anything). Their
        gradient is zero where the derivative of the value is finite; 0 x NaN stays NaN.
        """
        values = jnp.asarray(values).astype(jnp.float32)
        if weight is None:
            return cls(jnp.sum(values), jnp.asarray(values.size, jnp.float32))
        weight = jnp.asarray(weight).astype(jnp.float32)
        weight = jnp.broadcast_to(weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim)), values.shape)
        return cls(jnp.sum(jnp.where(weight != 0, values, 0.0) * weight), jnp.sum(weight))

    def merge(self, other: "Sum") -> "Sum":
        return dataclasses.replace(self, total=self.total + other.total, count=self.count + other.count)

    def value(self) -> Any:
        total, count = np.asarray(self.total, np.float64), np.asarray(self.count, np.float64)
        return self.finalize(np.divide(total, count, out=np.full_like(total, np.nan), where=count != 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Max:
    """A running maximum, float32 of any shape."""

    maximum: Float[Array, "..."]
    finalize: Callable[[np.ndarray], Any] = dataclasses.field(default=_identity, metadata={"static": True})

    def merge(self, other: "Max") -> "Max":
        return dataclasses.replace(self, maximum=jnp.maximum(self.maximum, other.maximum))

    def value(self) -> Any:
        return self.finalize(np.asarray(self.maximum, np.float64))


Sums = dict[str, Sum | Max]


def merge(a: Mapping[str, Sum | Max], b: Mapping[str, Sum | Max]) -> Sums:
    """Entry by entry; both must name the same entries.

    Raises:
      ValueError: the names differ.
    """
    if a.keys() != b.keys():
        raise ValueError(f"cannot merge metrics of different names: {sorted(a.keys() ^ b.keys())}")
    return {name: a[name].merge(b[name]) for name in a}  # type: ignore[arg-type]


def finalize(sums: Mapping[str, Sum | Max]) -> dict[str, Any]:
    """Host-side values: a float for a scalar entry, else whatever the entry's `finalize` returns."""
    out = {}
    for name, entry in sums.items():
        value = entry.value()
        out[name] = float(value) if np.ndim(value) == 0 else value
    return out
