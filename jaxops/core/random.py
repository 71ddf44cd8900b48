"""Randomness without state: every key folds in seed, update and example id, so no layout can change a draw."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key

Objective = TypeVar("Objective", bound=Callable[..., Any])
SHARED_DRAWS = "shared_draws"
"""The attribute of an objective that says which of its draws all examples of a step share."""


def shared_draws(objective: Objective, what: str) -> Objective:
    """Declares that all examples of a step share draws of an objective, for `jaxops audit`; returns the objective.

    Example:
      def build(model):
          def objective(params, batch, key): ...
          return shared_draws(objective, "negatives")
    """
    setattr(objective, SHARED_DRAWS, what)
    return objective


def example_keys(key: Key[Array, ""] | None, ids: Int[Array, " batch"]) -> Key[Array, " batch"] | None:
    """Returns one key for each example, from the update's key and the example's id; None stays None (evaluation).

    Example:
      keys = jaxops.example_keys(key, batch["id"])  # in an objective(params, batch, key)
      hidden = jaxops.dropout(batch["x"], 0.1, keys, site=0)
    """
    if key is None:
        return None
    return jax.vmap(lambda example: jax.random.fold_in(key, example))(ids)


def dropout(
    x: Float[Array, "batch ..."], rate: float, keys: Key[Array, " batch"] | None, site: int
) -> Float[Array, "batch ..."]:
    """Zeroes entries with probability `rate`, drawn for each example, and scales the rest by 1 / (1 - rate).

    The threshold has 16 bits, which needs half the random words of 32 bits. The rate is off by at most 2^-17, and the
    scale fits the rounded rate exactly.

    Args:
      x: the activations, [batch, ...].
      rate: the probability of zero.
      keys: one key for each example, from `example_keys`; None returns `x` unchanged (evaluation).
      site: a number that differs between the calls in a model, so that their draws are independent.

    Example:
      keys = jaxops.example_keys(key, batch["id"])  # in an objective(params, batch, key)
      hidden = jaxops.dropout(batch["x"], 0.1, keys, site=0)
    """
    if keys is None or rate == 0:
        return x
    cut = round(rate * 2**16)

    def draw(key: Key[Array, ""]) -> Array:
        return jax.random.bits(jax.random.fold_in(key, site), x.shape[1:], jnp.uint16)

    kept = jax.vmap(draw)(keys) >= jnp.asarray(cut, jnp.uint16)
    return jnp.where(kept, x * jnp.asarray(2**16 / (2**16 - cut), x.dtype), jnp.zeros((), x.dtype))


SAMPLING = 0x5A3E
"""Folded in first, so that no draw of training shares its key with a sampled token."""


def sampling_keys(
    seed: Integer[Array, ""] | int,
    step: Integer[Array, ""] | int,
    example: Integer[Array, " batch"],
    copy: Integer[Array, " batch"],
    redraw: Integer[Array, " batch"],
    turn: Integer[Array, " batch"],
) -> Key[Array, " batch"]:
    """Returns a key for each completion, of which its name alone decides; fold in a token's position for its noise.

    Args:
      seed: the seed of the run.
      step: the step of the loop that samples.
      example: ids of the prompts.
      copy: numbers of the completions of one prompt.
      redraw: how often a completion was thrown away and drawn again.
      turn: turns of a conversation.
    """
    base = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), SAMPLING), step)

    def one(*name: Integer[Array, ""]) -> Key[Array, ""]:
        key = base
        for number in name:
            key = jax.random.fold_in(key, number)
        return key

    return jax.vmap(one)(example, copy, redraw, turn)
