"""Losses of reward models against numpy in float64 and against what TRL and OpenRLHF compute."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_language import Pairs, ToyReward

from jaxops.core.sums import finalize
from jaxops.objectives.preference import (
    BestOfK,
    BradleyTerry,
    TextScorer,
    agreement,
    best_of_k,
    bradley_terry,
    centering,
    rao_kupper,
    scores_of,
    smoothed,
)

PEERS = json.loads((pathlib.Path(__file__).parents[1] / "fixtures/preference/peers.json").read_text())
RNG = np.random.default_rng(0)
DIFFERENCE = RNG.normal(0, 3, 64)
LABEL = RNG.choice([0, 0.2, 0.5, 1], 64)
MARGIN = RNG.random(64)


def array(x):
    return jnp.asarray(np.asarray(x), jnp.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_bradley_terry_is_numpys():
    loss = -LABEL * np.log(sigmoid(DIFFERENCE - MARGIN)) - (1 - LABEL) * np.log(sigmoid(-DIFFERENCE - MARGIN))
    found = bradley_terry(array(DIFFERENCE), array(LABEL), array(MARGIN))
    np.testing.assert_allclose(found, loss, rtol=2e-6)
    plain = bradley_terry(array(DIFFERENCE))
    np.testing.assert_allclose(plain, -np.log(sigmoid(DIFFERENCE)), rtol=2e-6)
    turned = bradley_terry(array(-DIFFERENCE), array(1 - LABEL), array(MARGIN))
    np.testing.assert_allclose(turned, found, rtol=1e-6)


def test_bradley_terry_is_stable_and_a_tie_pulls_scores_together():
    far = jnp.asarray([1e4, -1e4])
    np.testing.assert_array_equal(bradley_terry(far), [0, 1e4])
    slope = jax.grad(lambda x: jnp.sum(bradley_terry(x, jnp.full(2, 0.5))))
    np.testing.assert_array_equal(slope(far), [0.5, -0.5])
    assert float(slope(jnp.zeros(2))[0]) == 0


def test_rewards_are_those_of_peers():
    scores, margin = array(PEERS["scores"]), array(PEERS["margin"])
    pairs = bradley_terry(scores[:, 0] - scores[:, 1], margin=margin)
    np.testing.assert_allclose(pairs, PEERS["openrlhf_reward"], rtol=1e-6)
    np.testing.assert_allclose(pairs + PEERS["center"] * centering(scores), PEERS["trl_reward"], rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.2, 1.5])
def test_rao_kupper_is_a_distribution_over_win_tie_and_defeat(threshold):
    outcome = lambda p: np.exp(-np.asarray(rao_kupper(array(DIFFERENCE), jnp.full(64, p), threshold), np.float64))
    win, tie, defeat = outcome(1.0), outcome(0.5), outcome(0.0)
    np.testing.assert_allclose(win + tie + defeat, 1, rtol=1e-5)
    np.testing.assert_allclose(win, sigmoid(DIFFERENCE - threshold), rtol=1e-5)
    rest = 1 - sigmoid(DIFFERENCE - threshold) - sigmoid(-DIFFERENCE - threshold)
    np.testing.assert_allclose(tie, rest, rtol=1e-5)
    soft = rao_kupper(array(DIFFERENCE), jnp.full(64, 0.2), threshold, array(MARGIN))
    need = threshold + MARGIN
    mixed = -0.2 * np.log(sigmoid(DIFFERENCE - need)) - 0.8 * np.log(sigmoid(-DIFFERENCE - need))
    np.testing.assert_allclose(soft, mixed, rtol=1e-5)
    assert np.isfinite(rao_kupper(jnp.asarray([1e4, -1e4]), jnp.full(2, 0.5), threshold)).all()
    with pytest.raises(ValueError, match="threshold must be positive"):
        rao_kupper(array(DIFFERENCE), array(LABEL), 0.0)


def test_best_of_k_is_numpys_and_padding_candidates_take_no_part():
    scores, best = RNG.normal(0, 2, (16, 4)), RNG.integers(0, 3, 16)
    valid = np.arange(4) < RNG.integers(3, 5, 16)[:, None]
    share = np.where(valid, np.exp(scores), 0)
    expected = -np.log(share[np.arange(16), best] / share.sum(1))
    found = best_of_k(array(scores), jnp.asarray(best), jnp.asarray(valid))
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-6)
    pair = best_of_k(array(scores[:, :2]), jnp.zeros(16, jnp.int32))
    np.testing.assert_allclose(pair, bradley_terry(array(scores[:, 0] - scores[:, 1])), rtol=2e-6, atol=1e-7)
    run = lambda scores, best, valid: best_of_k(scores, jnp.asarray([best]), jnp.asarray([valid]))[0]
    assert np.isnan(run(jnp.zeros((1, 2)), 1, [True, False])) and np.isnan(run(jnp.zeros((1, 2)), -1, [True, True]))
    nothing = jax.grad(lambda s: jnp.where(False, run(s, 0, [False, False]), 0.0))(jnp.zeros((1, 2)))
    np.testing.assert_array_equal(nothing, 0)


def test_small_parts():
    np.testing.assert_allclose(centering(jnp.asarray([[1.0, 2.0], [3.0, -3.0]])), [9, 0])
    for share in np.linspace(0, 0.49, 50):
        assert float(smoothed(jnp.float32(0.5), float(share))) == 0.5
    np.testing.assert_allclose(smoothed(jnp.asarray([1.0, 0.0, 0.9]), 0.1), [0.9, 0.1, 0.82], rtol=1e-6)
    signs = agreement(jnp.asarray([2.0, -2.0, 0.0, 2.0]), jnp.asarray([1.0, 1.0, 1.0, 0.1]))
    np.testing.assert_array_equal(signs, [1, 0, 0.5, 0])


def given(k=2, **changes):
    model = ToyReward()
    assert isinstance(model, TextScorer)
    batch = jax.tree.map(jnp.asarray, Pairs(k=k).batch(0, 16)) | changes
    params = model.init(jax.random.key(0))
    return model, params, batch, np.asarray(scores_of(model, params, batch, None), np.float64)


@pytest.mark.parametrize("tie", [None, 0.7])
def test_the_objective_of_pairs_is_numpys(tie):
    model, params, batch, scores = given()
    config = BradleyTerry(tie=tie, label_smoothing=0.1, center=0.5)
    found = jax.jit(config.build(model))(params, batch, None)
    weight, label = (np.asarray(batch[name], np.float64) for name in ("weight", "label"))
    difference, margin = scores[:, 0] - scores[:, 1], np.asarray(batch["margin"], np.float64)
    noisy, need = label * 0.8 + 0.1, margin + (tie or 0)
    loss = -noisy * np.log(sigmoid(difference - need)) - (1 - noisy) * np.log(sigmoid(-difference - need))
    if tie:
        rest = 1 - sigmoid(difference - tie) - sigmoid(-difference - tie)
        loss = np.where(np.asarray(batch["label"]) == 0.5, -np.log(rest), loss)
    not_tied = weight * (label != 0.5)
    expected = {
        "loss/preference": (loss, weight),
        "loss/center": (0.5 * scores.sum(1) ** 2, weight),
        "accuracy": ((difference > 0) == (label > 0.5), not_tied),
        "score_margin": (difference * np.sign(label - 0.5), not_tied),
        "score": (scores.mean(1), weight),
    }
    assert set(found) == set(expected) and 0 < not_tied.sum() < weight.sum()
    for name, (each, w) in expected.items():
        np.testing.assert_allclose(found[name].total, (each * w).sum(), rtol=1e-5, atol=1e-5, err_msg=name)
        assert float(found[name].count) == w.sum()


def test_without_labels_or_margins_the_first_is_better():
    model, params, batch, scores = given()
    bare = {name: x for name, x in batch.items() if name not in ("label", "margin")}
    found = finalize(BradleyTerry().build(model)(params, bare, None))
    weight = np.asarray(batch["weight"], np.float64)
    difference = scores[:, 0] - scores[:, 1]
    expected = (-np.log(sigmoid(difference)) * weight).sum() / weight.sum()
    assert found["loss/preference"] == pytest.approx(expected, rel=1e-5)
    assert found["accuracy"] == pytest.approx((weight * (difference > 0)).sum() / weight.sum())


def test_the_objective_of_best_of_k_is_numpys():
    model, params, batch, scores = given(k=4)
    valid = np.arange(4) < RNG.integers(1, 5, 16)[:, None]
    best = np.minimum(np.asarray(batch["best"]), valid.sum(1) - 1).astype(np.int32)
    batch |= {"valid": jnp.asarray(valid), "best": jnp.asarray(best)}
    found = jax.jit(BestOfK(center=0.5).build(model))(params, batch, None)
    weight, share = np.asarray(batch["weight"], np.float64), np.where(valid, np.exp(scores), 0)
    mean = np.where(valid, scores, 0).sum(1) / valid.sum(1)
    expected = {
        "loss/preference": -np.log(share[np.arange(16), best] / share.sum(1)),
        "loss/center": 0.5 * (2 * mean) ** 2,
        "top1": share.argmax(1) == best,
        "score": mean,
    }
    assert set(found) == set(expected)
    for name, each in expected.items():
        np.testing.assert_allclose(found[name].total, (each * weight).sum(), rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_two_sides_of_a_pair_draw_independently():
    model, params, batch, _ = given()
    same = batch | {name: jnp.repeat(batch[name][:, :1], 2, axis=1) for name in ("tokens", "segment", "position")}
    drawn = np.asarray(scores_of(model, params, same, jax.random.key(1)))
    assert np.all(drawn[:, 0] != drawn[:, 1])
    calm = np.asarray(scores_of(model, params, same, None))
    np.testing.assert_array_equal(calm[:, 0], calm[:, 1])
