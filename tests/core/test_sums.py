"""Sums and maxima: merging is associative, zero weight hides anything, values appear on the host only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxops.core.accumulate import check_sums, loss_counts, weighted_loss, zeros_like_sums
from jaxops.core.failures import UserError
from jaxops.core.sums import Max, Sum, finalize, merge

pytestmark = pytest.mark.latest

SHAPE = (2, 3)


def sums_of(values, weight):
    """One entry of each kind; whole numbers, so float32 adds them exactly and associativity can be exact."""
    return {
        "mean": Sum.of(jnp.asarray(values), jnp.asarray(weight)),
        "vector": Sum(jnp.asarray(values, jnp.float32), jnp.asarray(weight, jnp.float32)),
        "top": Max(jnp.asarray(values, jnp.float32)),
    }


def part(low):
    return hnp.arrays(np.int32, SHAPE, elements=st.integers(low, 50))


@settings(max_examples=20, deadline=None)
@given(values=st.tuples(part(-50), part(-50), part(-50)), weights=st.tuples(part(0), part(0), part(0)))
def test_merging_is_associative_and_commutative_with_an_identity(values, weights):
    a, b, c = map(sums_of, values, weights)
    left, right, turned = merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))
    for x, y, z in zip(*map(jax.tree.leaves, (left, right, turned)), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)
    for x, y in zip(jax.tree.leaves(merge(a, zeros_like_sums(a))), jax.tree.leaves(a), strict=True):
        np.testing.assert_array_equal(x, y)


def test_cut_anywhere_the_value_is_numpys():
    rng = np.random.default_rng(0)
    values, weight = rng.normal(size=(24, 5)), rng.random(24) * (rng.random(24) > 0.3)
    expected = np.average(values.mean(1), weights=weight)
    for cuts in ([12], [1, 2, 23], [5, 10, 15]):
        total = None
        for v, w in zip(np.split(values, cuts), np.split(weight, cuts), strict=True):
            part = {"m": Sum.of(jnp.asarray(v, jnp.float32), jnp.asarray(w, jnp.float32))}
            total = part if total is None else merge(total, part)
        np.testing.assert_allclose(finalize(total)["m"], expected, rtol=1e-6)


def test_a_weight_per_example_broadcasts_over_what_follows():
    values, weight = np.arange(12.0).reshape(3, 2, 2), np.array([1.0, 0.0, 2.0])
    found = Sum.of(jnp.asarray(values, jnp.float32), jnp.asarray(weight, jnp.float32))
    np.testing.assert_allclose(found.total, (values * weight[:, None, None]).sum())
    assert float(found.count) == 4 * weight.sum()


def test_without_weight_every_entry_counts_once():
    found = Sum.of(jnp.arange(6).reshape(2, 3))
    assert (float(found.total), float(found.count)) == (15.0, 6.0)
    assert found.total.dtype == found.count.dtype == jnp.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_zero_weight_hides_what_is_not_finite_and_its_gradient(bad):
    values, weight = jnp.asarray([1.0, bad, 3.0]), jnp.asarray([1.0, 0.0, 1.0])
    found = Sum.of(values, weight)
    assert (float(found.total), float(found.count)) == (4.0, 2.0)
    grad = jax.grad(lambda v: Sum.of(v, weight).total)(values)
    np.testing.assert_array_equal(grad, weight)


def test_half_precision_is_summed_in_float32():
    found = Sum.of(jnp.ones(4096, jnp.bfloat16), jnp.ones(4096, jnp.bfloat16))
    assert float(found.total) == float(found.count) == 4096.0  # bfloat16 stops at 256


def test_finalize_gives_floats_arrays_and_nan_where_nothing_was_counted():
    entries = {
        "mean": Sum(jnp.float32(6), jnp.float32(4)),
        "none": Sum(jnp.float32(0), jnp.float32(0)),
        "deviation": Sum(jnp.float32(8), jnp.float32(2), np.sqrt),
        "per_class": Sum(jnp.asarray([1.0, 2.0, 0.0]), jnp.asarray([2.0, 0.0, 3.0])),
        "largest": Max(jnp.float32(7), lambda x: -x),
        "summary": Max(jnp.asarray([1.0, 5.0]), np.max),
    }
    out = finalize(entries)
    assert out["mean"] == 1.5 and type(out["mean"]) is float
    assert np.isnan(out["none"])
    assert out["deviation"] == 2.0 and out["largest"] == -7.0 and out["summary"] == 5.0
    np.testing.assert_array_equal(out["per_class"], [0.5, np.nan, 0.0])


def test_finalize_of_large_counts_divides_in_float64():
    assert finalize({"m": Sum(jnp.float32(1), jnp.float32(3))})["m"] == 1 / 3


def test_merging_other_names_is_refused():
    with pytest.raises(ValueError, match=r"different names: \['b', 'c'\]"):
        merge(
            {"a": Max(jnp.float32(1)), "b": Max(jnp.float32(1))}, {"a": Max(jnp.float32(1)), "c": Max(jnp.float32(1))}
        )


def test_sums_pass_through_jit_and_keep_their_finalizer():
    double = lambda x: 2 * x
    out = jax.jit(lambda s: merge(s, s))({"m": Sum(jnp.float32(3), jnp.float32(1), double)})
    assert out["m"].finalize is double and out["m"].value() == 6.0


def test_the_loss_is_a_weighted_sum_of_terms_each_over_its_own_count():
    sums = {
        "loss/policy": Sum(jnp.float32(6), jnp.float32(3)),
        "loss/value": Sum(jnp.float32(5), jnp.float32(10)),
        "accuracy": Sum(jnp.float32(100), jnp.float32(1)),
    }
    counts = loss_counts(sums)
    assert set(counts) == {"loss/policy", "loss/value"}
    assert float(weighted_loss(sums, counts, {})) == 2.5
    assert float(weighted_loss(sums, counts, {"loss/value": 4.0})) == 4.0
    # the counts of the whole batch, not of this microbatch, divide
    assert float(weighted_loss(sums, {"loss/policy": jnp.float32(6), "loss/value": jnp.float32(20)}, {})) == 1.25


def test_a_zero_count_contributes_zero_and_a_finite_gradient():
    def loss(w):
        sums = {"loss/seen": Sum.of(jnp.square(w)), "loss/empty": Sum.of(1 / (w - 1), jnp.zeros(3))}
        return weighted_loss(sums, loss_counts(sums), {"loss/empty": 7.0})

    w = jnp.asarray([1.5, 2.0, 3.0])
    value, grad = jax.value_and_grad(loss)(w)
    np.testing.assert_allclose(value, np.mean(np.square(w)), rtol=1e-6)
    np.testing.assert_allclose(grad, 2 * np.asarray(w) / 3, rtol=1e-6)


def test_counts_are_constants_of_differentiation():
    def loss(w):
        sums = {"loss/a": Sum(jnp.sum(w * 3), jnp.sum(w))}
        return weighted_loss(sums, loss_counts(sums), {})

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray([1.0, 1.0])), [1.5, 1.5])


scalar = Sum(jnp.float32(1), jnp.float32(1))


@pytest.mark.parametrize(
    ("sums", "weights", "message"),
    [
        (jnp.float32(1), {}, r"expected a dict of Sum or Max .* got Array"),
        ({"loss/a": 1.0}, {}, r"got \{'loss/a': 'float'\}"),
        ({"accuracy": scalar}, {}, r"no entry is named 'loss/...' \(there are: accuracy\)"),
        ({"loss/a": Max(jnp.float32(1))}, {}, "loss/a must be a scalar Sum"),
        ({"loss/a": Sum(jnp.ones(3), jnp.ones(3))}, {}, "loss/a must be a scalar Sum"),
        ({"loss/a": scalar}, {"loss/b": 1.0}, "weight for loss/b, but the loss terms are loss/a"),
    ],
)
def test_what_an_objective_must_not_return(sums, weights, message):
    with pytest.raises(UserError, match=message):
        check_sums(sums, weights)


def test_what_an_objective_may_return():
    check_sums({"loss/a": scalar, "loss/b": scalar, "m": Sum(jnp.ones(3), jnp.ones(3))}, {"loss/b": 0.0})
