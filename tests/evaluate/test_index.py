"""The index against `top_k_unseen` of the whole score matrix, on one device and on meshes, and its recall.

Vectors here are small whole numbers, so that every product is exact: a matrix product may round otherwise where it is
cut otherwise, and ties would be noise.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxops.core.failures import UserError
from jaxops.core.mesh import make_mesh
from jaxops.evaluate import index
from jaxops.evaluate.index import Index
from jaxops.evaluate.ranking import top_k_unseen

ROWS, N_ITEMS, DIM, BATCH = 101, 97, 8, 16
LAYOUTS = [{}, {"data": 8}, {"replica": 2, "data": 2, "fsdp": 2}, {"data": 2, "tensor": 2}]
_top_k_unseen = jax.jit(top_k_unseen, static_argnums=(2, 3))


def mesh_of(layout):
    return make_mesh(**layout, devices=jax.devices()[: int(np.prod(list(layout.values()), initial=1))])


def case(seed=0, levels=3, seen=9):
    """Few levels make many equal scores, some of them -0.0; rows that are no items would win."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-levels, levels + 1, (ROWS, DIM)).astype(np.float32)
    queries = rng.integers(-levels, levels + 1, (BATCH, DIM)).astype(np.float32)
    vectors[0] = vectors[N_ITEMS + 1 :] = 100 * queries[0]
    return vectors, queries, rng.integers(0, N_ITEMS + 1, (BATCH, seen)).astype(np.int32)


def same(got, wanted):
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(np.signbit(ours), np.signbit(theirs))


@pytest.mark.latest
@pytest.mark.parametrize("method", ["auto", "approx"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_the_top_k_of_all_scores(layout, method):
    one = mesh_of(layout)
    for levels in (1, 3, 1000):
        vectors, queries, seen = case(levels, levels)
        found = Index(vectors, one, real=N_ITEMS, method=method).search(queries, 20, seen)
        same(found, _top_k_unseen(queries @ vectors.T, seen, 20, N_ITEMS))
        assert all(x.sharding.is_fully_replicated for x in found)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equal_scores_are_ordered_by_item_across_devices(layout):
    ones = np.ones((ROWS, DIM), np.float32)
    seen = np.array([[1, 2, 50, 50, 0]], np.int32)
    _, items = Index(ones, mesh_of(layout), real=N_ITEMS).search(ones[:1], 60, seen)
    assert items[0].tolist() == [i for i in range(3, 64) if i != 50]
    negative_zeros = np.where(np.arange(ROWS)[:, None] % 2, np.float32(0.0), np.float32(-0.0)) * ones
    scores, items = Index(negative_zeros, mesh_of(layout), real=N_ITEMS).search(ones[:1], 60, seen)
    assert items[0].tolist() == [i for i in range(3, 64) if i != 50] and not np.signbit(scores).any()


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_broken_seen_or_no_item_is_never_returned(layout, bad):
    vectors, queries, _ = case(levels=3)
    queries[:] = 1
    vectors[::5] = bad
    seen = np.tile(np.arange(1, N_ITEMS + 1, dtype=np.int32)[:80], (BATCH, 1))
    for k in (5, 30, 300):
        scores, items = (np.asarray(x) for x in Index(vectors, mesh_of(layout), real=N_ITEMS).search(queries, k, seen))
        same((scores, items), _top_k_unseen(queries @ vectors.T, seen, k, N_ITEMS))
        assert set(items.ravel().tolist()) <= {0, *(i for i in range(81, N_ITEMS + 1) if i % 5)}
        left = N_ITEMS - 80 - 3
        assert (items[:, left:] == 0).all() and np.isneginf(scores[:, left:]).all()


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_seen_may_be_missing_or_hold_what_is_no_item(layout):
    vectors, queries, _ = case()
    ours = Index(vectors, mesh_of(layout), real=N_ITEMS)
    plain = ours.search(queries, 7)
    same(plain, _top_k_unseen(queries @ vectors.T, np.zeros((BATCH, 1), np.int32), 7, N_ITEMS))
    odd = np.tile(np.array([-1, -ROWS, 0, ROWS, 104, 10**9, -(2**31)], np.int32), (BATCH, 1))
    same(ours.search(queries, 7, odd), plain)


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_items_by_mask(layout):
    vectors, queries, seen = case()
    mask = np.arange(ROWS) % 3 == 0
    scores = np.where(mask, queries @ vectors.T, np.nan).astype(np.float32)
    same(Index(vectors, mesh_of(layout), real=mask).search(queries, 9, seen), _top_k_unseen(scores, seen, 9, ROWS))


def test_vectors_and_queries_that_are_on_the_mesh_already():
    vectors, queries, seen = case()
    one = make_mesh(data=2, fsdp=4)
    wanted = Index(vectors, one, real=N_ITEMS).search(queries, 9, seen)
    replicated, divided = (NamedSharding(one, spec) for spec in (P(), P(("data", "fsdp"))))
    padded = np.pad(vectors, ((0, 3), (0, 0)))
    for held in (jax.device_put(vectors, replicated), jax.device_put(padded, divided), jnp.asarray(vectors)):
        ours = Index(held, one, real=N_ITEMS)
        same(ours.search(queries, 9, seen), wanted)
        with jax.set_mesh(one):
            same(ours.search(jax.device_put(queries, divided), 9, jnp.asarray(seen)), wanted)
    assert ours._vectors.sharding.spec == P(("data", "fsdp"))
    assert {shard.data.shape for shard in ours._vectors.addressable_shards} == {(13, DIM)}


def test_low_precision_vectors_add_up_in_float32():
    vectors, queries, seen = case(levels=2)
    low = vectors.astype(jnp.bfloat16)
    found = Index(low, make_mesh(data=8), real=N_ITEMS).search(queries, 9, seen)
    same(found, _top_k_unseen(queries @ vectors.T, seen, 9, N_ITEMS))


def test_vectors_of_a_model_are_found_as_on_one_device():
    """Not whole numbers: the scores may differ in the last bit, the items only where scores are as close as that."""
    rng = np.random.default_rng(4)
    vectors, queries = (rng.normal(size=(n, 64)).astype(np.float32) for n in (1003, BATCH))
    alone, many = (Index(vectors, mesh_of(layout), real=1000).search(queries, 50) for layout in LAYOUTS[:2])
    np.testing.assert_allclose(alone[0], many[0], rtol=1e-5)
    np.testing.assert_array_equal(alone[1], many[1])


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_recall_of_an_exact_and_of_a_crippled_method(layout, monkeypatch):
    vectors, queries, seen = case(levels=1000)
    ours = Index(vectors, mesh_of(layout), real=N_ITEMS, method="approx")
    assert ours.recall(queries, 10, seen) == 1.0  # off a TPU it is exact

    def crippled(scores, k, rows, recall_target):
        assert rows >= ROWS and recall_target == 0.95
        even = jnp.arange(scores.shape[1], dtype=jnp.int32)[None] % 2 == 0
        return index.exact(jnp.where(even, scores, -jnp.inf), k, rows, recall_target)

    monkeypatch.setitem(index.METHODS, "approx", crippled)
    ours = Index(vectors, mesh_of(layout), real=N_ITEMS, method="approx")
    found, wanted = (np.asarray(way.search(queries, 10, seen)[1]) for way in (ours, Index(vectors, ours.mesh, real=97)))
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), wanted.tolist(), strict=True)])
    assert 0.2 < share < 0.8 and ours.recall(queries, 10, seen) == pytest.approx(share)
    everything = np.tile(np.arange(ROWS, dtype=np.int32), (BATCH, 1))
    assert np.isnan(ours.recall(queries, 10, everything))


def test_the_method_knows_the_size_of_the_whole_catalogue(monkeypatch):
    asked = []

    def watched(scores, k, **options):
        asked.append((scores.shape[1], k, options))
        return jax.lax.top_k(scores, k)

    monkeypatch.setattr(jax.lax, "approx_max_k", watched)
    vectors, queries, seen = case()
    Index(vectors, make_mesh(data=8), real=N_ITEMS, method="approx", recall_target=0.9).search(queries, 20, seen)
    options = {"recall_target": 0.9, "reduction_input_size_override": 104, "aggregate_to_topk": True}
    assert asked == [(13, 13, options)]


def test_only_the_found_cross_devices():
    """No device gathers the vectors, or scores of more than its own rows."""
    vectors, queries, seen = case()
    ours = Index(vectors, make_mesh(data=8), real=N_ITEMS)
    search = functools.partial(ours._search, k=5, method="exact")
    with jax.set_mesh(ours.mesh):
        text = jax.jit(search).lower(ours._vectors, ours._real, queries, seen).compile().as_text()
    gathered = [line for line in text.splitlines() if " all-gather(" in line or " all-reduce(" in line]
    assert len(gathered) == 2 and all(f"[{BATCH},40]" in line or f"[{BATCH},5]" in line for line in gathered)
    assert f"[{ROWS + 3},{DIM}]" not in text and f"[{BATCH},{ROWS + 3}]" not in text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "exakt"}, "unknown method 'exakt'; did you mean 'exact'"),
        ({"recall_target": 1.0}, "recall_target 1.0 is not between 0 and 1"),
        ({"real": ROWS}, "101 items need 102 rows"),
        ({"real": np.ones(ROWS + 1, bool)}, r"`real` has the shape \(102,\)"),
    ],
)
def test_mistakes_are_told(options, told):
    with pytest.raises(UserError, match=told):
        Index(case()[0], make_mesh(data=8), **{"real": N_ITEMS, **options})


def test_queries_that_do_not_fit():
    vectors, queries, _ = case()
    ours = Index(vectors, make_mesh(data=8), real=N_ITEMS)
    with pytest.raises(UserError, match="queries are 7 wide, the vectors 8"):
        ours.search(queries[:, 1:], 5)
    with pytest.raises(UserError, match="cannot search for 0 items"):
        ours.search(queries, 0)
