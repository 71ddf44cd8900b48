"""Metrics of implicit rewards against numpy by hand."""

import numpy as np
import pytest

from jaxops.evaluate import preferences
from jaxops.evaluate.implicit_rewards import METRICS, measure
from jaxops.evaluate.preferences import Judged

RNG = np.random.default_rng(3)
PAIRS = 40


def given():
    label = RNG.choice([0, 0.2, 0.5, 0.9, 1], PAIRS)
    judged = Judged(
        label,
        RNG.choice([0, 0.5, 1, 2], PAIRS).astype(np.float64),
        np.stack([np.arange(PAIRS) % 9] * 2, axis=1),
        RNG.integers(1, 9, (PAIRS, 2)),
        np.arange(PAIRS) % 2 == 1,
    )
    return (
        judged,
        RNG.normal(-30, 9, (PAIRS, 2)),
        RNG.normal(-30, 9, (PAIRS, 2)),
        RNG.integers(1, 20, (PAIRS, 2)).astype(np.float64),
    )


def test_all_metrics_are_those_by_hand():
    judged, policy, reference, tokens = given()
    losses = RNG.random(PAIRS)
    found = measure(judged, policy, reference, tokens, beta=0.3, losses=losses)
    assert found.keys() == METRICS.keys()
    total = dict.fromkeys(
        ("margin", "reward_c", "reward_r", "logprob_c", "logprob_r", "weight", "tokens", "right"), 0.0
    )
    for at in range(PAIRS):
        if judged.label[at] == 0.5:
            continue
        better, worse = (0, 1) if judged.label[at] > 0.5 else (1, 0)
        reward = 0.3 * (policy[at] - reference[at])
        each = (reward[better] - reward[worse], reward[better], reward[worse], policy[at][better], policy[at][worse])
        for name, value in zip(total, (*each, 1, tokens[at][better], reward[better] > reward[worse]), strict=True):
            total[name] += judged.weight[at] * value
    weight = total["weight"]
    expected = {
        "reward_margin": total["margin"] / weight,
        "reward_chosen": total["reward_c"] / weight,
        "reward_rejected": total["reward_r"] / weight,
        "logprob_chosen": total["logprob_c"] / weight,
        "logprob_rejected": total["logprob_r"] / weight,
        "nll": -total["logprob_c"] / total["tokens"],
        "perplexity": np.exp(-total["logprob_c"] / total["tokens"]),
        "accuracy": total["right"] / weight,
        "loss": (losses * judged.weight).sum() / judged.weight.sum(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]


def test_rewards_are_judged_as_scores_are():
    judged, policy, reference, tokens = given()
    found = measure(judged, policy, reference, tokens, beta=0.1)
    scores = preferences.measure(judged, 0.1 * (policy - reference)[:, :, None])
    assert "loss" not in found
    for name in ("accuracy", "log_loss", "ece", "longer_bias", "first_bias"):
        assert found[name] == scores[name], name


def test_without_a_decided_pair_nothing_is_known_of_better_and_worse():
    judged, policy, reference, tokens = given()
    ties = Judged(np.full(PAIRS, 0.5), judged.weight, judged.clusters, judged.lengths, judged.swapped)
    found = measure(ties, policy, reference, tokens, losses=np.ones(PAIRS))
    assert found["loss"] == 1 and all(np.isnan(found[name]) for name in ("accuracy", "reward_margin", "nll"))
