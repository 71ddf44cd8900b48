"""Metrics of scores against judgements: each against a plain loop, and the interval against what it promises."""

import math

import numpy as np
import pytest

from jaxops.evaluate.preferences import METRICS, Judged, disagreement, interval, measure, reliability, wilson

RNG = np.random.default_rng(0)
N = 400
DIFFERENCE = RNG.normal(0, 1.5, N)
HEADS = np.stack([np.stack([DIFFERENCE + RNG.normal(0, 0.3, N), np.zeros(N)], axis=1) for _ in range(3)], axis=2)
SCORES = HEADS.mean(axis=2)
JUDGED = Judged(
    label=RNG.choice([0, 0.5, 1, 0.8], N),
    weight=RNG.choice([0.0, 1, 2], N),
    clusters=RNG.integers(0, 60, (N, 2)),
    lengths=RNG.integers(1, 9, (N, 2)),
    swapped=RNG.random(N) < 0.5,
    annotators=tuple(RNG.choice(["ann", "bob", None], N)),
)


def test_all_metrics_are_those_of_a_plain_loop():
    found = measure(JUDGED, HEADS)
    assert {name.partition("[")[0] for name in found} == set(METRICS)
    right = counted = loss = weight_of_all = 0.0
    longer = {"model": 0.0, "people": 0.0, "weight": 0.0}
    first = {"model": 0.0, "people": 0.0}
    ann = [0.0, 0.0]
    for at in range(N):
        difference = SCORES[at, 0] - SCORES[at, 1]
        label, weight = JUDGED.label[at], JUDGED.weight[at]
        p = 1 / (1 + math.exp(-difference))
        loss -= weight * (label * math.log(p) + (1 - label) * math.log(1 - p))
        weight_of_all += weight
        if label == 0.5:
            continue
        good = weight * ((difference > 0) == (label > 0.5))
        right, counted = right + good, counted + weight
        if JUDGED.annotators[at] == "ann":
            ann = [ann[0] + good, ann[1] + weight]
        a, b = JUDGED.lengths[at]
        if a != b:
            longer["weight"] += weight
            longer["model"] += weight * ((difference > 0) == (a > b))
            longer["people"] += weight * ((label > 0.5) == (a > b))
        shown_first = not JUDGED.swapped[at]
        first["model"] += weight * ((difference > 0) == shown_first)
        first["people"] += weight * ((label > 0.5) == shown_first)
    assert found["accuracy"] == pytest.approx(right / counted)
    assert found["accuracy[ann]"] == pytest.approx(ann[0] / ann[1])
    assert found["log_loss"] == pytest.approx(loss / weight_of_all)
    assert found["longer_bias"] == pytest.approx((longer["model"] - longer["people"]) / longer["weight"])
    assert found["first_bias"] == pytest.approx((first["model"] - first["people"]) / counted)
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]


def test_a_model_that_always_takes_the_first_that_is_shown_has_that_bias():
    shown = np.where(JUDGED.swapped, -1.0, 1.0)
    heads = np.stack([shown, np.zeros(N)], axis=1)[:, :, None]
    label = np.where(JUDGED.swapped, 1.0, 0.0)  # people always take the second
    even = Judged(label, np.ones(N), JUDGED.clusters, JUDGED.lengths, JUDGED.swapped)
    assert measure(even, heads)["first_bias"] == 1.0


def test_calibration_is_over_both_orders_and_of_true_probabilities_small():
    rng = np.random.default_rng(1)
    difference = rng.normal(0, 2, 200_000)
    p = 1 / (1 + np.exp(-difference))
    label = (rng.random(len(p)) < p).astype(float)
    bins = reliability(difference, label, np.ones(len(p)))
    np.testing.assert_allclose(bins[0], bins[1], atol=0.015)
    np.testing.assert_allclose(bins[0] + bins[0][::-1], 1, atol=1e-9)  # either order is the other's complement
    turned = reliability(-difference, 1 - label, np.ones(len(p)))
    np.testing.assert_allclose(turned, bins, atol=1e-9)
    # chosen first in every row: a constant probability of 0.9 is right where 0.9 of the votes are such
    label = np.repeat([1.0, 0.0], [900, 100])
    heads = np.full((1000, 2, 1), 0.0)
    heads[:, 0] = math.log(9)
    plain = Judged(label, np.ones(1000), np.zeros((1000, 2), int), np.ones((1000, 2), int), np.zeros(1000, bool))
    assert measure(plain, heads)["ece"] == pytest.approx(0, abs=1e-9)


def test_the_interval_covers_the_truth_where_pairs_share_their_texts():
    """Texts have an effect of their own on how hard their pairs are; 95 % of the intervals must hold the mean."""
    hits, width = 0, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        texts = rng.normal(0, 1, 40)
        sides = rng.integers(0, 40, (200, 2))
        right = (rng.random(200) < 1 / (1 + np.exp(-0.8 - texts[sides].sum(axis=1)))).astype(float)
        low, high = interval(right, np.ones(200), sides)
        grid = np.random.default_rng(999).normal(0, 2**0.5, 20_000)
        hits += low <= (1 / (1 + np.exp(-0.8 - grid))).mean() <= high
        width.append(high - low)
    assert hits >= 54
    alone = interval(right, np.ones(200), np.repeat(np.arange(200)[:, None], 2, axis=1))
    assert alone[1] - alone[0] < np.mean(width)  # independent pairs tell more
    assert interval(right, np.ones(200), sides) == (low, high)


def test_heads_disagree_by_their_deviation():
    differences = HEADS[:, 0] - HEADS[:, 1]
    wanted = np.sqrt(np.mean([np.var(row, ddof=1) for row in differences])) / np.sqrt(np.mean(differences.mean(1) ** 2))
    assert disagreement(HEADS) == pytest.approx(wanted)
    assert math.isnan(disagreement(HEADS[:, :, :1]))


def test_without_decided_pairs_there_is_no_accuracy():
    ties = Judged(np.full(4, 0.5), np.ones(4), np.zeros((4, 2), int), np.ones((4, 2), int), np.zeros(4, bool))
    found = measure(ties, np.zeros((4, 2, 1)))
    assert all(math.isnan(found[name]) for name in ("accuracy", "accuracy_low", "longer_bias"))
    assert found["log_loss"] == pytest.approx(math.log(2))


def test_few_pairs_that_are_all_right_prove_little():
    """Four of four: Wilson's interval is known, and pairs of one prompt are worth one."""
    apart = np.repeat(np.arange(4)[:, None], 2, axis=1)
    low, high = interval(np.ones(4), np.ones(4), apart)
    assert (low, high) == pytest.approx((4 / (4 + 1.959964**2), 1))
    assert interval(np.ones(4), np.ones(4), apart * 0)[0] == pytest.approx(1 / (1 + 1.959964**2))
    low, high = wilson(0.5, 100.0)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
