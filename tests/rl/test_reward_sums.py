"""Heads, penalties and weighted sums of rewards agree with float64 numpy, and nothing that is not finite is hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reward_functions import reward

from jaxops.core.sums import finalize
from jaxops.rl.rewards.combine import combined, host_scores, reduced, shaped
from jaxops.rl.rewards.config import LengthPenalty, MissingEos, Overlong, RunReward
from jaxops.rl.rewards.host import FunctionScores

SCORES = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_become_one_score(heads):
    scores = SCORES[:, :heads].astype(np.float64)
    spread = scores.std(axis=1, ddof=1) if heads > 1 else np.zeros(6)
    expected = {"mean": scores.mean(1), "min": scores.min(1), "mean_minus_std": scores.mean(1) - 1.5 * spread}
    for name, right in expected.items():
        config = RunReward(run="runs/rm", reduce=name, k=1.5)
        found = jax.jit(lambda scores, config=config: reduced(scores, config))(jnp.asarray(SCORES[:, :heads]))
        np.testing.assert_allclose(found.score, right, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.disagreement, spread, rtol=1e-5, atol=1e-6)


def test_the_penalty_on_long_completions_is_that_of_dapo():
    config = Overlong(longest=20, buffer=8, penalty=0.5)
    tokens = np.arange(1, 30)
    soft = ((20 - 8) - tokens) / 8  # equation 13 between longest - buffer and longest
    expected = 0.5 * np.where(tokens <= 12, 0.0, np.where(tokens <= 20, soft, -1.0))
    found = shaped([config], jnp.asarray(tokens), jnp.zeros(29, bool))["overlong"]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert found.dtype == jnp.float32


def test_length_and_a_missing_end_are_taken_off():
    rewards = [MissingEos(penalty=2.0), LengthPenalty(per_token=0.25), reward("length")]
    found = shaped(rewards, jnp.array([4, 8, 0]), jnp.array([False, True, False]))
    assert found.keys() == {"missing_eos", "length"}
    assert found["missing_eos"].tolist() == [0.0, -2.0, 0.0]
    assert found["length"].tolist() == [-1.0, -2.0, 0.0]
    assert all(one.dtype == jnp.float32 for one in found.values())


REWARDS = [reward("exact", weight=2.0), RunReward(run="runs/rm", weight=0.5, clip=1.0), MissingEos(penalty=1.0)]
GIVEN = {
    "exact": jnp.array([1.0, 0.0, 0.0, 1.0]),
    "rm": jnp.array([0.5, -3.0, 4.0, 2.0]),
    "missing_eos": jnp.array([0.0, -1.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("weight", [None, np.array([1, 1, 0, 1], np.float32)])
def test_the_score_is_the_weighted_sum_within_each_rewards_bounds(weight):
    found = jax.jit(lambda given: combined(given, REWARDS, weight))(GIVEN)
    kept = np.ones(4) if weight is None else weight
    np.testing.assert_allclose(found.score, kept * np.array([2.25, -1.5, 0.5, 2.5]), rtol=1e-6)
    assert found.weight.tolist() == kept.tolist()


def test_a_score_that_is_not_finite_is_seen():
    broken = GIVEN | {"missing_eos": jnp.array([0.0, jnp.nan, jnp.nan, 0.0])}
    found = combined(broken, REWARDS, np.array([1, 1, 0, 1], np.float32))
    assert np.isnan(found.score).tolist() == [False, True, False, False]


def test_scores_of_other_rewards_are_refused():
    with pytest.raises(ValueError, match=r"scores of .* but the rewards are"):
        combined({"exact": GIVEN["exact"]}, REWARDS)


def test_a_sample_that_one_function_drops_has_no_weight():
    scored = [
        FunctionScores({"a": 1.0, "b": 2.0}, {}),
        FunctionScores({"a": None, "b": 3.0}, {}),
        FunctionScores({"a": 0.0, "b": 4.0}, {}),
    ]
    found = host_scores(scored, ["a", "b"])
    assert {name: values.tolist() for name, values in found.scores.items()} == {"a": [1.0, 0, 0], "b": [2.0, 3, 4]}
    assert found.weight.tolist() == [1.0, 0.0, 1.0] and found.weight.dtype == np.float32
    assert finalize(found.sums)["reward_dropped/a"] == pytest.approx(1 / 3)
    rewards = [reward("length", name="a"), reward("length", name="b", weight=10.0)]
    total = combined(found.scores, rewards, found.weight)
    assert total.score.tolist() == [21.0, 0.0, 40.0]
