"""Coverage: the share of the catalogue that anyone is recommended, by loops, merged and beside the other metrics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxops.core.failures import UserError
from jaxops.core.mesh import batch_sharding, make_mesh
from jaxops.core.sums import finalize, merge
from jaxops.evaluate.baselines import evaluate_baseline
from jaxops.evaluate.ranking import coverage_sums, evaluate_scores, parse_metric, ranking_sums

N_ITEMS, VOCAB, BATCH = 60, 64, 24
NAMES = ["coverage@1", "ndcg@10", "coverage@7", "sampled_hr@5"]
_evaluate = jax.jit(lambda scores, batch: evaluate_scores(scores, batch, NAMES, n_items=N_ITEMS))


def case(seed=0):
    """Scores that favour few items; the padding columns would win."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(BATCH, VOCAB)) + 2 * rng.normal(size=VOCAB)
    scores[:, 0] = scores[:, N_ITEMS + 1 :] = 99.0
    batch = {
        "target": rng.integers(1, N_ITEMS + 1, BATCH).astype(np.int32),
        "seen": rng.integers(0, N_ITEMS + 1, (BATCH, 6)).astype(np.int32),
        "id": np.arange(BATCH, dtype=np.int32),
        "weight": (np.arange(BATCH) < BATCH - 5).astype(np.float32),
    }
    return scores.astype(np.float32), batch


def oracle(scores, batch, k):
    shown = set()
    for row, seen, weight in zip(scores, batch["seen"], batch["weight"], strict=True):
        left = [i for i in range(1, N_ITEMS + 1) if i not in set(seen.tolist())]
        shown |= set(sorted(left, key=lambda i: -row[i])[:k]) if weight else set()
    return len(shown) / N_ITEMS


@pytest.mark.latest
@pytest.mark.parametrize("seed", range(3))
def test_coverage_equals_a_loop(seed):
    scores, batch = case(seed)
    found = finalize(_evaluate(scores, batch))
    assert set(found) == set(NAMES)
    for k in (1, 7):
        wanted = oracle(scores, batch, k)
        assert 0 < wanted < 1 and found[f"coverage@{k}"] == pytest.approx(wanted)


def test_any_cut_and_a_mesh_merge_to_the_same():
    scores, batch = case()
    whole = finalize(_evaluate(scores, batch))
    cut = lambda at: (scores[at : at + 8], {name: x[at : at + 8] for name, x in batch.items()})
    assert finalize(functools.reduce(merge, (_evaluate(*cut(at)) for at in range(0, BATCH, 8)))) == pytest.approx(whole)
    mesh = make_mesh(data=8)
    with jax.set_mesh(mesh):
        divided = jax.jit(jax.sharding.auto_axes(_evaluate, out_sharding=P()))
        sums = divided(*jax.device_put((scores, batch), batch_sharding(mesh)))
    assert finalize(sums) == pytest.approx(whole)


def test_everything_nothing_and_more_than_there_is():
    scores, batch = case()
    batch["seen"] = np.zeros((BATCH, 0), np.int32)
    covered = jax.jit(lambda s, h, w: coverage_sums(s, h, w, ["coverage@1000000"], n_items=N_ITEMS))
    ones = np.ones(BATCH, np.float32)
    assert finalize(covered(scores, batch["seen"], ones)) == {"coverage@1000000": 1.0}
    assert finalize(covered(scores, batch["seen"], 0 * ones)) == {"coverage@1000000": 0.0}
    assert finalize(covered(np.full_like(scores, np.nan), batch["seen"], ones)) == {"coverage@1000000": 0.0}


def test_ranks_do_not_tell_coverage():
    with pytest.raises(ValueError, match="'coverage@5' needs scores"):
        ranking_sums(jnp.zeros(2, jnp.int32), jnp.ones(2), ["coverage@5"])
    items, offsets, ends = np.array([1, 2, 3, 1, 2]), np.array([0, 3, 5]), np.array([2, 1])
    values = evaluate_baseline(
        "most_popular", items, offsets, ends, np.arange(2), ends, items[[2, 4]], ["coverage@5", "hr@5"], n_items=4
    )
    assert values == {"coverage@5": 0.75, "hr@5": 1.0}  # all but item 1, which both know


@pytest.mark.parametrize("name", ["coverage", "coverage@0", "covrage@10", "Coverage@10"])
def test_unknown_names_are_told_the_nearest(name):
    with pytest.raises(UserError, match=r"did you mean 'coverage@10'.* and coverage@K, the share of the catalogue"):
        parse_metric(name)
    with pytest.raises(UserError, match="unknown metric 'sampled_coverage@10'"):
        parse_metric("sampled_coverage@10")
    assert parse_metric("coverage@10").kind == "coverage"
