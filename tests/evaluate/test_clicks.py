"""Click metrics against numpy float64, and the same however the examples are cut up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.core.sums import finalize, merge
from jaxops.evaluate.clicks import RELIABILITY_BINS, click_sums

_sums = jax.jit(click_sums)


def case(seed=0, count=512):
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 1.5, count)
    logits[::7] = np.round(logits[::7])  # ties
    label = (rng.random(count) < 1 / (1 + np.exp(-0.8 * logits))).astype(np.float64)
    return logits.astype(np.float32), label.astype(np.float32), rng.integers(0, 3, count).astype(np.float32)


def oracle(logits, label, weight):
    x, y, w = (np.asarray(part, np.float64) for part in (logits, label, weight))
    p = 1 / (1 + np.exp(-x))
    loss = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    rate = np.sum(w * y) / np.sum(w)
    return {
        "log_loss": np.sum(w * loss) / np.sum(w),
        "ne": np.sum(w * loss) / np.sum(w) / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)),
        "calibration": np.sum(w * p) / np.sum(w * y),
    }


@pytest.mark.parametrize("seed", range(3))
def test_against_numpy(seed):
    logits, label, weight = case(seed)
    found, wanted = finalize(_sums(logits, label, weight)), oracle(logits, label, weight)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_any_cut_merges_to_the_same():
    parts = case(1)
    whole = finalize(_sums(*parts))
    cut = [_sums(*(x[start : start + 64] for x in parts)) for start in range(0, 512, 64)]
    merged = finalize(functools.reduce(merge, cut))
    for name, value in whole.items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-5, err_msg=name)


def test_padding_does_not_count_whatever_it_holds():
    logits, label, _ = case(2)
    padded = finalize(
        _sums(np.append(logits, np.nan), np.append(label, np.nan).astype(np.float32), np.append(np.ones(512), 0))
    )
    for name, value in finalize(_sums(logits, label)).items():
        np.testing.assert_allclose(padded[name], value, rtol=1e-6, err_msg=name)


def test_known_answers():
    perfect = finalize(click_sums(jnp.asarray([-3.0, -2.0, 2.0, 3.0]), jnp.asarray([0.0, 0.0, 1.0, 1.0])))
    assert perfect["ne"] < 1
    rate = jnp.full(8, float(np.log(0.25 / 0.75)))
    knows = finalize(click_sums(rate, jnp.asarray([1.0, 0, 0, 0, 1.0, 0, 0, 0])))
    assert knows["ne"] == pytest.approx(1, rel=1e-5) and knows["calibration"] == pytest.approx(1, rel=1e-5)
    assert knows["ece"] == pytest.approx(0, abs=1e-6)
    one_kind = finalize(click_sums(jnp.ones(3), jnp.ones(3)))
    assert np.isnan(one_kind["ne"])


def test_reliability_by_bin():
    logits, label, weight = case(0)
    predicted, clicked, share = finalize(_sums(logits, label, weight))["reliability"]
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    for at in range(RELIABILITY_BINS):
        here = (p >= at / RELIABILITY_BINS) & (p < (at + 1) / RELIABILITY_BINS)
        w = weight * here
        assert share[at] == pytest.approx(w.sum() / weight.sum(), abs=1e-6)
        if w.sum():
            assert predicted[at] == pytest.approx((w * p).sum() / w.sum(), rel=1e-5)
            assert clicked[at] == pytest.approx((w * label).sum() / w.sum(), rel=1e-5)
        else:
            assert np.isnan(predicted[at]) and np.isnan(clicked[at])
