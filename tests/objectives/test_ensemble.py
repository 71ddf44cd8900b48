"""The objective of several heads is the plain one for a single head, and a weighted mean over heads for more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_language import Pairs, ToyHeads

from jaxops.core.sums import finalize
from jaxops.objectives.ensemble import bootstrap_weights, each_head
from jaxops.objectives.preference import BradleyTerry, scores_of

BATCH = {name: jnp.asarray(value) for name, value in Pairs().batch(0, 16).items()}
CONFIG = BradleyTerry(center=0.1)


@pytest.mark.parametrize("key", [None, jax.random.key(3)])
def test_one_head_is_the_plain_objective(key):
    model = ToyHeads()
    params = model.init(jax.random.key(0))
    plain, one = (objective(params, BATCH, key) for objective in (CONFIG.build(model), each_head(model, CONFIG.build)))
    assert plain.keys() == one.keys()
    for name in plain:
        np.testing.assert_allclose(one[name].total, plain[name].total, rtol=1e-6)
        np.testing.assert_allclose(one[name].count, plain[name].count, rtol=1e-6)


def test_the_loss_of_heads_is_their_weighted_mean_in_float64():
    model = ToyHeads(ensemble=3)
    params = model.init(jax.random.key(0))
    found = finalize(each_head(model, BradleyTerry().build)(params, BATCH, None))
    scores = np.asarray(scores_of(model, params, BATCH, None), np.float64)
    weights = np.asarray(bootstrap_weights(BATCH["id"], 3), np.float64) * np.asarray(BATCH["weight"])[:, None]
    label, margin = (np.asarray(BATCH[name], np.float64) for name in ("label", "margin"))
    total = 0.0
    for head in range(3):
        difference = (scores[:, 0] - scores[:, 1]) * (1 + head)
        loss = label * np.logaddexp(0, margin - difference) + (1 - label) * np.logaddexp(0, margin + difference)
        total += (loss * weights[:, head]).sum()
    assert found["loss/preference"] == pytest.approx(total / weights.sum(), rel=1e-5)


def test_an_example_keeps_its_weights_wherever_it_stands():
    ids = jnp.arange(4096, dtype=jnp.int32)
    weights = np.asarray(bootstrap_weights(ids, 4))
    np.testing.assert_array_equal(bootstrap_weights(ids[::-1], 4)[::-1], weights)
    np.testing.assert_array_equal(bootstrap_weights(ids[100:101], 4)[0], weights[100])
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.06)
    assert np.abs(np.corrcoef(weights.T) - np.eye(4)).max() < 0.06
