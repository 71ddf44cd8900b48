"""Draws belong to (step, example, site) and to nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.core.random import dropout, example_keys

pytestmark = pytest.mark.latest

KEY = jax.random.key(3)
IDS = jnp.asarray([5, 0, 7, 123456, 2])


def draw(ids=IDS, key=KEY, site=0, rate=0.25, x=None):
    x = jnp.ones((len(ids), 6, 50)) if x is None else x
    return np.asarray(dropout(x, rate, example_keys(key, ids), site))


def test_an_example_keeps_its_draw_wherever_it_is():
    whole = draw()
    order = np.asarray([3, 1, 4, 0, 2])
    np.testing.assert_array_equal(draw(IDS[order]), whole[order])
    np.testing.assert_array_equal(draw(IDS[1:3]), whole[1:3])


def test_examples_sites_and_steps_draw_apart():
    whole = draw()
    assert not any(np.array_equal(whole[0], whole[i]) for i in range(1, 5))
    assert not np.array_equal(whole, draw(site=1))
    assert not np.array_equal(whole, draw(key=jax.random.fold_in(KEY, 1)))


def test_evaluation_draws_nothing():
    x = jnp.ones((5, 2))
    assert example_keys(None, IDS) is None
    assert dropout(x, 0.5, None, 0) is x
    assert dropout(x, 0.0, example_keys(KEY, IDS), 0) is x


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_scale(rate):
    x = jnp.ones((50, 2000))
    found = np.asarray(dropout(x, rate, example_keys(KEY, jnp.arange(50)), 4))
    kept = found != 0
    deviation = np.sqrt(rate * (1 - rate) / x.size)
    assert abs((1 - kept.mean()) - rate) < 5 * deviation
    exact = 1 / (1 - round(rate * 2**16) / 2**16)
    np.testing.assert_allclose(found[kept], exact, rtol=1e-6)
    assert abs(found.mean() - 1) < 5 * deviation / (1 - rate)


def test_no_correlation_along_an_example_or_between_neighbours():
    kept = (np.asarray(dropout(jnp.ones((64, 4096)), 0.5, example_keys(KEY, jnp.arange(64)), 0)) > 0) * 2.0 - 1
    for lagged in (kept[:, 1:] * kept[:, :-1], kept[1:] * kept[:-1]):
        assert abs(lagged.mean()) < 5 / np.sqrt(lagged.size)


def test_dropout_hides_what_is_not_finite_and_keeps_the_dtype():
    x = jnp.full((5, 40), jnp.inf, jnp.bfloat16)
    found = dropout(x, 0.5, example_keys(KEY, IDS), 0)
    assert found.dtype == jnp.bfloat16
    assert set(np.unique(np.asarray(found, np.float32))) == {0.0, np.inf}


def test_gradient_is_the_same_mask():
    x = jnp.ones((5, 6, 50))
    grad = jax.grad(lambda x: jnp.sum(dropout(x, 0.25, example_keys(KEY, IDS), 0)))(x)
    np.testing.assert_array_equal(grad, draw())
