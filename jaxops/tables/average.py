"""A moving average of every row, exact, of which a step touches the touched rows alone.

Between two touches a row stands still, so all that the average did in between is one power: of `core.optimizer.ema`'s
rates, which rise to the decay, the product has a closed form. Held by tests/tables/test_average.py, against that.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

AVERAGE, SINCE = "average", "averaged"
"""Slots: the average as it was at the table's step `averaged`."""


def left(decay: float, since: Int[Array, "..."], now: Int[Array, "..."]) -> Float[Array, "..."]:
    """What is left at step `now` of a distance at step `since`: the product of min(decay, (1 + i) / (10 + i)), float32.

    i runs over since, ..., now - 1.
    """
    turn = math.floor((10 * decay - 1) / (1 - decay)) + 1  # from here on it is the decay itself

    def early(step: Int[Array, "..."]) -> Float[Array, "..."]:
        # log of n! 9! / (n + 9)!, the product of (1 + i) / (10 + i) for i < n
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
    """The average after step `count`, which made `new` of `old` rows, last touched at step `since`."""
    before = caught_up(average, since, old, count - 1, decay)
    return new + (before - new) * left(decay, count - 1, count).astype(new.dtype)


def caught_up(
    average: Float[Array, "n dim"],
    since: Int[Array, " n"],
    rows: Float[Array, "n dim"],
    count: Int[Array, ""],
    decay: float,
) -> Float[Array, "n dim"]:
    """The average at step `count` of rows that stand still since step `since`."""
    share = left(decay, since, jnp.broadcast_to(count, since.shape)).astype(average.dtype)
    wide = rows.astype(average.dtype)
    return wide + (average - wide) * share[:, None]
