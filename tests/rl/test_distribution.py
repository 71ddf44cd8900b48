"""Temperature, top-k, top-p and min-p against float64, and draws against the exact probabilities."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.core.failures import UserError
from jaxops.rl.distribution import draw, log_distribution
from jaxops.rl.options import SampleOptions

CASES = [
    SampleOptions(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in itertools.product([0.7, 1.3], [None, 5], [1.0, 0.8], [0.0, 0.1])
] + [
    SampleOptions(top_k=1),
    SampleOptions(top_p=1e-6),
    SampleOptions(top_k=500),
    SampleOptions(temperature=1e-30),
    SampleOptions(top_p=1e-30),
]


def exact(logits, options):
    """Probabilities in float64, by sorting; logits have no ties."""
    logits = np.asarray(logits, np.float64)
    out = np.zeros_like(logits)
    for row, found in zip(out, logits, strict=True):
        p = np.exp((found - found.max()) / options.temperature)
        p /= p.sum()
        order = np.argsort(-p, kind="stable")
        if options.top_k is not None:
            p[order[options.top_k :]] = 0
            p /= p.sum()
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= options.top_p]] = 0
        p /= p.sum()
        p[p < options.min_p * p.max()] = 0
        row[:] = p / p.sum()
    return out


@pytest.mark.parametrize("options", CASES, ids=lambda o: f"t{o.temperature}-k{o.top_k}-p{o.top_p}-m{o.min_p}")
def test_the_distribution_is_that_of_float64_sorting(options):
    logits = 3 * np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    found = np.asarray(jax.jit(lambda x: log_distribution(x, options))(logits))
    expected = exact(logits, options)
    np.testing.assert_array_equal(np.exp(found) == 0, expected == 0)
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-5, atol=1e-7)


def test_without_temperature_all_lies_on_the_first_of_the_largest():
    logits = jnp.asarray([[0.0, 2.0, 2.0, -1e9], [5.0, 1.0, 0.0, -1e9]])
    drawn = draw(logits, SampleOptions(temperature=0), jax.random.split(jax.random.key(0), 2))
    np.testing.assert_array_equal(drawn.token, [1, 0])
    np.testing.assert_array_equal(drawn.logprob, [0, 0])
    np.testing.assert_allclose(drawn.plain, jax.nn.log_softmax(logits)[jnp.arange(2), jnp.asarray([1, 0])], atol=1e-6)


def test_equal_tokens_at_the_border_are_kept_together():
    logits = jnp.log(jnp.asarray([[0.4, 0.2, 0.2, 0.2]]))
    for options in (SampleOptions(top_k=2), SampleOptions(top_p=0.5)):
        np.testing.assert_allclose(jnp.exp(log_distribution(logits, options)), [[0.4, 0.2, 0.2, 0.2]], rtol=1e-6)


def test_padding_of_the_vocabulary_is_never_drawn_however_hot():
    logits = jnp.concatenate([jnp.zeros((64, 3)), jnp.full((64, 125), -1e9)], axis=1)
    options = SampleOptions(temperature=1e12, top_k=100, top_p=0.999999)
    drawn = draw(logits, options, jax.random.split(jax.random.key(1), 64))
    assert set(np.asarray(drawn.token).tolist()) == {0, 1, 2}
    np.testing.assert_allclose(drawn.logprob, -np.log(3), rtol=1e-6)


@pytest.mark.parametrize("options", [SampleOptions(), SampleOptions(temperature=0.7, top_p=0.9, min_p=0.02)])
def test_frequencies_are_the_probabilities(options):
    count = 40_000
    logits = np.random.default_rng(3).standard_normal((1, 12)).astype(np.float32)
    keys = jax.random.split(jax.random.key(7), count)
    drawn = jax.jit(lambda keys: draw(jnp.broadcast_to(logits, (count, 12)), options, keys))(keys)
    expected = exact(logits, options)[0]
    seen = np.bincount(drawn.token, minlength=12)
    assert np.all(seen[expected == 0] == 0)
    there = expected > 0
    chi = np.sum((seen[there] - count * expected[there]) ** 2 / (count * expected[there]))
    assert chi < there.sum() - 1 + 4 * np.sqrt(2 * (there.sum() - 1))
    np.testing.assert_allclose(np.exp(drawn.logprob), expected[drawn.token], rtol=1e-5)
    model = exact(logits, SampleOptions())[0]
    np.testing.assert_allclose(np.exp(drawn.plain), model[drawn.token], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"temperature": -0.1}, "temperature: expected 0 .* got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p: expected a share above 0 and up to 1, got 0.0"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": 1e-50}, "top_p: .*1e-30 is the least"),
        ({"temperature": 1e-39}, "temperature: .* got 1e-39"),
        ({"temperature": 1e300}, "temperature: .*1e\\+30"),
        ({"max_tokens": 10**11}, "max_tokens"),
        ({"top_k": 0}, "top_k: expected 1 or more"),
        ({"min_p": 2.0}, "min_p"),
        ({"max_tokens": 0}, "max_tokens: expected 1 or more"),
        ({"stop": ("a", "")}, "stop: expected texts of a character or more"),
        ({"stop": "end"}, "stop"),
    ],
)
def test_values_out_of_range_are_refused(change, told):
    with pytest.raises(UserError, match=told):
        dataclasses.replace(SampleOptions(), **change).require_valid()


@pytest.mark.parametrize("options", [SampleOptions(temperature=1e-30), SampleOptions(temperature=1e30, top_p=1e-30)])
def test_what_is_drawn_at_the_bounds_is_finite(options):
    options.require_valid()
    logits = 30 * jax.random.normal(jax.random.key(0), (4, 40))
    drawn = draw(logits, options, jax.random.split(jax.random.key(1), 4))
    assert np.isfinite(drawn.logprob).all() and len(set(np.asarray(drawn.token).tolist())) > 1
