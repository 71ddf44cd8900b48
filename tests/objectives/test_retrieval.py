"""In-batch softmax against numpy float64; the sign of the correction; frequencies against plain counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.objectives.retrieval import (
    count_items,
    in_batch_cross_entropy,
    in_batch_softmax,
    log_frequency,
    no_frequencies,
)


def oracle(scores, item, log_q, weight):
    out = []
    for row in range(len(item)):
        kept = [c for c in range(len(item)) if c == row or (item[c] != item[row] and weight[c] > 0)]
        corrected = np.asarray(scores[row], np.float64) - log_q
        out.append(np.log(np.sum(np.exp(corrected[kept]))) - corrected[row])
    return np.array(out)


def test_against_numpy():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((3, 16, 16)).astype(np.float32)
    item = rng.integers(0, 9, (3, 16)).astype(np.int32)
    log_q = np.log(rng.uniform(0.01, 0.5, (3, 16))).astype(np.float32)
    weight = (rng.random((3, 16)) < 0.8).astype(np.float32)
    found = in_batch_cross_entropy(*map(jnp.asarray, (scores, item, log_q, weight)))
    for block in range(3):
        wanted = oracle(scores[block], item[block], log_q[block], weight[block])
        np.testing.assert_allclose(found[block], wanted, rtol=1e-5)


@pytest.mark.parametrize("sign, recovered", [(1, True), (0, False), (-1, False)])
def test_the_correction_has_the_sign_that_recovers_what_users_choose(sign, recovered):
    """Items 8:1 in popularity, the choice known: corrected, its gradient at the true log-probabilities vanishes."""
    rng = np.random.default_rng(1)
    choice = np.array([[0.7, 0.1, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1]])
    count = 4096
    user = rng.integers(0, 2, count)
    item = np.array([rng.choice(4, p=choice[u]) for u in user]).astype(np.int32)
    share = np.bincount(item) / count
    log_q = jnp.asarray(sign * np.log(share)[item], jnp.float32)

    def loss(table):
        scores = table[user][:, item]
        # every pair counts here: with four items nearly all of a block would be accidental hits
        each = in_batch_cross_entropy(scores, jnp.arange(count, dtype=jnp.int32), log_q)
        return jnp.mean(each)

    grads = jax.jit(jax.grad(loss))(jnp.asarray(np.log(choice), jnp.float32))
    assert (float(jnp.max(jnp.abs(grads))) < 0.01) == recovered


def test_the_objective_couples_blocks_only():
    class Model:
        def users(self, params, batch, key):
            return params["u"][batch["user"]]

        def items(self, params, batch, key):
            return params["i"][batch["item"]]

    rng = np.random.default_rng(2)
    params = {"u": jnp.asarray(rng.standard_normal((5, 3)), jnp.float32), "i": jnp.ones((7, 3))}
    batch = {
        "user": rng.integers(0, 5, 16).astype(np.int32),
        "item": rng.integers(0, 7, 16).astype(np.int32),
        "weight": np.ones(16, np.float32),
        "log_q": np.zeros(16, np.float32),
    }
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    objective = in_batch_softmax(Model(), 4, temperature=0.5)
    whole = objective(params, batch, None)["loss/in_batch_softmax"]
    parts = [
        objective(params, {k: v[at : at + 4] for k, v in batch.items()}, None)["loss/in_batch_softmax"]
        for at in range(0, 16, 4)
    ]
    assert float(whole.total) == pytest.approx(sum(float(part.total) for part in parts), rel=1e-6)
    assert float(whole.count) == 16
    with pytest.raises(ValueError, match="block must be at least 2"):
        in_batch_softmax(Model(), 1)


def test_frequencies_count_every_appearance_and_fade():
    rng = np.random.default_rng(3)
    seen, counts, decay = no_frequencies(6), np.zeros(6), 0.9
    step = jax.jit(count_items, static_argnums=2)
    for _ in range(40):
        item = rng.choice(6, 32, p=[0.5, 0.3, 0.1, 0.06, 0.04, 0.0]).astype(np.int32)
        seen = step(seen, jnp.asarray(item), decay)
        counts = counts * decay + np.bincount(item, minlength=6)
    found = log_frequency(seen, jnp.arange(6, dtype=jnp.int32), decay)
    np.testing.assert_allclose(found[:5], np.log(counts[:5] / counts.sum()), rtol=1e-4)
    assert np.isfinite(found[5]) and found[5] < found[4]
