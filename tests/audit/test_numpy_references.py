"""The references in numpy agree with what is shipped, on the same numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.audit import reference
from jaxops.objectives.ranking import softmax_cross_entropy
from jaxops.rl.advantages import generalised_advantages

DRAW = np.random.default_rng(3)


def test_cross_entropies():
    logits, targets = DRAW.normal(size=(5, 7)).astype(np.float32), DRAW.integers(0, 7, 5).astype(np.int32)
    ours = softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(ours, reference.cross_entropy(logits, targets), rtol=1e-5)
    np.testing.assert_allclose(np.exp(reference.log_softmax(logits)).sum(-1), 1)
    both = np.stack([np.zeros(5), logits[:, 0]], axis=-1)
    for label in (0, 1):
        binary = reference.binary_cross_entropy(logits[:, 0], np.full(5, label))
        np.testing.assert_allclose(binary, reference.cross_entropy(both, np.full(5, label)))
    np.testing.assert_allclose(
        reference.bradley_terry(logits[:, 0], logits[:, 1]),
        reference.binary_cross_entropy(logits[:, 0] - logits[:, 1], np.ones(5)),
        rtol=1e-5,
    )


def test_extreme_logits_do_not_overflow():
    assert reference.cross_entropy(np.array([[1e4, -1e4]]), np.array([0]))[0] == 0
    assert reference.binary_cross_entropy(np.array([-800.0]), np.array([1.0]))[0] == 800


def test_advantages():
    rewards, values = DRAW.normal(size=(2, 6)).astype(np.float32)
    ours = generalised_advantages(
        jnp.asarray(rewards)[None], jnp.asarray(values)[None], jnp.ones((1, 6)), gamma=0.9, lam=0.8
    )
    np.testing.assert_allclose(
        np.asarray(ours[0])[0], reference.generalised_advantages(rewards, values, 0.9, 0.8), rtol=2e-5, atol=1e-6
    )


def test_metrics_of_ranking():
    scores = DRAW.normal(size=(50, 20))
    target = DRAW.integers(0, 20, 50)
    ranks = reference.ranks(scores, target)
    order = np.argsort(-scores, axis=1)
    assert all(order[row, rank] == target[row] for row, rank in enumerate(ranks))
    assert reference.hit_rate(ranks, 20) == 1 and reference.hit_rate(ranks, 0) == 0
    assert reference.ndcg(np.zeros(3, int), 1) == 1
    assert reference.ranks(np.zeros((1, 4)), np.array([0])).tolist() == [3]  # a constant score finds nothing


def test_auc_is_that_of_ranks():
    scores, labels = np.round(DRAW.normal(size=60), 1), DRAW.integers(0, 2, 60)
    from scipy.stats import rankdata

    ranks, positives = rankdata(scores), labels.sum()
    expected = (ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * (60 - positives))
    assert reference.auc(scores, labels) == pytest.approx(expected)
