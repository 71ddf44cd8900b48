"""Sparse optimizers of tables: each updates only the touched rows, and its name says exactly what it does.

A rule takes the touched rows, their slots and one summed gradient per row, all [n, ...], in float32 or wider, and
returns new rows and slots. No rule changes rows that a step does not touch. Tested in tests/tables/test_tables.py.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Slots = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowRule:
    """The base of all rules.

    Attributes:
      lr: learning rate.
      clip: Euclidean norm to which each row's gradient is clipped; None for no clipping.
    """

    lr: float = 0.05
    clip: float | None = None

    def problems(self) -> list[tuple[str, str]]:
        """Returns the invalid values as (field, message)."""
        found = []
        if self.lr <= 0:
            found.append(("lr", "expected a positive learning rate"))
        if self.clip is not None and self.clip <= 0:
            found.append(("clip", "expected a positive norm, or null for none"))
        return found

    def slots(self, dim: int) -> dict[str, tuple[tuple[int, ...], float]]:
        """Returns the slots that are stored for each row: name -> (shape, initial value)."""
        return {}

    def update(
        self, rows: Float[Array, "n dim"], slots: Slots, grads: Float[Array, "n dim"], count: Int[Array, ""]
    ) -> tuple[Float[Array, "n dim"], Slots]:
        """Returns the rows and slots after a step.

        Args:
          rows: the touched rows.
          slots: their slots by name.
          grads: their gradients.
          count: number of steps taken, including this one.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSgd(RowRule):
    """Stochastic gradient descent: row -= lr * gradient."""

    kind: Literal["sgd"] = "sgd"

    def update(self, rows: Array, slots: Slots, grads: Array, count: Array) -> tuple[Array, Slots]:
        return rows - self.lr * grads, {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adagrad(RowRule):
    """Element-wise Adagrad, as in `optax.adagrad`: row -= lr * g / sqrt(sum of g^2 + eps) (Duchi et al. 2011)."""

    kind: Literal["adagrad"] = "adagrad"
    initial_accumulator: float = 0.1
    eps: float = 1e-7

    def slots(self, dim: int) -> dict[str, tuple[tuple[int, ...], float]]:
        return {"sum": ((dim,), self.initial_accumulator)}

    def update(self, rows: Array, slots: Slots, grads: Array, count: Array) -> tuple[Array, Slots]:
        total = slots["sum"] + grads * grads
        scale = jnp.where(total > 0, 1 / jnp.sqrt(total + self.eps), 0)
        return rows - self.lr * grads * scale, {"sum": total}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowwiseAdagrad(RowRule):
    """Adagrad with one number per row, the sum over steps of the row's mean of g^2: row -= lr * g / (sqrt(sum) + eps).

    FBGEMM and TorchRec define it so; their sum also begins at zero, and their eps is also 1e-8.
    """

    kind: Literal["rowwise_adagrad"] = "rowwise_adagrad"
    initial_accumulator: float = 0.0
    eps: float = 1e-8

    def slots(self, dim: int) -> dict[str, tuple[tuple[int, ...], float]]:
        return {"sum": ((), self.initial_accumulator)}

    def update(self, rows: Array, slots: Slots, grads: Array, count: Array) -> tuple[Array, Slots]:
        total = slots["sum"] + jnp.mean(grads * grads, axis=-1)
        return rows - self.lr * grads / (jnp.sqrt(total) + self.eps)[:, None], {"sum": total}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseAdam(RowRule):
    """Adam on the touched rows; the moments of other rows do not change (`torch.optim.SparseAdam`).

    The bias correction uses the number of steps of the table, not of the row.
    """

    kind: Literal["sparse_adam"] = "sparse_adam"
    lr: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def slots(self, dim: int) -> dict[str, tuple[tuple[int, ...], float]]:
        return {"mu": ((dim,), 0.0), "nu": ((dim,), 0.0)}

    def update(self, rows: Array, slots: Slots, grads: Array, count: Array) -> tuple[Array, Slots]:
        return self._moved(rows, slots["mu"], slots["nu"], grads, count)

    def _moved(self, rows: Array, mu: Array, nu: Array, grads: Array, count: Array) -> tuple[Array, Slots]:
        mu = self.b1 * mu + (1 - self.b1) * grads
        nu = self.b2 * nu + (1 - self.b2) * grads * grads
        steps = count.astype(rows.dtype)
        ahead, spread = mu / (1 - self.b1**steps), nu / (1 - self.b2**steps)
        return rows - self.lr * ahead / (jnp.sqrt(spread) + self.eps), {"mu": mu, "nu": nu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyAdam(SparseAdam):
    """Adam whose moments are, at every touch, exactly those of dense Adam: they first decay by beta^(t - last touch).

    Dense Adam would also move the row in between, by its momentum alone; here a row moves only when it is touched. A
    row that every step touches moves as under dense Adam.
    """

    kind: Literal["lazy_adam"] = "lazy_adam"  # type: ignore[assignment]

    def slots(self, dim: int) -> dict[str, tuple[tuple[int, ...], float]]:
        return {**super().slots(dim), "last": ((), 0.0)}

    def update(self, rows: Array, slots: Slots, grads: Array, count: Array) -> tuple[Array, Slots]:
        steps = count.astype(slots["last"].dtype)
        missed = (steps - slots["last"] - 1)[:, None].astype(rows.dtype)
        mu, nu = slots["mu"] * self.b1**missed, slots["nu"] * self.b2**missed
        rows, moved = self._moved(rows, mu, nu, grads, count)
        return rows, {**moved, "last": jnp.broadcast_to(steps, slots["last"].shape)}


TableOptimizer = TableSgd | Adagrad | RowwiseAdagrad | SparseAdam | LazyAdam


def clip_rows(grads: Float[Array, "n dim"], norm: float | None) -> Float[Array, "n dim"]:
    """Scales each row that is longer down to this Euclidean norm."""
    if norm is None:
        return grads
    length = jnp.sqrt(jnp.sum(grads * grads, axis=-1, keepdims=True))
    return grads * (norm / jnp.maximum(length, norm))
