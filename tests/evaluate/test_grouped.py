"""AUC within groups and by slice against loops in float64, however the examples are cut up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import PartitionSpec as P

from jaxops.core.failures import UserError
from jaxops.core.mesh import batch_sharding, make_mesh
from jaxops.core.sums import finalize, merge
from jaxops.evaluate.clicks import click_sums
from jaxops.evaluate.grouped import GroupAuc, Scores, area_under_curve_exact, sliced
from jaxops.evaluate.ranking import evaluate_scores

COUNT = 240


def case(seed=0):
    """Groups of many sizes, some of one class; ties; labels that are not known."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=COUNT)
    logits[::3] = np.round(logits[::3])
    labels = (rng.random(COUNT) < 1 / (1 + np.exp(-logits))).astype(np.float64)
    groups = rng.geometric(0.1, COUNT)
    labels[groups == 1], labels[groups == 2] = 1, 0
    labels[rng.random(COUNT) < 0.05] = np.nan
    return logits.astype(np.float32), labels, groups, rng.integers(0, 4, COUNT).astype(np.float64)


def area(logits, labels, weights):
    x, y, w = (np.asarray(part, np.float64) for part in (logits, labels, weights))
    pairs = (w * y)[:, None] * (w * (1 - y))[None]
    wins = (x[:, None] > x[None]) + (x[:, None] == x[None]) / 2
    return np.sum(pairs * wins) / np.sum(pairs) if np.sum(pairs) else np.nan


def oracle(logits, labels, groups, weights, part=True):
    total, share = 0.0, 0.0
    for group in np.unique(groups):
        here = (groups == group) & ~np.isnan(labels) & part
        one, weight = area(logits[here], labels[here], weights[here]), weights[here].sum()
        if not np.isnan(one):
            total, share = total + weight * one, share + weight
    return total / share


def batches(logits, size=32):
    """In another order, the last one padded by something that must not count."""
    order = np.random.default_rng(1).permutation(COUNT).astype(np.int32)
    ids = np.append(order, np.zeros(-COUNT % size, np.int32))
    weight = np.append(np.ones(COUNT), np.zeros(-COUNT % size)).astype(np.float32)
    shown = np.where(weight > 0, logits[ids], np.nan).astype(np.float32)
    for start in range(0, len(ids), size):
        at = slice(start, start + size)
        yield shown[at], {"id": ids[at], "weight": weight[at]}


@pytest.mark.latest
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weighted", [False, True])
def test_group_auc_equals_a_loop_over_groups(seed, weighted):
    logits, labels, groups, weights = case(seed)
    weights = weights if weighted else np.ones(COUNT)
    metric = GroupAuc(labels, groups, weights if weighted else None)
    sums = jax.jit(metric.sums)
    merged = functools.reduce(merge, (sums(*batch) for batch in batches(logits)))
    assert finalize(merged)["gauc"] == pytest.approx(oracle(logits, labels, groups, weights), rel=1e-12)


def test_any_cut_and_a_mesh_give_the_same_to_the_last_bit():
    logits, labels, groups, weights = case()
    metric = GroupAuc(labels, groups, weights)
    sums = jax.jit(metric.sums)
    found = {
        size: finalize(functools.reduce(merge, (sums(*batch) for batch in batches(logits, size))))["gauc"]
        for size in (COUNT, 16, 100)
    }
    mesh = make_mesh(data=2, fsdp=4)
    with jax.set_mesh(mesh):
        divided = jax.jit(jax.sharding.auto_axes(metric.sums, out_sharding=P()))
        placed = (jax.device_put(batch, batch_sharding(mesh)) for batch in batches(logits))
        parts = [jax.block_until_ready(divided(*batch)) for batch in placed]
        found["mesh"] = finalize(functools.reduce(merge, jax.device_get(parts)))["gauc"]
    assert len(set(found.values())) == 1 and not np.isnan(found["mesh"])


def test_group_auc_by_hand():
    groups = np.array(["a", "a", "a", "b", "b", "c", "d", "d"])
    labels = np.array([1, 0, 0, 1, 0, 1, 0, 1])
    value = GroupAuc(labels, groups).value
    # a: one of two pairs; b: a tie; c has one class; d: right
    assert value(np.array([0.5, 0.9, 0.1, 3, 3, 9, -1, 7])) == pytest.approx((3 * 0.5 + 2 * 0.5 + 2 * 1) / 7)
    assert value(np.array([0.5, 0.9, 0.1, 3, 3, 9, np.nan, 7])) == pytest.approx(0.5)
    weighted = GroupAuc(labels, groups, np.array([1, 1, 2, 1, 1, 9, 0, 1])).value
    assert weighted(np.array([0.5, 0.9, 0.1, 3, 3, 9, -1, 7])) == pytest.approx((4 * 2 / 3 + 2 * 0.5) / 6)
    assert np.isnan(GroupAuc(labels[:1], groups[:1]).value(np.zeros(1)))
    assert np.isnan(GroupAuc(labels[:0], groups[:0]).value(np.zeros(0)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_logit_is_not_left_out(bad):
    logits, labels, groups, weights = case()
    labels, weights = np.nan_to_num(labels), np.ones(COUNT)
    logits[7] = bad
    sums = GroupAuc(labels, groups, weights).sums
    whole = jax.jit(sums)(logits, {"id": np.arange(COUNT, dtype=np.int32), "weight": np.ones(COUNT, np.float32)})
    assert np.isnan(finalize(whole)["gauc"])
    labels[7] = np.nan
    sums = GroupAuc(labels, groups, weights).sums
    whole = jax.jit(sums)(logits, {"id": np.arange(COUNT, dtype=np.int32), "weight": np.ones(COUNT, np.float32)})
    assert not np.isnan(finalize(whole)["gauc"])


def test_close_logits_are_told_apart_and_ids_out_of_range_are_left_out():
    metric = GroupAuc(np.array([0, 1]), np.zeros(2, np.int32))
    close = np.array([1.0, np.nextafter(np.float32(1), np.float32(2)), 5.0, 5.0], np.float32)
    batch = {"id": np.array([0, 1, 2, -1], np.int32), "weight": np.ones(4, np.float32)}
    found = metric.sums(jnp.asarray(close), {name: jnp.asarray(x) for name, x in batch.items()})
    assert finalize(merge(found, {"gauc": jax.tree.map(jnp.zeros_like, found["gauc"])}))["gauc"] == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_exact_auc_equals_mann_whitney(seed):
    logits, labels, _, weights = case(seed)
    labels = np.nan_to_num(labels)
    clicks, without = logits[labels == 1].astype(np.float64), logits[labels == 0].astype(np.float64)
    wanted = scipy.stats.mannwhitneyu(clicks, without).statistic / (len(clicks) * len(without))
    assert area_under_curve_exact(labels, logits) == pytest.approx(wanted, rel=1e-12)
    weighted = area_under_curve_exact(labels, logits, weights)
    assert weighted == pytest.approx(area(logits, labels, weights), rel=1e-12)


def test_exact_auc_of_known_answers():
    assert area_under_curve_exact(np.array([0, 0, 1]), np.array([1, 2, 3])) == 1.0
    assert area_under_curve_exact(np.array([True, False]), np.array([0.5, 0.5])) == 0.5
    assert np.isnan(area_under_curve_exact(np.array([1, 1]), np.array([0.5, 0.1])))


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (([0, 1], [1], None), "2 labels, 1 groups, 2 weights"),
        (([0, 1], [1, 1], [1.0]), "2 labels, 2 groups, 1 weights"),
        (([0, 2, 1], [1, 1, 1], None), "labels are 0 or 1 .*one is 2"),
        (([0, 1], [1, 1], [1.0, -1.0]), "a weight is negative or not finite"),
    ],
)
def test_mistakes_are_told(parts, told):
    with pytest.raises(UserError, match=told):
        GroupAuc(*(None if part is None else np.array(part) for part in parts))


def test_slices_are_the_metrics_of_their_examples_alone():
    logits, labels, groups, _ = case()
    known = np.nan_to_num(labels).astype(np.float32)
    weight = np.append(np.ones(200), np.zeros(40)).astype(np.float32)
    ids = np.arange(COUNT, dtype=np.int32)
    masks = {"few": groups < 5, "odd": ids % 2 == 1, "none": np.zeros(COUNT, bool)}
    metric = GroupAuc(known, groups)

    @jax.jit
    def found(logits, known, ids, masks, weight):
        of = lambda w: click_sums(logits, known, w) | metric.sums(logits, {"id": ids, "weight": w})
        return sliced(of, masks, weight)

    values = finalize(found(logits, known, ids, masks, weight))
    assert {name.partition("[")[2] for name in values} == {"few]", "odd]", "none]"}
    for name in ("few", "odd"):
        part = masks[name] & (weight > 0)
        alone = finalize(jax.jit(click_sums)(logits[part], known[part]))
        for metric_name, value in alone.items():
            np.testing.assert_allclose(values[f"{metric_name}[{name}]"], value, rtol=1e-5, err_msg=metric_name)
        wanted = oracle(logits, known.astype(np.float64), groups, np.ones(COUNT), part)
        assert values[f"gauc[{name}]"] == pytest.approx(wanted, rel=1e-12)
    assert np.isnan(values["ne[none]"]) and np.isnan(values["gauc[none]"])


def test_slices_of_ranking_metrics():
    rng = np.random.default_rng(5)
    scores, target = rng.normal(size=(32, 20)).astype(np.float32), rng.integers(1, 20, 32).astype(np.int32)
    batch = {"target": target, "seen": np.zeros((32, 1), np.int32), "id": np.arange(32, dtype=np.int32)}
    cold = target > 10
    names = ["ndcg@10", "coverage@2"]

    @jax.jit
    def found(scores, batch, cold, weight):
        of = lambda w: evaluate_scores(scores, {**batch, "weight": w}, names, n_items=19)
        return sliced(of, {"cold_item": cold}, weight)

    values = finalize(found(scores, batch, cold, np.ones(32, np.float32)))
    alone = {name: x[cold] for name, x in batch.items()} | {"weight": np.ones(cold.sum(), np.float32)}
    only = finalize(jax.jit(lambda s, b: evaluate_scores(s, b, names, n_items=19))(scores[cold], alone))
    assert values == pytest.approx({f"{name}[cold_item]": value for name, value in only.items()}, rel=1e-6)


def reference_auc(label, score, weight):
    """As scikit-learn's roc_auc_score: the trapezoids under the curve of all thresholds, in float64."""
    order = np.argsort(-score, kind="stable")
    label, score, weight = label[order], score[order], weight[order]
    last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    true, false = (np.concatenate([[0], np.cumsum(part * weight)[last]]) for part in (label, 1 - label))
    return np.trapezoid(true, false) / (true[-1] * false[-1])


HOSTILE = {
    "normal": lambda draw, n: draw.normal(-3, 1, n),
    "ties": lambda draw, n: draw.integers(0, 3, n).astype(float),
    "close": lambda draw, n: 1e-4 * draw.normal(0, 1, n),
    "far and close": lambda draw, n: 40 + 1e-4 * draw.integers(-5, 5, n),
    "tiny": lambda draw, n: 1e-30 * draw.normal(0, 1, n),
    "huge": lambda draw, n: 1e37 * draw.normal(0, 1, n),
    "every size": lambda draw, n: draw.choice([-1, 1], n) * 10.0 ** draw.uniform(-30, 30, n),
    "all alike": lambda draw, n: np.zeros(n),
    "two zeros": lambda draw, n: draw.choice([-0.0, 0.0, 1.0], n),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_auc_is_exact_on_hostile_scores(kind):
    """Out of batches on the devices, as a run makes it, and by the host alone; weighted, with padding of NaN."""
    draw, n = np.random.default_rng(1), 300
    score = HOSTILE[kind](draw, n).astype(np.float32)
    label, weight = (draw.random(n) < 0.3).astype(np.float64), draw.integers(0, 3, n).astype(np.float64)
    wanted = reference_auc(label, score.astype(np.float64), weight)
    assert area_under_curve_exact(label, score, weight) == pytest.approx(wanted, abs=1e-12)
    scores = Scores(n + 5)
    step = jax.jit(lambda x, at: {"logits": scores.sums(x, at, at >= 0)})
    parts = []
    for start in range(0, n, 64):
        at = np.where(np.arange(start, start + 64) < n, np.arange(start, start + 64), -1).astype(np.int32)
        parts.append(step(np.where(at >= 0, score[at], np.nan)[:, None].astype(np.float32), at))
    found = finalize(functools.reduce(merge, parts))["logits"]
    assert found.shape == (1, n + 5) and np.isnan(found[0, n:]).all()
    np.testing.assert_array_equal(found[0, :n], score)
    assert area_under_curve_exact(label, found[0, :n], weight) == pytest.approx(wanted, abs=1e-12)


def test_auc_of_what_is_no_number():
    label, of = np.array([0.0, 1, 0, 1]), lambda *x: np.array(x, np.float64)
    assert np.isnan(area_under_curve_exact(label, of(1, np.inf, 2, 3)))  # a broken model has no order
    scores = Scores(4)
    sums = scores.sums(jnp.asarray([[1.0], [jnp.nan], [2.0], [3.0]]), jnp.arange(4), jnp.ones(4, bool))
    assert np.isnan(area_under_curve_exact(label, finalize({"logits": sums})["logits"][0]))
    assert np.isnan(area_under_curve_exact(np.ones(3), of(1, 2, 3))) and np.isnan(area_under_curve_exact(of(), of()))
    assert area_under_curve_exact(of(0, 0, 1, 1), of(-3, -2, 2, 3)) == 1
    assert area_under_curve_exact(of(0, 1), of(1, -1)) == 0
