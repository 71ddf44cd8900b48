"""Policy losses against loops in float64, over masks of every form; gradients stay finite, whatever is masked."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_completions import BATCH, arrays, close, masks, sharded, wider

from jaxops.objectives.policy import aggregated, clipped_surrogate, clipped_value_loss, kl_estimate

examples = functools.partial(hypothesis.settings, max_examples=12, derandomize=True)
SEEDS = st.integers(0, 2**31)
OVER = ["tokens", "completions", "constant"]


def given(seed):
    """Made-up completions whose ratios pass every bound."""
    rng = np.random.default_rng(seed)
    found = arrays(rng, "old", "advantages", "values", "old_values", "returns")
    found["old"] -= 2
    far = rng.choice([0, 0, 0, 2.5, -2.5], found["old"].shape)
    moved = rng.normal(0, 0.3, found["old"].shape) + far
    return {**found, "logprobs": (found["old"] + moved).astype(np.float32), "mask": masks(rng)}


def surrogate_loop(x, low, high, dual):
    loss, clipped, ratios = np.zeros(x["mask"].shape), np.zeros(x["mask"].shape, bool), np.ones(x["mask"].shape)
    for at in np.ndindex(loss.shape):
        advantage = float(x["advantages"][at])
        ratio = math.exp(float(x["logprobs"][at]) - float(x["old"][at])) if x["mask"][at] else 1.0
        bounded = min(max(ratio, 1 - low), 1 + high)
        objective = min(advantage * ratio, advantage * bounded)
        held = advantage * bounded < advantage * ratio
        if dual is not None and advantage < 0 and objective < dual * advantage:
            objective, held = dual * advantage, True
        loss[at], clipped[at], ratios[at] = -objective, held, ratio
    return loss, clipped, ratios


@functools.partial(jax.jit, static_argnames=("low", "high", "dual"))
def surrogate(x, **options):
    names = ("logprobs", "old", "advantages", "mask")
    return clipped_surrogate(*(x[name] for name in names), **options)


@hypothesis.given(seed=SEEDS)
@examples()
@pytest.mark.parametrize("dual", [None, 3.0])
def test_the_clipped_surrogate(dual, seed):
    x = given(seed)
    found = surrogate(x, low=0.2, high=0.3, dual=dual)
    loss, clipped, ratio = surrogate_loop(x, 0.2, 0.3, dual)
    close(found.loss, loss)
    close(found.ratio, ratio)
    np.testing.assert_array_equal(found.clipped, clipped)


@pytest.mark.parametrize("dual", [None, 3.0])
def test_a_token_has_no_gradient_exactly_where_it_is_clipped_or_masked(dual):
    x = given(1)
    total = lambda logprobs: jnp.sum(surrogate({**x, "logprobs": logprobs}, low=0.2, high=0.2, dual=dual).loss)
    grads = np.asarray(jax.grad(total)(jnp.asarray(x["logprobs"])))
    _, clipped, ratio = surrogate_loop(x, 0.2, 0.2, dual)
    assert clipped.sum() > 5
    np.testing.assert_array_equal(grads == 0, clipped | (x["mask"] == 0))
    close(grads, np.where(clipped | (x["mask"] == 0), 0, -x["advantages"] * ratio))


def test_no_gradient_flows_through_advantages_or_the_old_logprobs():
    x = {name: jnp.asarray(value) for name, value in given(2).items()}
    grads = jax.grad(lambda x: jnp.sum(surrogate(x, low=0.2, high=0.2, dual=None).loss))(x)
    for name in ("advantages", "old"):
        assert not np.any(grads[name])


@pytest.mark.parametrize("nothing", [-np.inf, np.nan, -1e30])
@pytest.mark.parametrize("over", OVER)
def test_what_is_masked_reaches_neither_loss_nor_gradient(nothing, over):
    x = given(3)

    def loss(logprobs, old, reference, mask):
        found = clipped_surrogate(logprobs, old, jnp.asarray(x["advantages"]), mask, dual=3.0).loss
        for estimator in ("k1", "k2", "k3"):
            found = found + kl_estimate(logprobs, reference, estimator, mask)
        mean = aggregated(found, mask, over)
        return mean.total / mean.count

    reference = x["old"] - 0.3
    clean = jax.value_and_grad(loss)(*map(jnp.asarray, (x["logprobs"], x["old"], reference, x["mask"])))
    dirty = [jnp.where(x["mask"] > 0, y, nothing) for y in (x["logprobs"], x["old"], reference)]
    found = jax.value_and_grad(loss)(*dirty, jnp.asarray(x["mask"]))
    assert np.isfinite(found[1]).all()
    jax.tree.map(np.testing.assert_array_equal, found, clean)


def test_extreme_ratios_are_finite_in_value_and_gradient():
    away = jnp.asarray([[0.0, -1e4, 1e4, -1e30, 1e30, -88.0, 88.0]])
    mask, old = jnp.ones_like(away), jnp.zeros_like(away) - 1.0
    for sign in (1.0, -1.0):
        total = lambda x, sign=sign: jnp.sum(clipped_surrogate(x, old, sign * mask, mask).loss)
        value, grads = jax.value_and_grad(total)(old + away)
        assert np.isfinite(value) and np.isfinite(grads).all()
    for estimator in ("k1", "k3"):
        value, grads = jax.value_and_grad(lambda x, e=estimator: jnp.sum(kl_estimate(x, old, e)))(old + away)
        assert np.isfinite(value) and np.isfinite(grads).all()


@hypothesis.given(seed=SEEDS)
@examples()
@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_clipped_value_loss(clip, seed):
    x = given(seed)
    expected = np.zeros(x["mask"].shape)
    for at in np.ndindex(expected.shape):
        value, old, target = (float(x[name][at]) for name in ("values", "old_values", "returns"))
        near = value if clip is None else min(max(value, old - clip), old + clip)
        expected[at] = 0.5 * max((value - target) ** 2, (near - target) ** 2)
    close(clipped_value_loss(*(jnp.asarray(x[name]) for name in ("values", "old_values", "returns")), clip), expected)


def test_a_value_that_has_not_moved_far_has_the_plain_loss_to_the_bit():
    x = given(4)
    values, returns = jnp.asarray(x["values"]), jnp.asarray(x["returns"])
    near = values + jnp.asarray(x["old_values"]) * 0.04
    loss = lambda values, clip: clipped_value_loss(values, near, returns, clip)
    np.testing.assert_array_equal(loss(values, 0.2), loss(values, None))
    grads = jax.grad(lambda values: jnp.sum(loss(values, 0.2)))(values)
    close(grads, x["values"].astype(np.float64) - x["returns"])


@hypothesis.given(seed=SEEDS)
@examples()
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimates_of_the_kl(estimator, seed):
    x = given(seed)
    away = x["logprobs"].astype(np.float64) - x["old"]
    expected = {"k1": away, "k2": away**2 / 2, "k3": np.exp(-away) - 1 + away}[estimator]
    close(kl_estimate(jnp.asarray(x["logprobs"]), jnp.asarray(x["old"]), estimator), expected)
    masked = kl_estimate(jnp.asarray(x["logprobs"]), jnp.asarray(x["old"]), estimator, jnp.asarray(x["mask"]))
    close(masked, expected * x["mask"])


def test_k3_keeps_its_digits_near_zero():
    away = 1e-4
    found = kl_estimate(jnp.full((1, 1), -1.0 + away), jnp.full((1, 1), -1.0), "k3")
    apart = float(np.float32(-1.0 + away)) + 1.0
    close(found, [[math.expm1(-apart) + apart]], 1e-8)


@functools.partial(jax.jit, static_argnames="estimator")
def _mean_gradient(logits, reference, estimator):
    """The mean over tokens drawn from softmax(logits), all of them, of the gradient of an estimate used as a loss."""
    old = jax.lax.stop_gradient(jax.nn.softmax(logits))

    def loss(logits):
        pair = jax.nn.log_softmax(logits)[None], jax.nn.log_softmax(reference)[None]
        return jnp.sum(old * kl_estimate(*pair, estimator)[0])

    return jax.grad(loss)(logits)


def test_as_a_loss_only_k2_has_the_gradient_of_the_kl():
    rng = np.random.default_rng(6)
    logits, reference = (jnp.asarray(rng.normal(0, 1, 7), jnp.float32) for _ in range(2))
    p = lambda x: jax.nn.log_softmax(x)
    exact = jax.grad(lambda x: jnp.sum(jnp.exp(p(x)) * (p(x) - p(reference))))(logits)
    close(_mean_gradient(logits, reference, "k2"), exact, 1e-6)
    close(_mean_gradient(logits, reference, "k1"), np.zeros(7), 1e-6)
    backward = jax.grad(lambda x: jnp.sum(jnp.exp(p(reference)) * (p(reference) - p(x))))(logits)
    close(_mean_gradient(logits, reference, "k3"), backward, 1e-6)


def aggregated_loop(values, mask, over, longest):
    rows = [[v for v, m in zip(row, own, strict=True) if m] for row, own in zip(values, mask, strict=True)]
    rows = [row for row in rows if row]
    if over == "tokens":
        return sum(map(sum, rows)) / sum(map(len, rows))
    return sum(sum(row) / (len(row) if over == "completions" else longest) for row in rows) / len(rows)


@hypothesis.given(seed=SEEDS)
@examples()
@pytest.mark.parametrize(
    "over, longest", [("tokens", None), ("completions", None), ("constant", None), ("constant", 31)]
)
def test_means(over, longest, seed):
    x = given(seed)
    found = aggregated(jnp.asarray(x["values"]), jnp.asarray(x["mask"]), over, longest)
    expected = aggregated_loop(x["values"].astype(np.float64), x["mask"], over, longest or x["mask"].shape[1])
    assert found.value() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("over", OVER)
def test_means_of_parts_merge_to_that_of_the_whole(over):
    x = given(7)
    mean = lambda rows: aggregated(jnp.asarray(x["values"])[rows], jnp.asarray(x["mask"])[rows], over, 20)
    whole, parts = mean(slice(0, BATCH)), [mean(slice(i, i + 2)) for i in range(0, BATCH, 2)]
    merged = functools.reduce(lambda a, b: a.merge(b), parts)
    assert merged.value() == pytest.approx(whole.value(), rel=1e-6)
    assert float(merged.count) == float(whole.count)


@pytest.mark.parametrize("over", OVER)
def test_a_batch_that_is_all_masked_contributes_nothing(over):
    nothing = jnp.zeros((BATCH, 3))
    found = aggregated(jnp.full((BATCH, 3), jnp.nan), nothing, over)
    assert (float(found.total), float(found.count)) == (0, 0)


@pytest.mark.parametrize("over", OVER)
def test_padding_and_devices_change_nothing(over):
    x = given(8)

    def loss(logprobs, old, advantages, values, returns, mask):
        found = clipped_surrogate(logprobs, old, advantages, mask).loss + clipped_value_loss(values, old, returns)
        mean = aggregated(jnp.where(mask > 0, found, 0.0), mask, over, 20)
        return mean.total / mean.count

    names = ("logprobs", "old", "advantages", "values", "returns", "mask")
    given_arrays = [jnp.asarray(x[name]) for name in names]
    run = jax.jit(jax.value_and_grad(loss))
    value, grads = run(*given_arrays)
    more = run(*(wider(y, value=0 if name == "mask" else -7) for name, y in zip(names, given_arrays, strict=True)))
    spread = run(*sharded(*given_arrays))
    for other in (more, spread):
        close(other[0], value, 1e-6)
        close(other[1][:, : grads.shape[1]], grads, 1e-6)
    assert not np.any(more[1][:, grads.shape[1] :])
    assert len(spread[1].sharding.device_set) == 8
