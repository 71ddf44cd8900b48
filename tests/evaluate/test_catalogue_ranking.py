"""Ranks and metrics against numpy float64: ties, seen items, padding, non-finite scores, meshes, merging."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxops.core.failures import UserError
from jaxops.core.sums import finalize, merge
from jaxops.evaluate import ranking
from jaxops.evaluate.ranking import (
    UNRANKED,
    evaluate_scores,
    parse_metric,
    ranking_sums,
    sampled_ranks,
    target_ranks,
    top_k_unseen,
)

N_ITEMS = 23
VOCAB = 32


def oracle_rank(scores, target, seen, n_items):
    """Place of the target in a stable descending argsort of what is left, in float64."""
    scores = np.asarray(scores, np.float64)
    left = [i for i in range(1, n_items + 1) if i == target or i not in set(seen)]
    order = np.argsort(-scores[left], kind="stable")
    return int(np.flatnonzero(np.asarray(left)[order] == target)[0])


def random_case(rng, batch=64, seen=9, values=None):
    shape = (batch, VOCAB)
    scores = rng.normal(size=shape) if values is None else rng.choice(values, size=shape)
    # Padding columns hold the best scores of all: leaving them in would show.
    scores[:, 0] = scores[:, N_ITEMS + 1 :] = 9.0
    return (
        scores.astype(np.float32),
        rng.integers(1, N_ITEMS + 1, batch).astype(np.int32),
        rng.integers(0, N_ITEMS + 1, (batch, seen)).astype(np.int32),
    )


_target_ranks = jax.jit(target_ranks, static_argnames="n_items")
_sampled_ranks = jax.jit(sampled_ranks, static_argnames="n_items")
_top_k_unseen = jax.jit(top_k_unseen, static_argnums=(2, 3))
_ranking_sums = jax.jit(ranking_sums, static_argnums=2)


def ranks_of(scores, target, seen):
    return np.asarray(_target_ranks(scores, target, seen, n_items=N_ITEMS))


def sampled_ranks_of(scores, target, seen, ids):
    return np.asarray(_sampled_ranks(scores, target, seen, ids, n_items=N_ITEMS))


@functools.cache
def evaluator(*names):
    return jax.jit(lambda scores, batch: evaluate_scores(scores, batch, names, n_items=N_ITEMS))


@pytest.mark.latest
@pytest.mark.parametrize("values", [None, [0.0, 1.0], [0.5], [-0.0, 0.0], [-1.0, 0.0, 1.0, 2.0]])
def test_ranks_equal_a_stable_argsort(values):
    scores, target, seen = random_case(np.random.default_rng(0), values=values)
    ranks = ranks_of(scores, target, seen)
    assert ranks.dtype == np.int32
    rows = zip(scores, target, seen, strict=True)
    assert ranks.tolist() == [oracle_rank(s, t, h, N_ITEMS) for s, t, h in rows]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_ranks_equal_a_stable_argsort_on_coarse_scores(seed, levels):
    rng = np.random.default_rng(seed)
    scores, target, seen = random_case(rng, batch=8, values=np.linspace(-1, 1, levels))
    rows = zip(scores, target, seen, strict=True)
    assert ranks_of(scores, target, seen).tolist() == [oracle_rank(s, t, h, N_ITEMS) for s, t, h in rows]


def test_constant_scores_rank_by_item_index():
    target = np.arange(1, N_ITEMS + 1, dtype=np.int32)
    scores = np.full((N_ITEMS, VOCAB), 3.25, np.float32)
    none_seen = np.zeros((N_ITEMS, 4), np.int32)
    assert ranks_of(scores, target, none_seen).tolist() == list(range(N_ITEMS))
    seen = np.tile(np.array([[1, 2, 2, 0]], np.int32), (N_ITEMS, 1))
    assert ranks_of(scores, target, seen).tolist() == [0, 0, *range(N_ITEMS - 2)]


def test_repeated_seen_items_are_removed_once_and_a_seen_target_stays():
    scores = np.arange(VOCAB, dtype=np.float32)[None]
    rank = lambda target, seen: ranks_of(scores, np.array([target], np.int32), np.array([seen], np.int32))[0]
    assert rank(20, [0, 0, 0, 0]) == 3
    assert rank(20, [23, 23, 23, 0]) == 2
    assert rank(20, [20, 23, 20, 22]) == 1
    assert rank(20, [1, 2, 3, 4]) == 3


def test_no_history_at_all():
    scores, target, _ = random_case(np.random.default_rng(1))
    seen = np.zeros((64, 0), np.int32)
    rows = zip(scores, target, strict=True)
    assert ranks_of(scores, target, seen).tolist() == [oracle_rank(s, t, [], N_ITEMS) for s, t in rows]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_target_without_a_finite_score_never_hits(bad):
    scores, target, seen = random_case(np.random.default_rng(2))
    scores[np.arange(64), target] = bad
    ranks = ranks_of(scores, target, seen)
    assert (ranks == UNRANKED).all()
    values = finalize(_ranking_sums(ranks, np.ones(64, np.float32), ("hr@1000000", "ndcg@10", "mrr@10")))
    assert set(values.values()) == {0.0}


def test_all_nan_scores_give_zero_metrics_and_nan_rivals_count_as_ahead():
    _, target, seen = random_case(np.random.default_rng(3))
    assert (ranks_of(np.full((64, VOCAB), np.nan, np.float32), target, seen) == UNRANKED).all()
    scores = np.zeros((1, VOCAB), np.float32)
    scores[0, [3, 4, 5]] = np.nan
    none_seen, seen = np.zeros((1, 2), np.int32), np.array([[4, 0]], np.int32)
    first = np.array([1], np.int32)
    assert ranks_of(scores, first, none_seen)[0] == 3
    assert ranks_of(scores, first, seen)[0] == 2


@pytest.mark.parametrize("target", [0, -1, N_ITEMS + 1, VOCAB, VOCAB + 5])
def test_a_target_outside_the_catalogue_never_hits(target):
    scores = np.full((1, VOCAB), 1.0, np.float32)
    none_seen = np.zeros((1, 2), np.int32)
    assert ranks_of(scores, np.array([target], np.int32), none_seen)[0] == UNRANKED


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_ties_are_ties(dtype):
    scores, target, seen = random_case(np.random.default_rng(4))
    low = jnp.asarray(scores).astype(dtype)
    rounded = np.asarray(low.astype(jnp.float32))
    rows = zip(rounded, target, seen, strict=True)
    assert ranks_of(low, target, seen).tolist() == [oracle_rank(s, t, h, N_ITEMS) for s, t, h in rows]


def test_scores_computed_in_the_same_program_tie_exactly():
    rng = np.random.default_rng(5)
    hidden = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
    table = jnp.tile(jnp.asarray(rng.normal(size=(1, 8)), jnp.float32), (VOCAB, 1))
    target = jnp.full(16, N_ITEMS, jnp.int32)

    @jax.jit
    def ranks(hidden, table):
        logits = (hidden @ table.T).astype(jnp.bfloat16) * jnp.bfloat16(0.3) + jnp.bfloat16(0.1)
        return target_ranks(logits, target, jnp.zeros((16, 1), jnp.int32), n_items=N_ITEMS)

    assert np.asarray(ranks(hidden, table)).tolist() == [N_ITEMS - 1] * 16


@pytest.mark.latest
@pytest.mark.parametrize("spec", [P("data", "tensor"), P(None, "tensor")])
def test_same_metrics_on_a_mesh_under_auto_axes(spec):
    """Under auto_axes, as the loop runs it, with the scores sharded over users and over the vocabulary."""
    scores, target, seen = random_case(np.random.default_rng(6))
    names = ["hr@5", "ndcg@10", "mrr@10", "sampled_ndcg@10"]
    batch = {
        "target": target,
        "seen": seen,
        "id": np.arange(64, dtype=np.int32),
        "weight": np.ones(64, np.float32),
    }
    alone = finalize(evaluator(*names)(scores, batch))
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(scores, NamedSharding(mesh, spec))
        rows = {k: jax.device_put(v, NamedSharding(mesh, P(spec[0]))) for k, v in batch.items()}
        score = lambda s, b: evaluate_scores(s, b, names, n_items=N_ITEMS)
        sums = jax.jit(jax.sharding.auto_axes(score, out_sharding=P()))(placed, rows)
        best, items = jax.jit(jax.sharding.auto_axes(lambda s, h: top_k_unseen(s, h, 5, N_ITEMS), out_sharding=P()))(
            placed, rows["seen"]
        )
    assert finalize(sums) == pytest.approx(alone, abs=1e-6)
    expected = _top_k_unseen(scores, seen, 5, N_ITEMS)
    np.testing.assert_array_equal(items, expected[1])
    np.testing.assert_array_equal(best, expected[0])


@pytest.mark.latest
def test_metrics_equal_float64():
    rng = np.random.default_rng(7)
    ranks, weight = rng.integers(0, 30, 200), rng.integers(0, 2, 200).astype(np.float64)
    names = ("hr@10", "recall@10", "hr@1", "ndcg@10", "ndcg@5", "mrr@10")
    got = finalize(_ranking_sums(ranks.astype(np.int32), weight.astype(np.float32), names))
    mean = lambda gain: float(np.sum(gain * weight) / np.sum(weight))
    assert got == pytest.approx(
        {
            "hr@10": mean(ranks < 10),
            "recall@10": mean(ranks < 10),
            "hr@1": mean(ranks < 1),
            "ndcg@10": mean(np.where(ranks < 10, 1 / np.log2(ranks + 2), 0)),
            "ndcg@5": mean(np.where(ranks < 5, 1 / np.log2(ranks + 2), 0)),
            "mrr@10": mean(np.where(ranks < 10, 1 / (ranks + 1), 0)),
        },
        rel=1e-6,
    )


def test_metrics_merge_over_batches_and_padding_is_invisible():
    scores, target, seen = random_case(np.random.default_rng(8))
    ids, weight = np.arange(64, dtype=np.int32), np.ones(64, np.float32)
    names = ["hr@3", "ndcg@10", "sampled_mrr@10"]
    batch = {"target": target, "seen": seen, "id": ids, "weight": weight}
    whole = finalize(evaluator(*names)(scores, batch))
    merged = None
    for start in (0, 25, 50):
        take = np.minimum(np.arange(start, start + 25), 63)
        part = {k: v[take] for k, v in batch.items()}
        part["weight"] = (np.arange(start, start + 25) < 64).astype(np.float32)
        padded = np.where(part["weight"][:, None] > 0, scores[take], np.nan).astype(np.float32)
        sums = evaluator(*names)(padded, part)
        merged = sums if merged is None else merge(merged, sums)
    assert finalize(merged) == pytest.approx(whole, abs=1e-6)


def test_sampled_negatives_are_uniform_over_unseen_items():
    """A target that beats every item up to 12: its rank is the number of draws above 12, a binomial mean."""
    scores = np.tile(np.arange(VOCAB, dtype=np.float32), (4000, 1))
    target = np.full(4000, 12, np.int32)
    seen = np.tile(np.array([[1, 5, 5, 20, 23, 0]], np.int32), (4000, 1))
    ids = np.arange(4000, dtype=np.int32)
    ranks = sampled_ranks_of(scores, target, seen, ids)
    free = sorted(set(range(1, N_ITEMS + 1)) - {1, 5, 20, 23, 12})
    p = sum(i > 12 for i in free) / len(free)
    deviation = np.sqrt(100 * p * (1 - p))
    assert abs(ranks.mean() - 100 * p) < 4 * deviation / np.sqrt(len(ranks))
    assert abs(ranks.std() - deviation) < 0.1 * deviation


def test_sampled_negatives_never_hold_the_target_or_a_seen_item(monkeypatch):
    """Only the target and seen items score above the rest, so any of them drawn would raise the rank."""
    rng = np.random.default_rng(9)
    _, target, seen = random_case(rng)
    scores = np.zeros((64, VOCAB), np.float32)
    np.put_along_axis(scores, seen, 2.0, axis=1)
    scores[np.arange(64), target] = 1.0
    scores[:, 0] = scores[:, N_ITEMS + 1 :] = 9.0
    ids = np.arange(64, dtype=np.int32)
    assert (sampled_ranks_of(scores, target, seen, ids) == 0).all()


@pytest.mark.latest
def test_sampled_draws_follow_the_example_id_alone():
    scores, target, seen = random_case(np.random.default_rng(10))
    ids = np.arange(64, dtype=np.int32) + 1000
    ranks = sampled_ranks_of(scores, target, seen, ids)
    order = np.random.default_rng(0).permutation(64)
    wide = np.pad(scores[order], ((0, 0), (0, 16)), constant_values=7.0)
    moved = sampled_ranks_of(wide, target[order], seen[order], ids[order])
    np.testing.assert_array_equal(moved, ranks[order])
    other = sampled_ranks_of(scores, target, seen, ids + 1)
    assert (other != ranks).any()


def test_sampled_ranks_of_a_user_who_has_seen_everything():
    scores = np.zeros((1, VOCAB), np.float32)
    seen = np.arange(1, N_ITEMS + 1, dtype=np.int32)[None]
    one = np.array([3], np.int32)
    assert sampled_ranks_of(scores, one, seen, one).tolist() == [0]


def test_sampled_names_need_sampled_ranks():
    with pytest.raises(ValueError, match="sampled_hr@10"):
        ranking_sums(jnp.zeros(2, jnp.int32), jnp.ones(2), ["sampled_hr@10"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ndgc@10", "did you mean 'ndcg@10'"),
        ("NDCG@20", "did you mean 'ndcg@20'"),
        ("recal@50", "did you mean 'recall@50'"),
        ("hr10", "did you mean 'hr@10'"),
        ("sampled_ndgc@10", "did you mean 'sampled_ndcg@10'"),
        ("ndcg", "did you mean 'ndcg@10'"),
        ("hr@0", "hr@K"),
        ("hr@-1", "hr@K"),
        ("mrr@1.5", "mrr@K"),
        ("auc", "known are hr@K"),
        ("", "known are hr@K"),
    ],
)
def test_unknown_names_are_told_the_nearest(name, hint):
    with pytest.raises(UserError, match="unknown metric") as caught:
        parse_metric(name)
    assert hint in str(caught.value)


def test_names_parse():
    metric = parse_metric("sampled_recall@100")
    assert (metric.kind, metric.k, metric.sampled) == ("recall", 100, True)


@pytest.mark.latest
@pytest.mark.parametrize("values", [None, [0.0, -0.0, 1.0]])
def test_top_k_equals_a_stable_argsort_of_unseen_items(values):
    scores, _, seen = random_case(np.random.default_rng(11), values=values)
    best, items = _top_k_unseen(scores, seen, 7, N_ITEMS)
    for row in range(64):
        left = np.array([i for i in range(1, N_ITEMS + 1) if i not in set(seen[row])])
        order = left[np.argsort(-scores[row, left].astype(np.float64), kind="stable")][:7]
        assert np.asarray(items)[row].tolist() == order.tolist()
        np.testing.assert_array_equal(np.asarray(best)[row], scores[row, order])


def test_top_k_agrees_with_the_rank():
    scores, target, seen = random_case(np.random.default_rng(12), values=[0.0, 1.0, 2.0])
    seen = np.where(seen == target[:, None], 0, seen)
    _, items = _top_k_unseen(scores, seen, N_ITEMS, N_ITEMS)
    place = np.argmax(np.asarray(items) == target[:, None], axis=1)
    np.testing.assert_array_equal(place, ranks_of(scores, target, seen))


def test_top_k_returns_nothing_seen_or_broken_when_few_are_left():
    scores = np.ones((2, VOCAB), np.float32)
    scores[1, 3] = np.nan
    seen = np.zeros((2, N_ITEMS - 2), np.int32)
    seen[:, :] = np.arange(4, N_ITEMS + 2)[None, : N_ITEMS - 2]
    seen[seen > N_ITEMS] = 0
    best, items = _top_k_unseen(scores, seen, 40, N_ITEMS)
    assert np.asarray(items).shape == np.asarray(best).shape == (2, 40)
    assert np.asarray(items)[:, :4].tolist() == [[1, 2, 3, 0], [1, 2, 0, 0]]
    assert (np.asarray(items)[:, 3:] == 0).all() and np.isneginf(np.asarray(best)[:, 3:]).all()


def test_default_number_of_negatives_is_what_the_docs_say():
    assert ranking.SAMPLED_NEGATIVES == 100
