"""Baselines against brute force in dense float64, and their rank rule against that of the model."""

import jax
import numpy as np
import pytest

from jaxops.core.failures import UserError
from jaxops.core.sums import finalize
from jaxops.evaluate import baselines
from jaxops.evaluate.baselines import coverage, evaluate_baseline, item_similarity, prefixes, ranks_of
from jaxops.evaluate.ranking import UNRANKED, coverage_sums, ranking_sums, target_ranks

N_ITEMS = 40
_target_ranks = jax.jit(target_ranks, static_argnames="n_items")
_ranking_sums = jax.jit(ranking_sums, static_argnums=2)
METRICS = ["hr@10", "ndcg@10", "mrr@10"]


def learnt(items, offsets, train_end):
    return prefixes(items, offsets, np.arange(len(train_end)), train_end, n_items=N_ITEMS)


def queries(items, offsets, history):
    """One query of each user: its number of events before the target, and the target."""
    return np.arange(len(history)), history, items[offsets[:-1] + history]


@pytest.fixture
def data():
    """60 users with skewed tastes and repeated items; the last two events of each are held out."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, N_ITEMS + 1)
    sequences = [rng.choice(N_ITEMS, rng.integers(3, 20), p=share / share.sum()) + 1 for _ in range(60)]
    items = np.concatenate(sequences).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64)
    return items, offsets, np.diff(offsets) - 2


def brute_knn(items, offsets, train_end, neighbours, shrinkage):
    """Dense similarities, nearest kept, by loops."""
    users = len(train_end)
    binary = np.zeros((users, N_ITEMS + 1))
    for u in range(users):
        binary[u, items[offsets[u] : offsets[u] + train_end[u]]] = 1
    count = binary.sum(0)
    shared = binary.T @ binary
    similar = shared / (np.sqrt(np.outer(count, count)) + shrinkage + (shrinkage == 0) * (shared == 0))
    np.fill_diagonal(similar, 0)
    for row in similar:
        row[np.argsort(-row, kind="stable")[neighbours:]] = 0
    return similar


@pytest.mark.parametrize("neighbours", [1, 5, 100])
@pytest.mark.parametrize("shrinkage", [0.0, 10.0])
@pytest.mark.parametrize("cells", [2**23, 200])
def test_similarity_equals_brute_force(data, neighbours, shrinkage, cells, monkeypatch):
    monkeypatch.setattr(baselines, "BLOCK_CELLS", cells)
    got = item_similarity(learnt(*data), neighbours=neighbours, shrinkage=shrinkage).toarray()
    np.testing.assert_allclose(got, brute_knn(*data, neighbours, shrinkage), rtol=1e-12)


@pytest.mark.latest
@pytest.mark.parametrize("repeats", ["exclude", "allow"])
@pytest.mark.parametrize("cells", [2**23, 200])
def test_item_knn_equals_brute_force(data, cells, repeats, monkeypatch):
    monkeypatch.setattr(baselines, "BLOCK_CELLS", cells)
    items, offsets, train_end = data
    asked = queries(items, offsets, train_end + 1)
    similar = brute_knn(items, offsets, train_end, 100, 10.0)
    ranks = []
    for u in range(60):
        history, target = items[offsets[u] : offsets[u + 1] - 1], items[offsets[u + 1] - 1]
        scores = similar[history].sum(0).round(12)
        if repeats == "exclude" and target in history:
            continue
        left = np.array([i for i in range(1, N_ITEMS + 1) if repeats == "allow" or i not in set(history)])
        ranks.append(np.flatnonzero(left[np.argsort(-scores[left], kind="stable")] == target)[0])
    ranks = np.array(ranks)
    assert len(ranks) == 60 if repeats == "allow" else 20 < len(ranks) < 60
    got = evaluate_baseline("item_knn", items, offsets, train_end, *asked, METRICS, n_items=N_ITEMS, repeats=repeats)
    assert got == pytest.approx(
        {
            "hr@10": np.mean(ranks < 10),
            "ndcg@10": np.mean(np.where(ranks < 10, 1 / np.log2(ranks + 2), 0)),
            "mrr@10": np.mean(np.where(ranks < 10, 1 / (ranks + 1), 0)),
        },
        rel=1e-6,
    )


def test_most_popular_by_hand():
    items = np.array([1, 2, 3, 2, 3, 4, 3, 2, 2, 1], np.int32)
    offsets = np.array([0, 4, 7, 10], np.int64)
    train_end = np.array([2, 1, 2], np.int64)
    train = prefixes(items, offsets, np.arange(3), train_end, n_items=5)
    assert train.toarray().tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 2, 0, 0, 0]]
    asked = queries(items, offsets, train_end)
    assert asked[2].tolist() == [3, 4, 1]
    # Left for them, best first: 3 4 5 | 2 1 4 5 | 1 3 4 5, so the ranks are 0, 2, 0.
    names = ["hr@1", "mrr@9", "ndcg@3"]
    got = evaluate_baseline("most_popular", items, offsets, train_end, *asked, names, n_items=5)
    assert got == pytest.approx({"hr@1": 2 / 3, "mrr@9": (2 + 1 / 3) / 3, "ndcg@3": 2.5 / 3}, rel=1e-6)


@pytest.mark.parametrize("levels", [1, 2, 1000])
def test_rank_rule_equals_that_of_the_model(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, (50, N_ITEMS + 1)).astype(np.float64)
    scores[3, 5] = np.inf
    target = rng.integers(0, N_ITEMS + 2, 50)
    target[3] = 5
    seen = rng.integers(0, N_ITEMS + 1, (50, 8)).astype(np.int32)
    history = prefixes(seen.ravel(), np.arange(51) * 8, np.arange(50), np.full(50, 8), n_items=N_ITEMS)
    host = ranks_of(lambda block: scores[block].copy(), history, target, n_items=N_ITEMS)
    device = _target_ranks(scores.astype(np.float32), target.astype(np.int32), seen, n_items=N_ITEMS)
    np.testing.assert_array_equal(host, np.asarray(device))
    assert host[3] == UNRANKED
    on_device = finalize(_ranking_sums(device, np.ones(50, np.float32), tuple(METRICS)))
    from_host = {name: float(np.mean(baselines.parse_metric(name).gain(host))) for name in METRICS}
    assert from_host == pytest.approx(on_device, rel=1e-6)


def test_only_train_events_are_learnt_from(data):
    items, offsets, train_end = data
    user, history, target = queries(items, offsets, train_end)
    held_out = np.concatenate([[end - 2, end - 1] for end in offsets[1:]])
    other = items.copy()
    other[held_out] = (other[held_out] + 6) % N_ITEMS + 1
    for name in baselines.BASELINES:
        rest = (offsets, train_end, user, history, target, METRICS)
        assert evaluate_baseline(name, items, *rest, n_items=N_ITEMS) == evaluate_baseline(
            name, other, *rest, n_items=N_ITEMS
        )


def test_read_only_arrays_of_small_types_do(data):
    items, offsets, train_end = data
    user, history, target = queries(items, offsets, train_end)
    expected = evaluate_baseline("item_knn", *data, user, history, target, METRICS, n_items=N_ITEMS)
    small = (items.astype(np.int16), offsets, train_end, user.astype(np.int32), history, target)
    for array in small:
        array.setflags(write=False)
    assert evaluate_baseline("item_knn", *small, METRICS, n_items=N_ITEMS) == expected


def test_sampled_metrics_are_left_out_and_no_query_is_nan(data):
    nothing = [np.zeros(0, np.int64)] * 3
    got = evaluate_baseline("item_knn", *data, *nothing, ["sampled_hr@10", "hr@10"], n_items=N_ITEMS)
    assert list(got) == ["hr@10"] and np.isnan(got["hr@10"])


def test_unknown_baseline_is_told_the_nearest(data):
    asked = queries(*data[:2], data[2])
    with pytest.raises(UserError, match="unknown baseline 'item_nn'; did you mean 'item_knn'"):
        evaluate_baseline("item_nn", *data, *asked, METRICS, n_items=N_ITEMS)


@pytest.mark.parametrize("levels", [2, 5, 10**6])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_coverage_equals_that_of_the_model(levels, k, monkeypatch):
    monkeypatch.setattr(baselines, "BLOCK_CELLS", 40)  # several blocks
    n_items, rng = 12, np.random.default_rng(levels)
    scores = rng.integers(0, levels, (7, n_items + 1)).astype(np.float64)
    past = np.array([[1, 2, 0], [3, 3, 0], [0, 0, 0], [12, 1, 5], [4, 0, 0], [2, 9, 11], [7, 8, 0]], np.int32)
    seen = prefixes(past.reshape(-1), np.arange(8) * 3, np.arange(7), np.full(7, 3), n_items=n_items)
    ones = np.ones(7, np.float32)
    name = f"coverage@{k}"
    some = np.array([1, 0, 0, 1, 1, 0, 1], bool)

    def of(keep):
        given = (jax.numpy.asarray(part[keep]) for part in (scores.astype(np.float32), past, ones))
        return finalize(coverage_sums(*given, [name], n_items=n_items))[name]

    masks = np.stack([np.ones(7, bool), some, np.zeros(7, bool)])
    found = coverage(lambda block: scores[block].copy(), seen, k, masks, n_items=n_items)
    assert found == pytest.approx([of(slice(None)), of(some), 0])


def test_a_baseline_has_its_coverage(data):
    items, offsets, train_end, *_ = data
    user, history, target = queries(items, offsets, train_end)
    found = evaluate_baseline(
        "most_popular",
        items,
        offsets,
        train_end,
        user,
        history,
        target,
        ["hr@3", "coverage@3"],
        n_items=N_ITEMS,
    )
    assert 0 < found["coverage@3"] < 0.5 and 0 <= found["hr@3"] <= 1


def test_a_slice_is_what_its_queries_alone_give(data):
    items, offsets, train_end = data
    user, history, target = queries(items, offsets, train_end)
    metrics, some = [*METRICS, "coverage@3"], target % 3 == 0
    of = lambda keep, slices=None: evaluate_baseline(
        "item_knn", *data, user[keep], history[keep], target[keep], metrics, n_items=N_ITEMS, slices=slices
    )
    found = of(slice(None), {"third": some, "nobody": np.zeros(len(user), bool)})
    assert {name: found[name] for name in metrics} == pytest.approx(of(slice(None)))
    assert {name: found[f"{name}[third]"] for name in metrics} == pytest.approx(of(some))
    assert 0 < some.sum() < len(some) and all(np.isnan(found[f"{name}[nobody]"]) for name in METRICS)
    assert found["coverage@3[nobody]"] == 0
