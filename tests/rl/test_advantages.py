"""Rewards, advantages and whitening against loops in float64, over masks of every form, meshes and padding."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_completions import BATCH, LONGEST, arrays, close, masks, sharded, wider

from jaxops.rl.advantages import generalised_advantages, group_advantages, rewards_of_tokens, whitened
from jaxops.rl.kl import Kl, adapted

examples = functools.partial(hypothesis.settings, max_examples=12, derandomize=True)
SEEDS = st.integers(0, 2**31)
GROUPS = ["mean", "others"]


def given(seed):
    rng = np.random.default_rng(seed)
    scores, after = rng.normal(0, 1, (2, BATCH)).astype(np.float32)
    return {**arrays(rng, "rewards", "values", "kl"), "mask": masks(rng), "scores": scores, "after": after}


def own_tokens(mask):
    """The columns of each row's own tokens."""
    return [np.flatnonzero(row).tolist() for row in mask]


def advantages_loop(x, gamma, lam, bootstrap):
    """Generalised advantages by their definition: discounted sums of errors over the row's own tokens alone."""
    advantages, returns = np.zeros((2, *x["mask"].shape))
    for row, columns in enumerate(own_tokens(x["mask"])):
        rewards = [float(x["rewards"][row, c]) for c in columns]
        values = [float(x["values"][row, c]) for c in columns] + [float(x["after"][row]) if bootstrap else 0.0]
        errors = [r + gamma * values[i + 1] - values[i] for i, r in enumerate(rewards)]
        for i, column in enumerate(columns):
            advantages[row, column] = sum((gamma * lam) ** (j - i) * errors[j] for j in range(i, len(errors)))
            returns[row, column] = advantages[row, column] + values[i]
    return advantages, returns


@functools.partial(jax.jit, static_argnames=("gamma", "lam", "bootstrap"))
def advantages(x, gamma, lam, bootstrap=False):
    after = x["after"] if bootstrap else None
    return generalised_advantages(x["rewards"], x["values"], x["mask"], gamma=gamma, lam=lam, bootstrap=after)


@hypothesis.given(seed=SEEDS)
@examples()
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0), (0.0, 0.95)])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_generalised_advantages(bootstrap, gamma, lam, seed):
    x = given(seed)
    found, expected = advantages(x, gamma, lam, bootstrap), advantages_loop(x, gamma, lam, bootstrap)
    close(found.advantages, expected[0])
    close(found.returns, expected[1])


def test_with_lambda_one_returns_are_the_rewards_that_follow():
    x = given(1)
    found = advantages(x, 1.0, 1.0)
    after = np.cumsum((x["rewards"] * x["mask"])[:, ::-1].astype(np.float64), axis=1)[:, ::-1]
    close(found.returns, after * x["mask"])


def test_a_row_without_tokens_has_none_and_one_token_is_reward_less_value():
    x = given(2)
    found = advantages(x, 0.9, 0.5)
    assert not x["mask"][1].any() and not np.any(found.advantages[1]) and not np.any(found.returns[1])
    close(found.advantages[2, 0], float(x["rewards"][2, 0]) - float(x["values"][2, 0]))
    close(found.returns[2, 0], float(x["rewards"][2, 0]))


@hypothesis.given(seed=SEEDS)
@examples()
@pytest.mark.parametrize("penalised", [False, True])
def test_rewards_of_tokens(penalised, seed):
    x = given(seed)
    expected = np.zeros(x["mask"].shape)
    for row, columns in enumerate(own_tokens(x["mask"])):
        for column in columns:
            expected[row, column] = -0.3 * float(x["kl"][row, column]) if penalised else 0.0
        if columns:
            expected[row, columns[-1]] += float(x["scores"][row])
    kl = jnp.asarray(x["kl"]) if penalised else None
    found = rewards_of_tokens(jnp.asarray(x["scores"]), jnp.asarray(x["mask"]), kl, 0.3)
    close(found, expected)
    traced = rewards_of_tokens(jnp.asarray(x["scores"]), jnp.asarray(x["mask"]), kl, jnp.float32(0.3))
    np.testing.assert_array_equal(found, traced)


def whitened_loop(values, mask, shift, variance, eps):
    own = values[mask > 0].astype(np.float64)
    mean = own.mean() if len(own) else 0.0
    squares = sum((v - mean) ** 2 for v in own) / max(len(own) - (variance == "unbiased"), 1)
    return np.where(mask > 0, (values - mean) / np.sqrt(squares + eps) + (0 if shift else mean), 0)


@hypothesis.given(seed=SEEDS)
@examples()
@pytest.mark.parametrize("variance", ["biased", "unbiased"])
@pytest.mark.parametrize("shift", [False, True])
def test_whitening(shift, variance, seed):
    x = given(seed)
    values = x["values"] * 3 + 2
    found = whitened(jnp.asarray(values), jnp.asarray(x["mask"]), shift=shift, variance=variance)
    close(found, whitened_loop(values, x["mask"], shift, variance, 1e-8), 1e-5)


@pytest.mark.parametrize("variance", ["biased", "unbiased"])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_whitening_of_nothing_of_one_token_and_of_equal_values_is_finite(variance, tokens):
    mask = np.zeros((2, 4), np.float32)
    mask[0, :tokens] = 1
    for shift in (False, True):
        found = np.asarray(whitened(jnp.full((2, 4), 0.75), jnp.asarray(mask), shift=shift, variance=variance))
        np.testing.assert_allclose(found, np.where(mask > 0, 0.0 if shift else 0.75, 0.0), atol=1e-6)


def groups_loop(scores, kept, group, baseline, scaled, eps):
    found, flat = np.zeros(len(scores)), np.zeros(len(scores), bool)
    for start in range(0, len(scores), group):
        rows = [i for i in range(start, start + group) if kept[i]]
        own = [float(scores[i]) for i in rows]
        same = len(set(own)) <= 1
        for i in range(start, start + group):
            flat[i] = same
        if same:
            continue
        for i in rows:
            others = [float(scores[j]) for j in rows if j != i]
            found[i] = float(scores[i]) - np.mean(own if baseline == "mean" else others)
            found[i] /= np.std(own, ddof=1) + eps if scaled else 1
    return found, flat


@hypothesis.given(seed=SEEDS)
@examples()
@pytest.mark.parametrize("baseline", GROUPS)
@pytest.mark.parametrize("scaled", [False, True])
def test_advantages_over_a_group(scaled, baseline, seed):
    rng = np.random.default_rng(seed)
    scores = rng.choice([0.0, 1.0, 0.3], 24).astype(np.float32)
    kept = rng.random(24) < 0.8
    kept[:6], kept[6:11] = False, False  # a group of which nothing is left, and one with a single completion
    scores[12:18] = 0.1  # one whose scores are equal: their mean rounds
    options = {"baseline": baseline, "scaled": scaled, "eps": 1e-6}
    dirty = jnp.where(jnp.asarray(kept), scores, jnp.nan)
    for given_scores, weight in ((dirty, jnp.asarray(kept, jnp.float32)), (jnp.asarray(scores), None)):
        found = group_advantages(given_scores, 6, weight=weight, **options)
        expected, flat = groups_loop(scores, kept if weight is not None else np.ones(24, bool), 6, **options)
        close(found.advantages, expected, 1e-5)
        np.testing.assert_array_equal(found.flat, flat)
        assert not np.any(np.asarray(found.advantages)[flat])


@jax.jit
def everything_and_slopes(x):
    def everything(x):
        rewards = rewards_of_tokens(x["scores"], x["mask"], x["kl"], 0.3)
        found = generalised_advantages(x["rewards"] + rewards, x["values"], x["mask"])
        white = [whitened(x["values"], x["mask"], shift=shift) for shift in (True, False)]
        return sum(jnp.sum(leaf) for leaf in (*found, *white)), (rewards, found, white)

    return jax.grad(everything, has_aux=True)(x)


@pytest.mark.parametrize("nothing", [np.nan, -np.inf, 1e30])
def test_what_is_masked_is_not_read(nothing):
    x = given(3)
    clean = {name: jnp.asarray(value) for name, value in x.items()}
    dirty = {name: jnp.where(x["mask"] > 0, clean[name], nothing) for name in ("rewards", "values", "kl")}
    dirty = {**clean, **dirty}
    (slopes, found), (_, expected) = everything_and_slopes(dirty), everything_and_slopes(clean)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(np.isfinite(slope).all() for slope in slopes.values())


def test_padding_and_devices_change_nothing():
    x = given(4)
    names = ("rewards", "values", "kl", "mask", "scores", "after")

    @jax.jit
    def everything(rewards, values, kl, mask, scores, after):
        rewards = rewards + rewards_of_tokens(scores, mask, kl, 0.3)
        found = generalised_advantages(rewards, values, mask, gamma=0.9, bootstrap=after)
        white = whitened(found.advantages, mask, variance="unbiased")
        return *found, white, group_advantages(scores, 4).advantages[:, None]

    given_arrays = [jnp.asarray(x[name]) for name in names]
    alone, spread = everything(*given_arrays), everything(*sharded(*given_arrays))
    padded = [
        wider(y, value=0 if name == "mask" else -7) if y.ndim == 2 else y
        for name, y in zip(names, given_arrays, strict=True)
    ]
    for one, other, more in zip(alone, spread, everything(*padded), strict=True):
        close(other, one, 1e-6)
        close(more[:, : one.shape[1]], one, 1e-6)
        assert not np.any(more[:, LONGEST:])
    assert len(spread[0].sharding.device_set) == 8


@pytest.mark.parametrize("kl, error", [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2)])
def test_the_coefficient_moves_towards_the_target(kl, error):
    config = Kl(target=6.0, horizon=1000)
    found = adapted(jnp.float32(0.15), jnp.float32(kl), 64, config)
    assert float(found) == pytest.approx(0.15 * (1 + error * 64 / 1000), rel=1e-6)
    assert float(adapted(jnp.float32(0.15), jnp.float32(kl), 64, Kl(coef=0.15))) == np.float32(0.15)
