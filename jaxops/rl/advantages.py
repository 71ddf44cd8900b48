"""Advantages: what each token did better than expected, from rewards, values and groups of completions.

All arrays are [batch, longest], with a mask that is 1 at tokens of the completion; what stands outside of it is not
read, and need not be finite. Whitening and group statistics are over the global batch, so they are the same on any
number of devices.
Checked against float64 in tests/rl/test_advantages.py, and against other trainers in tests/rl/test_oracles.py.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Variance = Literal["biased", "unbiased"]
Baseline = Literal["mean", "others"]


class Advantages(NamedTuple):
    """Advantages, and the returns that values are trained towards; both are 0 outside the mask."""

    advantages: Float[Array, "batch longest"]
    returns: Float[Array, "batch longest"]


def rewards_of_tokens(
    scores: Float[Array, " batch"],
    mask: Float[Array, "batch longest"],
    kl: Float[Array, "batch longest"] | None = None,
    coefficient: Float[Array, ""] | float = 0.0,
) -> Float[Array, "batch longest"]:
    """Returns the reward of each token: the score at the last token of the mask, less coefficient * KL at each.

    Args:
      scores: the score of each completion.
      mask: 1 at tokens of the completion, the one that ended it included.
      kl: an estimate of the KL at each token; None leaves it out.
      coefficient: its weight.
    """
    after = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    last = (mask > 0) & (jnp.cumsum(after[:, ::-1], axis=1)[:, ::-1] == 0)
    rewards = jnp.where(last, scores[:, None], 0.0)
    # A choice and no product: outside the mask the estimate need not be finite.
    return rewards if kl is None else rewards - jnp.where(mask > 0, coefficient * kl, 0.0)


def generalised_advantages(
    rewards: Float[Array, "batch longest"],
    values: Float[Array, "batch longest"],
    mask: Float[Array, "batch longest"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Float[Array, " batch"] | None = None,
) -> Advantages:
    """Returns generalised advantages (GAE, Schulman et al. 2016) and returns = advantages + values.

    A token outside the mask, such as one that a tool wrote, is stepped over: it has no advantage, and the token before
    it is followed by the next one of the mask.

    Args:
      rewards: the reward of each token.
      values: the value of the state before each token.
      mask: 1 at tokens of the policy's own.
      gamma: discount of a token.
      lam: how far advantages look ahead: 0 is one token, 1 is to the end.
      bootstrap: the value after the last token, where a completion was cut and not ended; None is 0 for all.
    """

    def before(carry: tuple[Array, Array], now: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        following, value_after = carry
        reward, value, here = now
        advantage = reward + gamma * value_after - value + gamma * lam * following
        kept = (jnp.where(here > 0, advantage, following), jnp.where(here > 0, value, value_after))
        return kept, jnp.where(here > 0, advantage, 0.0)

    nothing = jnp.zeros_like(values[:, 0])
    end = nothing if bootstrap is None else bootstrap
    steps = (rewards.T, values.T, mask.T)
    _, advantages = jax.lax.scan(before, (nothing, end), steps, reverse=True)
    return Advantages(advantages.T, jnp.where(mask.T > 0, advantages + values.T, 0.0).T)


def whitened(
    values: Float[Array, "batch longest"],
    mask: Float[Array, "batch longest"],
    *,
    shift: bool = True,
    variance: Variance = "biased",
    eps: float = 1e-8,
) -> Float[Array, "batch longest"]:
    """Returns values with deviation 1 over the global mask, and mean 0 too where `shift`; 0 outside the mask.

    `biased` divides the squares by their number n, as TensorFlow's moments do; `unbiased` by n - 1, as torch does.

    Args:
      values: the values.
      mask: their weights.
      shift: whether the mean is taken off.
      variance: which variance.
      eps: is added to the variance.
    """
    count = jnp.maximum(jnp.sum(mask), 1.0)
    values = jnp.where(mask > 0, values, 0.0)
    mean = jnp.sum(values * mask) / count
    spread = jnp.sum(jnp.square(values - mean) * mask)
    spread = spread / (count if variance == "biased" else jnp.maximum(count - 1, 1.0))
    white = (values - mean) * jax.lax.rsqrt(spread + eps)
    return jnp.where(mask > 0, white if shift else white + mean, 0.0)


class GroupAdvantages(NamedTuple):
    """The advantage of each completion over its group, and which groups have nothing to tell.

    Attributes:
      advantages: one for each completion.
      flat: true for completions whose whole group has one score.
    """

    advantages: Float[Array, " batch"]
    flat: Array


def group_advantages(
    scores: Float[Array, " batch"],
    group: int,
    *,
    weight: Float[Array, " batch"] | None = None,
    baseline: Baseline = "mean",
    scaled: bool = True,
    eps: float = 1e-6,
) -> GroupAdvantages:
    """Returns the advantage of each completion over the others of its prompt; a group's completions are neighbours.

    `mean` compares with the mean of the group (GRPO, Shao et al. 2024; unscaled: Dr. GRPO). `others` compares with the
    mean of the other completions (RLOO, Ahmadian et al. 2024). Scaling divides by the unbiased deviation of the group.

    Args:
      scores: the score of each completion.
      group: the number of completions of a prompt.
      weight: 0 for completions that were dropped: they have no advantage and belong to no baseline.
      baseline: what a score is compared with.
      scaled: whether the deviation of the group divides.
      eps: is added to the deviation.
    """
    rows = scores.reshape(-1, group)
    there = jnp.ones_like(rows) if weight is None else (weight.reshape(-1, group) > 0).astype(rows.dtype)
    rows = jnp.where(there > 0, rows, 0.0)
    count = jnp.sum(there, axis=1, keepdims=True)
    mean = jnp.sum(rows, axis=1, keepdims=True) / jnp.maximum(count, 1.0)
    away = (rows - mean) * there
    found = away * count / jnp.maximum(count - 1, 1.0) if baseline == "others" else away
    largest = jnp.max(jnp.where(there > 0, rows, -jnp.inf), axis=1, keepdims=True)
    least = jnp.min(jnp.where(there > 0, rows, jnp.inf), axis=1, keepdims=True)
    flat = ~(largest > least)
    if scaled:
        deviation = jnp.sqrt(jnp.sum(jnp.square(away), axis=1, keepdims=True) / jnp.maximum(count - 1, 1.0))
        found = found / (deviation + eps)
    # A group of one score has no advantage exactly, not what rounding of its mean leaves.
    found = jnp.where(flat, 0.0, found)
    return GroupAdvantages(found.reshape(-1), jnp.broadcast_to(flat, rows.shape).reshape(-1))


def best_of_group(
    scores: Float[Array, " batch"], group: int, *, keep: int = 1, weight: Float[Array, " batch"] | None = None
) -> GroupAdvantages:
    """Returns 1 for the best completions of each prompt and 0 for the others (rejection sampling, Touvron et al. 2023).

    A group's completions are neighbours; of equal scores the first counts. A group of one score has no best one: all of
    it is 0, and marked `flat`.

    Args:
      scores: the score of each completion.
      group: the number of completions of a prompt.
      keep: how many of them are best.
      weight: 0 for completions that were dropped, which are never best.
    """
    rows = scores.reshape(-1, group)
    there = jnp.ones(rows.shape, bool) if weight is None else weight.reshape(-1, group) > 0
    order = jnp.argsort(jnp.where(there, -rows, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True)
    largest = jnp.max(jnp.where(there, rows, -jnp.inf), axis=1, keepdims=True)
    flat = ~(largest > jnp.min(jnp.where(there, rows, jnp.inf), axis=1, keepdims=True))
    best = (rank < keep) & there & ~flat
    return GroupAdvantages(best.astype(scores.dtype).reshape(-1), jnp.broadcast_to(flat, rows.shape).reshape(-1))
