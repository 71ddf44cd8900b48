"""Pooling of looked-up rows against numpy float64: bags with holes, with weights, empty ones and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.models.inputs import Input, gathered, pooled

BATCH, WIDTH, DIM = 6, 4, 3


def case(seed=0, weighted=False):
    """A bag with holes anywhere; example 0 has nothing in it, example 1 has everything."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, 9, (BATCH, WIDTH)).astype(np.int32)
    ids[0], ids[1] = -1, [3, 1, 0, 8]
    rows = rng.normal(size=(BATCH, WIDTH, DIM)).astype(np.float32)
    batch = {"bag": ids, "rows": {"bag": rows * (ids >= 0)[..., None]}}
    if weighted:
        batch["bag/weight"] = rng.uniform(0.1, 2, (BATCH, WIDTH)).astype(np.float32)
    return jax.tree.map(jnp.asarray, batch)


def oracle(batch, pool):
    """One example and one place at a time."""
    ids, rows = np.asarray(batch["bag"]), np.asarray(batch["rows"]["bag"], np.float64)
    weight = np.asarray(batch.get("bag/weight", np.ones(ids.shape)), np.float64)
    out = np.zeros((len(ids), DIM))
    for example in range(len(ids)):
        there = [place for place in range(WIDTH) if ids[example, place] >= 0]
        for place in there:
            out[example] += weight[example, place] * rows[example, place]
        if pool == "mean" and there:
            out[example] /= sum(weight[example, place] for place in there)
    return out


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_a_bag_is_numpys(pool, weighted):
    batch = case(weighted=weighted)
    found = jax.jit(lambda batch: pooled(batch, Input(name="bag", dim=DIM, bag=True, pool=pool)))(batch)
    np.testing.assert_allclose(found, oracle(batch, pool), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[0], 0)


def test_what_is_not_there_counts_for_nothing_whatever_its_weight():
    feature, batch = Input(name="bag", dim=DIM, bag=True), case(weighted=True)
    wild = {**batch, "bag/weight": jnp.where(batch["bag"] >= 0, batch["bag/weight"], 1e6)}
    np.testing.assert_array_equal(pooled(batch, feature), pooled(wild, feature))


def test_row_zero_is_a_row_like_others():
    """Row 0 is the unknown id, which has an embedding; -1 alone is nothing."""
    rows = jnp.asarray([[[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]])
    batch = {"bag": jnp.asarray([[0, -1]], jnp.int32), "rows": {"bag": rows}}
    np.testing.assert_array_equal(pooled(batch, Input(name="bag", dim=DIM, bag=True)), [[1.0, 2.0, 3.0]])


def test_one_id_is_its_row():
    rows = jnp.arange(12.0).reshape(4, 3)
    batch = {"user": jnp.arange(4, dtype=jnp.int32), "rows": {"user": rows}}
    np.testing.assert_array_equal(pooled(batch, Input(name="user", dim=3)), rows)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_gradients_are_finite_and_stop_at_what_is_not_there(pool, weighted):
    batch, feature = case(weighted=weighted), Input(name="bag", dim=DIM, bag=True, pool=pool)
    loss = lambda rows: jnp.sum(jnp.square(pooled({**batch, "rows": {"bag": rows}}, feature) - 1))
    grads = np.asarray(jax.jit(jax.grad(loss))(batch["rows"]["bag"]))
    there = np.asarray(batch["bag"]) >= 0
    assert np.all(np.isfinite(grads))
    np.testing.assert_array_equal(grads[~there], 0)
    assert np.all(np.any(grads[there] != 0, axis=-1))


def test_weights_that_are_all_zero_are_an_empty_bag():
    batch = {**case(), "bag/weight": jnp.zeros((BATCH, WIDTH))}
    feature = Input(name="bag", dim=DIM, bag=True)
    np.testing.assert_array_equal(pooled(batch, feature), np.zeros((BATCH, DIM)))
    grads = jax.grad(lambda rows: jnp.sum(pooled({**batch, "rows": {"bag": rows}}, feature)))(batch["rows"]["bag"])
    assert np.all(np.isfinite(grads))


def test_side_by_side_in_order():
    batch = case() | {"numeric": jnp.ones((BATCH, 2)), "user": jnp.arange(BATCH, dtype=jnp.int32)}
    batch["rows"]["user"] = jnp.full((BATCH, 5), 7.0)
    features = [Input(name="user", dim=5), Input(name="bag", dim=DIM, bag=True)]
    found = gathered(batch, features, 2, jnp.float32)
    expected = np.concatenate([np.ones((BATCH, 2)), np.full((BATCH, 5), 7.0), oracle(batch, "mean")], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    del batch["numeric"]
    assert gathered(batch, features, 0, jnp.float32).shape == (BATCH, 5 + DIM)


def test_half_precision_runs_under_strict_promotion():
    batch = case(weighted=True)
    half = {**batch, "rows": {"bag": batch["rows"]["bag"].astype(jnp.bfloat16)}}
    found = pooled(half, Input(name="bag", dim=DIM, bag=True))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), oracle(batch, "mean"), atol=0.05)
    assert gathered(half, [Input(name="bag", dim=DIM, bag=True)], 0, jnp.float32).dtype == jnp.float32
