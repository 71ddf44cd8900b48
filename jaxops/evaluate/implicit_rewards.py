"""Metrics of a policy that is optimised on preferences: its implicit rewards, beta * log ratio to its reference.

All are computed on the host in float64 from the log-probabilities of both texts of each held-out pair. Tested in
tests/evaluate/test_implicit_rewards.py.
"""

import math

import numpy as np
from jaxtyping import Float

from jaxops.core.metric import Metric
from jaxops.evaluate import preferences
from jaxops.evaluate.preferences import Judged, mean

METRICS = {
    **{name: metric for name, metric in preferences.METRICS.items() if name != "disagreement"},
    "loss": Metric("loss", "lower", "Preference loss"),
    "reward_margin": Metric("reward_margin", "neither", "Reward margin"),
    "reward_chosen": Metric("reward_chosen", "neither", "Reward, chosen"),
    "reward_rejected": Metric("reward_rejected", "neither", "Reward, rejected"),
    "logprob_chosen": Metric("logprob_chosen", "neither", "Logprob, chosen"),
    "logprob_rejected": Metric("logprob_rejected", "neither", "Logprob, rejected"),
    "nll": Metric("nll", "lower", "NLL, chosen"),
    "perplexity": Metric("perplexity", "lower", "Perplexity, chosen"),
}
"""The metrics of `measure`."""


def measure(
    judged: Judged,
    policy: Float[np.ndarray, "pairs two"],
    reference: Float[np.ndarray, "pairs two"],
    tokens: Float[np.ndarray, "pairs two"],
    *,
    beta: float = 1.0,
    losses: Float[np.ndarray, " pairs"] | None = None,
) -> dict[str, float]:
    """Returns the metrics of `METRICS`: those of scores against judgements, with implicit rewards as the scores.

    `loss` is the mean loss of all pairs. `reward_margin` and what is called chosen and rejected are of the better and
    the worse text of each pair, ties left out. `nll` is the mean over the tokens of all better texts.

    Args:
      judged: the judgements.
      policy: the log-probability of each text under the policy.
      reference: the same under the reference.
      tokens: number of tokens of each text that these are sums over.
      beta: the scale of the rewards.
      losses: the loss of each pair; None gives no `loss`.
    """
    policy, reference = np.asarray(policy, np.float64), np.asarray(reference, np.float64)
    rewards = beta * (policy - reference)
    label, weight = judged.label, judged.weight * (judged.label != 0.5)
    found = preferences.measure(judged, rewards[:, :, None])
    del found["disagreement"]
    if losses is not None:
        found["loss"] = mean(np.asarray(losses, np.float64), judged.weight)
    chosen, rejected = _sides(label, rewards)
    found |= {"reward_margin": mean(chosen - rejected, weight)}
    found |= {"reward_chosen": mean(chosen, weight), "reward_rejected": mean(rejected, weight)}
    chosen, rejected = _sides(label, policy)
    found |= {"logprob_chosen": mean(chosen, weight), "logprob_rejected": mean(rejected, weight)}
    length = float((_sides(label, np.asarray(tokens, np.float64))[0] * weight).sum())
    nll = -float((chosen * weight).sum()) / length if length else math.nan
    return found | {"nll": nll, "perplexity": math.inf if nll > 700 else math.exp(nll)}


def _sides(label: Float[np.ndarray, " pairs"], values: Float[np.ndarray, "pairs two"]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of the better and of the worse text of each pair."""
    first = label > 0.5
    return np.where(first, values[:, 0], values[:, 1]), np.where(first, values[:, 1], values[:, 0])
