"""Randomness without state: every key is a fold of (seed, step, example id), so no layout can change a draw."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def example_keys(key: Key[Array, ""] | None, ids: Int[Array, " batch"]) -> Key[Array, " batch"] | None:
    """One key an example, from the step's key and the example's id; None stays None (evaluation)."""
    if key is None:
        return None
    return jax.vmap(lambda example: jax.random.fold_in(key, example))(ids)


def dropout(
    x: Float[Array, "batch ..."], rate: float, keys: Key[Array, " batch"] | None, site: int
) -> Float[Array, "batch ..."]:
    """Zeroes entries with probability `rate` and scales the rest, drawn per example; `site` tells calls apart.

    The threshold has 16 bits (half the random words of 32): the rate is off by at most 2^-17 and the scale is exact.
    """
    if keys is None or rate == 0:
        return x
    cut = round(rate * 2**16)

    def draw(key: Key[Array, ""]) -> Array:
        return jax.random.bits(jax.random.fold_in(key, site), x.shape[1:], jnp.uint16)

    kept = jax.vmap(draw)(keys) >= jnp.asarray(cut, jnp.uint16)
    return jnp.where(kept, x * jnp.asarray(2**16 / (2**16 - cut), x.dtype), jnp.zeros((), x.dtype))
