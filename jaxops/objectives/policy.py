"""The losses of policy optimisation, token by token: clipped surrogates, clipped values, and estimates of the KL.

A completion's tokens are [batch, longest], with a mask that is true up to and including the token that ended it.
Each function works on tokens alone; means over tokens, over completions or by a constant are made by `aggregated`.
Checked against float64 in tests/objectives/test_policy.py, and against recorded numbers of TRL, verl and OpenRLHF in
tests/rl/test_oracles.py.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxops.core.sums import Sum

Estimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["tokens", "completions", "constant"]

LARGEST = 20.0
"""Logarithms of ratios are bounded by this, so that no probability that went to zero makes an infinite ratio."""


class Surrogate(NamedTuple):
    """The clipped surrogate of each token.

    Attributes:
      loss: what is minimised.
      ratio: probability under the policy over probability under the one that sampled.
      clipped: whether the bound holds the loss, so that the token has no gradient.
    """

    loss: Float[Array, "batch longest"]
    ratio: Float[Array, "batch longest"]
    clipped: Bool[Array, "batch longest"]


def clipped_surrogate(
    logprobs: Float[Array, "batch longest"],
    old: Float[Array, "batch longest"],
    advantages: Float[Array, "batch longest"],
    mask: Float[Array, "batch longest"],
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
) -> Surrogate:
    """Returns PPO's loss of each token, max(-A r, -A clip(r, 1 - low, 1 + high)) (Schulman et al. 2017).

    Args:
      logprobs: log-probabilities under the policy.
      old: log-probabilities under the policy that sampled.
      advantages: advantages; no gradient flows through them, nor through `old`.
      mask: 1 at tokens of the completion; the ratio is 1 elsewhere.
      low: the ratio is bounded by 1 - low from below.
      high: and by 1 + high from above; DAPO takes a larger one ("clip-higher", Yu et al. 2025).
      dual: where the advantage is negative, the loss is at most -dual * A (Ye et al. 2020); None leaves that out.
    """
    advantages, old = jax.lax.stop_gradient((advantages, old))
    # Chosen before the difference: outside the mask nothing need be finite, and the gradient there is zero.
    away = jnp.where(mask > 0, logprobs, 0.0) - jnp.where(mask > 0, old, 0.0)
    ratio = jnp.exp(jnp.clip(away, -LARGEST, LARGEST))
    plain, bounded = -advantages * ratio, -advantages * jnp.clip(ratio, 1 - low, 1 + high)
    loss, clipped = jnp.maximum(plain, bounded), bounded > plain
    if dual is not None:
        most = -advantages * dual
        beyond = (advantages < 0) & (loss > most)
        loss, clipped = jnp.where(beyond, most, loss), clipped | beyond
    return Surrogate(loss, ratio, clipped)


def clipped_value_loss(
    values: Float[Array, "batch longest"],
    old: Float[Array, "batch longest"],
    returns: Float[Array, "batch longest"],
    clip: float | None = 0.2,
) -> Float[Array, "batch longest"]:
    """Returns half the squared error of each value, that of the value moved by at most `clip` where that is larger.

    Args:
      values: the values now.
      old: the values when the completions were sampled.
      returns: what the values should be.
      clip: the largest move that counts; None compares the values as they are.
    """
    error = jnp.square(values - returns)
    if clip is not None:
        # So that the two errors are one number where nothing is clipped: old + clip(values - old) would round.
        near = jnp.clip(values, old - clip, old + clip)
        error = jnp.maximum(error, jnp.square(near - returns))
    return 0.5 * error


def kl_estimate(
    logprobs: Float[Array, "batch longest"],
    reference: Float[Array, "batch longest"],
    estimator: Estimator,
    mask: Float[Array, "batch longest"] | None = None,
) -> Float[Array, "batch longest"]:
    """Returns an estimate of KL(policy || reference) at each sampled token (Schulman, "Approximating KL divergence").

    With d = log policy - log reference: k1 is d, k2 is d^2 / 2, k3 is exp(-d) - 1 + d. All but k2 have the right mean.
    In the reward only k1 gives the gradient of the KL. As a loss k2 has that gradient where the tokens are fresh; k1
    has none in the mean, and k3 that of another divergence.

    Args:
      logprobs: log-probabilities under the policy.
      reference: log-probabilities under the reference.
      estimator: which estimate. In k3 the logarithm of the ratio is bounded to 20.
      mask: 1 at tokens of the completion; elsewhere the estimate is 0, whatever stands there. None takes all tokens.
    """
    if mask is not None:
        logprobs, reference = (jnp.where(mask > 0, x, 0.0) for x in (logprobs, reference))
    if estimator == "k1":
        return logprobs - reference
    if estimator == "k2":
        return 0.5 * jnp.square(logprobs - reference)
    away = jnp.clip(reference - logprobs, -LARGEST, LARGEST)
    return jnp.expm1(away) - away


def aggregated(
    values: Float[Array, "batch longest"],
    mask: Float[Array, "batch longest"],
    over: Aggregation = "tokens",
    longest: int | None = None,
) -> Sum:
    """Returns the sum whose value is the mean of a batch's token values; counts are those of the global batch.

    `tokens` is the mean over all tokens (PPO, DAPO): a long completion counts for more. `completions` is the mean over
    completions of each one's mean (GRPO). `constant` divides each completion's sum by `longest`, and takes the mean
    over completions (Dr. GRPO, Liu et al. 2025), so that no length is favoured.

    Args:
      values: a value for each token.
      mask: the weight of each token; completions whose tokens all have none are left out.
      over: what the mean is over.
      longest: the constant of `constant`; None takes the width of the batch.
    """
    each = jnp.sum(jnp.where(mask != 0, values, 0.0) * mask, axis=1)
    if over == "tokens":
        return Sum(jnp.sum(each), jnp.sum(mask))
    there = jnp.any(mask != 0, axis=1).astype(mask.dtype)
    size = jnp.sum(mask, axis=1) if over == "completions" else jnp.asarray(longest or mask.shape[1], mask.dtype)
    return Sum(jnp.sum(each / jnp.maximum(size, 1e-9) * there), jnp.sum(there))
