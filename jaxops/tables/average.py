"""An exact moving average of every row of a table, of which a step updates only the rows that it touches.

Between two touches a row does not change, so the average's gap to it shrinks by one factor: the product of the rates of
`core.optimizer.ema`, which rise to the decay. That product has a closed form. Tested in tests/tables/test_average.py
against `core.optimizer.ema`.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

AVERAGE, SINCE = "average", "averaged"
"""Names of two slots: the average, and the step of the table at which it was last updated."""


def left(decay: float, since: Int[Array, "..."], now: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns the fraction of the gap between average and row at step `since` that remains at step `now`, in float32.

    It is the product of min(decay, (1 + i) / (10 + i)) over i = since, ..., now - 1.
    """
    turn = math.floor((10 * decay - 1) / (1 - decay)) + 1  # from this step on the rate is the decay itself

    def early(step: Int[Array, "..."]) -> Float[Array, "..."]:
        # This is the log of n! 9! / (n + 9)!, the product of (1 + i) / (10 + i) over i < n.
        n = jnp.clip(step, 0, max(turn, 0)).astype(jnp.float32)
        return -sum((jnp.log1p(n / j) for j in range(1, 10)), start=jnp.zeros_like(n))

    late = (jnp.maximum(now, turn) - jnp.maximum(since, turn)).astype(jnp.float32)
    return jnp.exp(early(now) - early(since) + late * math.log(decay))


def moved(
    average: Float[Array, "n dim"],
    since: Int[Array, " n"],
    old: Float[Array, "n dim"],
    new: Float[Array, "n dim"],
    count: Int[Array, ""],
    decay: float,
) -> Float[Array, "n dim"]:
    """Returns the average after step `count`, which changed rows from `old` to `new`.

    Args:
      average: the average at step `since`.
      since: step at which each row was last touched.
      old: rows before the step.
      new: rows after the step.
      count: the step.
      decay: decay of the average.
    """
    before = caught_up(average, since, old, count - 1, decay)
    return new + (before - new) * left(decay, count - 1, count).astype(new.dtype)


def caught_up(
    average: Float[Array, "n dim"],
    since: Int[Array, " n"],
    rows: Float[Array, "n dim"],
    count: Int[Array, ""],
    decay: float,
) -> Float[Array, "n dim"]:
    """Returns the average at step `count` of rows that have not changed since step `since`.

    Args:
      average: the average at step `since`.
      since: step at which each row was last touched.
      rows: the rows.
      count: the step.
      decay: decay of the average.
    """
    share = left(decay, since, jnp.broadcast_to(count, since.shape)).astype(average.dtype)
    wide = rows.astype(average.dtype)
    return wide + (average - wide) * share[:, None]
