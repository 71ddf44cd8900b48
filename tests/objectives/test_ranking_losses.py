"""Ranking losses against numpy in float64; what is drawn, and what is never drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jaxops.core.random import example_keys
from jaxops.objectives.ranking import (
    _NEGATIVES,
    bce_loss,
    gbce,
    gbce_beta,
    gbce_loss,
    sampled_softmax,
    sampled_softmax_cross_entropy,
    softmax,
    softmax_cross_entropy,
)

RNG = np.random.default_rng(0)
N_ITEMS, ROWS, DIM = 20, 32, 6
KEY = jax.random.key(4)


@dataclasses.dataclass
class Dot:
    """A ranker whose states come with the batch: the losses alone are under test."""

    n_items: int = N_ITEMS

    def encode(self, params, batch, key):
        return batch["hidden"]

    def item_vectors(self, params):
        return params["item"]

    def logits(self, params, hidden):
        row = jnp.arange(ROWS)
        scores = jnp.einsum("...d,vd->...v", hidden, params["item"])
        return jnp.where(((row > 0) & (row <= self.n_items)).reshape((1,) * (scores.ndim - 1) + (-1,)), scores, -1e9)


PARAMS = {"item": jnp.asarray(RNG.normal(size=(ROWS, DIM)), jnp.float32)}


def batch_of(size=5, length=4):
    weight = (RNG.random((size, length)) > 0.3) * RNG.random((size, length))
    targets = np.where(weight > 0, RNG.integers(1, N_ITEMS + 1, (size, length)), 0)
    return {
        "hidden": jnp.asarray(RNG.normal(size=(size, length, DIM)), jnp.float32),
        "targets": jnp.asarray(targets, jnp.int32),
        "weight": jnp.asarray(weight, jnp.float32),
        "id": jnp.arange(10, 10 + size),
    }


BATCH = batch_of()


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64) if x.dtype == jnp.float32 else np.asarray(x), tree)


def scores_of(batch=BATCH):
    """Scores of every row, float64."""
    return wide(batch)["hidden"] @ wide(PARAMS)["item"].T


def target_scores(batch=BATCH):
    return np.take_along_axis(scores_of(batch), np.asarray(batch["targets"])[..., None], -1)[..., 0]


def softplus(x):
    return np.logaddexp(0, x)


def check(sums, name, loss, batch=BATCH):
    """Total and count of the one loss term are those of numpy's per-position loss."""
    assert set(sums) == {f"loss/{name}"}
    weight = wide(batch)["weight"]
    np.testing.assert_allclose(sums[f"loss/{name}"].total, (np.where(weight > 0, loss, 0) * weight).sum(), rtol=2e-6)
    np.testing.assert_allclose(sums[f"loss/{name}"].count, weight.sum(), rtol=1e-6)


def full_softmax(batch=BATCH):
    real = scores_of(batch)[..., 1 : N_ITEMS + 1]
    top = real.max(-1)
    return np.log(np.exp(real - top[..., None]).sum(-1)) + top - target_scores(batch)


def test_softmax_is_over_the_items_alone():
    check(softmax(Dot())(PARAMS, BATCH, KEY), "softmax", full_softmax())


def test_softmax_cross_entropy_of_large_and_half_precision_logits():
    logits = np.asarray([[1000.0, 0.0, -1000.0], [0.0, 1.0, 2.0]])
    expected = [1000.0, np.log(np.exp([-2.0, -1.0, 0.0]).sum())]
    found = softmax_cross_entropy(jnp.asarray(logits, jnp.bfloat16), jnp.asarray([1, 2]))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def drawn_by(key, count):
    return np.asarray(jax.random.randint(jax.random.fold_in(key, _NEGATIVES), (count,), 1, N_ITEMS + 1))


@pytest.mark.latest
@pytest.mark.parametrize("count", [1, 7, 64])
def test_sampled_softmax_is_numpys(count):
    drawn, expected = drawn_by(KEY, count), count / N_ITEMS
    negatives = scores_of()[..., drawn] - np.log(expected)
    negatives = np.where(drawn == np.asarray(BATCH["targets"])[..., None], -np.inf, negatives)
    positive = target_scores()
    loss = np.log(np.exp(positive) + np.exp(negatives).sum(-1)) - positive
    check(sampled_softmax(Dot(), count)(PARAMS, BATCH, KEY), "sampled_softmax", loss)


def test_with_every_item_drawn_once_it_is_the_full_softmax():
    everything = np.arange(1, N_ITEMS + 1)
    targets = np.asarray(BATCH["targets"])
    found = sampled_softmax_cross_entropy(
        jnp.asarray(target_scores(), jnp.float32),
        jnp.asarray(scores_of()[..., everything], jnp.float32),
        jnp.asarray(everything == targets[..., None]),
        expected=1.0,
    )
    np.testing.assert_allclose(np.asarray(found)[targets > 0], full_softmax()[targets > 0], rtol=2e-6, atol=2e-6)


def test_the_corrected_partition_function_is_unbiased():
    """Over many draws, the mean of exp(loss) x exp(positive) is the full sum of exponentials."""
    loss = sampled_softmax(Dot(), 8)
    one = {name: x[:1, :1] if x.ndim > 1 else x[:1] for name, x in BATCH.items()} | {"weight": jnp.ones((1, 1))}
    one["targets"] = jnp.full((1, 1), 3)
    totals = jax.jit(jax.vmap(lambda key: loss(PARAMS, one, key)["loss/sampled_softmax"].total))(
        jax.random.split(KEY, 4000)
    )
    partition = np.exp(np.asarray(totals, np.float64) + target_scores(one)[0, 0])
    expected = np.exp(scores_of(one)[0, 0, 1 : N_ITEMS + 1]).sum()
    assert abs(partition.mean() - expected) < 4 * partition.std() / np.sqrt(len(partition))
    assert partition.std() > 0.1


def test_a_draw_of_the_target_is_left_out():
    positive, negatives = jnp.asarray([1.0]), jnp.asarray([[1.0, 2.0]])
    both = sampled_softmax_cross_entropy(positive, negatives, jnp.asarray([[True, True]]), 0.1)
    one = sampled_softmax_cross_entropy(positive, negatives, jnp.asarray([[True, False]]), 0.1)
    np.testing.assert_allclose(both, 0.0, atol=1e-6)
    np.testing.assert_allclose(one, np.log1p(np.exp(2.0 - np.log(0.1) - 1.0)), rtol=1e-6)


def test_evaluation_of_the_sampled_softmax_is_the_full_one():
    check(sampled_softmax(Dot(), 3)(PARAMS, BATCH, None), "sampled_softmax", full_softmax())


def test_the_step_shares_its_negatives_and_the_next_step_draws_others():
    loss = sampled_softmax(Dot(), 7)
    rows = lambda batch: jax.grad(lambda p: loss(p, batch, KEY)["loss/sampled_softmax"].total)(PARAMS)["item"]
    touched = lambda grad: (
        set(np.flatnonzero(np.abs(np.asarray(grad)).sum(-1))) - set(np.asarray(BATCH["targets"]).flat)
    )
    first, second = ({k: v[part] for k, v in BATCH.items()} for part in (slice(0, 2), slice(2, 5)))
    assert touched(rows(first)) == touched(rows(second)) != set()
    assert not np.array_equal(drawn_by(KEY, 7), drawn_by(jax.random.fold_in(KEY, 1), 7))


@pytest.mark.latest
def test_gbce_is_numpys():
    positive, negatives = RNG.normal(size=(3, 4)) * 5, RNG.normal(size=(3, 4, 6)) * 5
    for beta in (1.0, 0.3):
        expected = (beta * softplus(-positive) + softplus(negatives).sum(-1)) / 7
        found = gbce(jnp.asarray(positive, jnp.float32), jnp.asarray(negatives, jnp.float32), beta)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_gbce_is_bce_of_a_powered_probability():
    """The definition: -(log sigmoid(s)^beta + sum log(1 - sigmoid(n))) / (1 + n), equation 9 of the paper."""
    positive, negatives, beta = 0.7, np.asarray([0.2, -1.0]), 0.4
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    expected = -(np.log(sigmoid(positive) ** beta) + np.log(1 - sigmoid(negatives)).sum()) / 3
    found = gbce(jnp.asarray([positive]), jnp.asarray([negatives], jnp.float32), beta)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_calibration_of_gbce():
    alpha = 256 / 3416
    assert gbce_beta(256, 3417, 0.0) == pytest.approx(1.0)
    assert gbce_beta(256, 3417, 1.0) == pytest.approx(alpha)
    assert gbce_beta(256, 3417, 0.75) == pytest.approx(alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha))
    assert gbce_beta(99, 100, 0.4) == pytest.approx(1.0)  # all negatives: nothing to undo


def counts_of_draws(count, size=40):
    """How often each row was drawn as a negative: its gradient where every score is zero."""
    batch = {
        "hidden": jnp.ones((size, 4, DIM)),
        "targets": jnp.full((size, 4), 5),
        "weight": jnp.ones((size, 4)),
        "id": jnp.arange(size),
    }
    loss = lambda params: bce_loss(Dot(), count)(params, batch, KEY)["loss/bce"].total
    grad = jax.grad(loss)({"item": jnp.zeros((ROWS, DIM))})["item"]
    return np.asarray(grad)[:, 0] * 2 * (1 + count), size * 4 * count


def test_negatives_are_uniform_over_all_items_but_the_target():
    counts, total = counts_of_draws(50)
    assert counts[5] == pytest.approx(-total / 50, rel=1e-4)  # the target: as a positive only
    others = [row for row in range(1, N_ITEMS + 1) if row != 5]
    assert not counts[[0, *range(N_ITEMS + 1, ROWS)]].any()
    expected = total / len(others)
    chi2 = ((counts[others] - expected) ** 2 / expected).sum()
    assert counts[others].sum() == pytest.approx(total, rel=1e-4)
    assert chi2 < 45  # 18 degrees of freedom: p = 4e-4; a constant key, so never flaky


@pytest.mark.parametrize("edge", [1, N_ITEMS])
def test_the_first_and_the_last_item_may_be_targets(edge):
    """Where the target scores high and the rest low, a negative that hit the target or no item would show."""
    items = np.full((ROWS, 1), 50.0, np.float32)
    items[1 : N_ITEMS + 1] = -50
    items[edge] = 50
    batch = {
        "hidden": jnp.ones((30, 4, 1)),
        "targets": jnp.full((30, 4), edge),
        "weight": jnp.ones((30, 4)),
        "id": jnp.arange(30),
    }
    for make, name in ((bce_loss(Dot(), 16), "bce"), (gbce_loss(Dot(), 16, 0.5), "gbce")):
        assert float(make({"item": jnp.asarray(items)}, batch, KEY)[f"loss/{name}"].total) < 1e-9


@pytest.mark.latest
@pytest.mark.parametrize("name", ["bce", "gbce"])
def test_the_objectives_use_their_loss_and_their_beta(name):
    """All items score alike, so it does not matter which are drawn."""
    make, beta = {"bce": (bce_loss(Dot(), 5), 1.0), "gbce": (gbce_loss(Dot(), 5, 0.6), gbce_beta(5, N_ITEMS, 0.6))}[
        name
    ]
    params = {"item": jnp.full((ROWS, DIM), 0.3)}
    score = 0.3 * wide(BATCH)["hidden"].sum(-1)
    check(make(params, BATCH, KEY), name, (beta * softplus(-score) + 5 * softplus(score)) / 6)


@pytest.mark.latest
def test_draws_belong_to_the_example():
    loss = bce_loss(Dot(), 3)
    per_row = lambda batch: [
        float(loss(PARAMS, {k: v[i : i + 1] for k, v in batch.items()}, KEY)["loss/bce"].total) for i in range(5)
    ]
    rows = per_row(BATCH)
    np.testing.assert_allclose(sum(rows), loss(PARAMS, BATCH, KEY)["loss/bce"].total, rtol=1e-5)
    order = np.asarray([4, 2, 0, 1, 3])
    shuffled = per_row({k: v[order] for k, v in BATCH.items()})
    np.testing.assert_allclose(shuffled, np.asarray(rows)[order], rtol=1e-6)
    other = per_row(BATCH | {"id": BATCH["id"] + 100})
    assert not np.allclose(other, rows)


def test_evaluation_of_bce_repeats():
    loss = bce_loss(Dot(), 3)
    once = lambda key: float(loss(PARAMS, BATCH, key)["loss/bce"].total)
    assert once(None) == once(None) and once(KEY) != once(jax.random.fold_in(KEY, 1))


@pytest.mark.latest
@pytest.mark.parametrize("make", [softmax, sampled_softmax, bce_loss, gbce_loss])
def test_a_batch_without_a_target_counts_nothing(make):
    empty = BATCH | {"weight": jnp.zeros_like(BATCH["weight"]), "targets": jnp.zeros_like(BATCH["targets"])}
    objective = make(Dot())
    value, grad = jax.value_and_grad(lambda p: next(iter(objective(p, empty, KEY).values())).total)(PARAMS)
    (entry,) = objective(PARAMS, empty, KEY).values()
    assert float(value) == float(entry.count) == 0.0
    np.testing.assert_array_equal(grad["item"], 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sampled_softmax(Dot(), 0), "negatives must be at least 1, got 0"),
        (lambda: bce_loss(Dot(), 0), "negatives must be at least 1, got 0"),
        (lambda: gbce_loss(Dot(), 0), "got 0 and 0.75"),
        (lambda: gbce_loss(Dot(), 4, 1.5), r"t in \[0, 1\], got 4 and 1.5"),
    ],
)
def test_what_cannot_be_asked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.latest
def test_the_suite_checks_array_annotations():
    """tests/conftest.py has jaxtyping check annotated functions: a wrong rank or dtype must not pass in silence."""
    with pytest.raises(TypeCheckError, match="softmax_cross_entropy"):
        softmax_cross_entropy(jnp.ones((2, 9)), jnp.ones((2,)))
    with pytest.raises(TypeCheckError, match="example_keys"):
        example_keys(KEY, jnp.ones((2, 2), jnp.int32))
