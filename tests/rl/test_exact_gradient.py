"""One update of each algorithm is the gradient that it promises, computed by enumeration, in direction and in size.

The task, the gradients and the sampler without noise are in exact_optimum.py and exact_gradient.py. The temperature is
0.7, and the policy is away from its reference, so that no term vanishes. What is left apart is the rounding of counts.
"""

import dataclasses

import numpy as np
import pytest
from exact_gradient import LENGTHS, STATE, apart, grouped, updated
from exact_optimum import TOKENS

from jaxops.rl.groups import Grpo
from jaxops.rl.kl import Kl
from jaxops.rl.ppo import Gae, Ppo

IN_REWARD = Kl(coef=0.5)
PPO = Ppo(gae=Gae(lambda_=1.0), whiten="none", kl=IN_REWARD, value_weight=0.5)
NEAR = 0.03


@pytest.mark.parametrize("layers", [pytest.param(1, marks=pytest.mark.slow), 0], ids=["transformer", "table"])
def test_ppo_follows_the_gradients_of_its_objective_and_of_the_error_of_its_values(layers):
    found = updated(PPO, layers)
    # The loss is a mean over tokens, and J one over completions.
    tokens = found.exact.mean(LENGTHS)
    assert apart(found.gradients["policy"], found.exact.policy_gradient(), -1 / tokens) < NEAR
    assert apart(found.gradients["value"], found.exact.value_gradient(), 0.5 / tokens) < NEAR


def test_whitening_divides_the_gradient_by_the_deviation_of_the_advantages():
    found = updated(dataclasses.replace(PPO, whiten="biased"))
    exact = found.exact
    advantages = exact.followed() - np.asarray(exact.values(exact.params["value"]))[STATE]
    mean = exact.token_mean(advantages)
    deviation = np.sqrt(exact.token_mean((advantages - mean) ** 2))
    assert abs(deviation - 1) > 0.05
    assert apart(found.gradients["policy"], exact.policy_gradient(), -1 / (exact.mean(LENGTHS) * deviation)) < NEAR


@pytest.mark.parametrize(
    "algorithm", [PPO, Grpo(kind="rloo", kl=IN_REWARD), Grpo(kind="dr_grpo", kl=IN_REWARD)], ids=lambda a: a.kind
)
def test_without_scaling_all_algorithms_follow_the_gradient_of_one_objective(algorithm):
    """A fourth of the completions is dropped, and belongs to no mean, no baseline and no KL."""
    found = updated(algorithm, junk=0.25)
    size = found.exact.mean(LENGTHS) if algorithm.kind == "ppo" else TOKENS
    assert found.metrics["dropped"] == 0.25
    assert apart(found.gradients["policy"], found.exact.policy_gradient(), -1 / size) < NEAR


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_grpo_follows_scores_over_the_deviation_of_their_group_and_the_slope_of_the_kl_in_its_loss(estimator):
    found = updated(Grpo(kl=Kl(in_="loss", estimator=estimator, coef=0.5)))
    exact = found.exact
    slope = exact.kl if estimator == "k2" else 1 - np.exp(-exact.kl)
    weights = (grouped(exact.probabilities, exact.rewards)[:, None] - 0.5 * slope) / LENGTHS[:, None]
    assert apart(found.gradients["policy"], exact.weighted_gradient(weights), -1) < NEAR


def test_metrics_are_the_expectations_that_they_are_called():
    found = updated(PPO, junk=0.25)
    exact, near = found.exact, lambda x: pytest.approx(x, rel=0.02, abs=0.005)
    entropy = -(np.exp(exact.log_pi) * exact.log_pi).sum(axis=1)
    assert found.metrics["entropy"] == near(exact.token_mean(entropy[STATE]))
    assert found.metrics["reward"] == near(exact.mean(exact.rewards.reshape(-1)))
    assert found.metrics["kl"] == near(exact.mean(exact.kl.sum(axis=1)))
    assert found.metrics["kl_token"] == near(exact.token_mean(exact.kl))
    assert found.metrics["kl_token_k3"] == near(exact.token_mean(np.exp(-exact.kl) - 1 + exact.kl))
    followed, values = exact.followed(), np.asarray(exact.values(exact.params["value"]))[STATE]
    assert found.metrics["return"] == near(exact.token_mean(followed))
    assert found.metrics["value"] == near(exact.token_mean(values))
    variance = lambda x: exact.token_mean(x**2) - exact.token_mean(x) ** 2
    assert found.metrics["explained_variance"] == near(1 - variance(followed - values) / variance(followed))
    assert found.metrics["loss/value"] == near(0.5 * exact.token_mean((followed - values) ** 2) / 2)
    assert found.metrics["ratio0"] < 1e-5 and found.metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
