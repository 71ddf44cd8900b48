"""The distribution that a token is drawn from: temperature, then top-k, top-p and min-p, renormalised.

The borders of top-k and top-p are found by bisection on the bits of the probabilities. That needs counts and sums over
the vocabulary alone, so that a vocabulary which is sharded over `tensor` is neither gathered nor sorted.
Tested in tests/rl/test_distribution.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxops.rl.options import SampleOptions

PADDING = -1e8
"""A logit at or below this is a padding row of the vocabulary: never drawn, whatever the temperature."""


class Drawn(NamedTuple):
    """Tokens that were drawn, and their log-probabilities.

    Attributes:
      token: the token.
      logprob: its log-probability under the distribution that it was drawn from; 0 without noise.
      plain: its log-probability under the model, at temperature 1 with nothing left out.
    """

    token: Int[Array, " batch"]
    logprob: Float[Array, " batch"]
    plain: Float[Array, " batch"]


def log_distribution(logits: Float[Array, "batch vocab"], options: SampleOptions) -> Float[Array, "batch vocab"]:
    """Returns the log-probabilities that tokens are drawn with, float32; -inf for those that are left out."""
    logits = jnp.where(logits > PADDING, logits.astype(jnp.float32), -jnp.inf)
    if options.greedy:
        best = jnp.argmax(logits, axis=-1)
        return jnp.where(jnp.arange(logits.shape[-1])[None] == best[:, None], 0.0, -jnp.inf)
    # The largest logit is taken away first: divided by a tiny temperature it would overflow.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.float32(options.temperature)
    found = jax.nn.log_softmax(scaled, axis=-1)
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        enough = options.top_k
        found = _most_probable(found, lambda kept, probs: jnp.sum(kept, axis=-1) >= enough)
    if options.top_p < 1:
        share = jnp.float32(options.top_p)
        found = _most_probable(found, lambda kept, probs: jnp.sum(jnp.where(kept, probs, 0.0), axis=-1) >= share)
    if options.min_p > 0:
        least = jnp.max(found, axis=-1, keepdims=True) + jnp.log(jnp.float32(options.min_p))
        found = _kept(found, found >= least)
    return found


def draw(logits: Float[Array, "batch vocab"], options: SampleOptions, keys: Key[Array, " batch"]) -> Drawn:
    """Draws one token for each row, by adding Gumbel noise to the log-probabilities and taking the largest sum.

    The noise of a row is a function of its key alone, so that a small error of the logits changes the token only where
    the two largest sums are nearly equal.

    Args:
      logits: logits over the vocabulary.
      options: the distribution.
      keys: a key for each row.
    """
    logits = jnp.where(logits > PADDING, logits.astype(jnp.float32), -jnp.inf)
    if options.greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        plain = -jnp.log(jnp.sum(jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), axis=-1))
        return Drawn(token, jnp.zeros_like(plain), plain)
    every = jax.nn.log_softmax(logits, axis=-1)
    found = every if options.plain else log_distribution(logits, options)
    # Noise of the usual kind has 23 bits, which never draws what is less probable than about 1e-7.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32, mode="high"))(keys)
    token = jnp.argmax(found + noise, axis=-1).astype(jnp.int32)
    plain = _of(every, token)
    return Drawn(token, plain if options.plain else _of(found, token), plain)


def _of(logprobs: Float[Array, "batch vocab"], token: Int[Array, " batch"]) -> Float[Array, " batch"]:
    """Picks one entry of each row by a masked sum, which a sharded vocabulary needs no gather for."""
    chosen = jnp.arange(logprobs.shape[-1])[None] == token[:, None]
    return jnp.sum(jnp.where(chosen, logprobs, 0.0), axis=-1)


def _kept(logprobs: Float[Array, "batch vocab"], kept: Bool[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
    """Leaves out what is not kept, and renormalises."""
    return jax.nn.log_softmax(jnp.where(kept, logprobs, -jnp.inf), axis=-1)


def _most_probable(
    logprobs: Float[Array, "batch vocab"],
    enough: Callable[[Bool[Array, "batch vocab"], Float[Array, "batch vocab"]], Bool[Array, " batch"]],
) -> Float[Array, "batch vocab"]:
    """Keeps the fewest most probable tokens that are `enough(kept, probabilities)`, and renormalises.

    Bits of positive floats are ordered as the floats are, so 31 halvings find the largest border exactly.
    """
    probs = jnp.exp(logprobs)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(at: Int[Array, ""], border: Int[Array, " batch"]) -> Int[Array, " batch"]:
        higher = border + jnp.left_shift(jnp.int32(1), 30 - at.astype(jnp.int32))
        return jnp.where(enough(bits >= higher[:, None], probs), higher, border)

    border = jax.lax.fori_loop(0, 31, halve, jnp.zeros(logprobs.shape[0], jnp.int32))
    return _kept(logprobs, bits >= border[:, None])
