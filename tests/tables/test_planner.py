"""What a plan says, against the ids it was made from; and the rules of rows against dense Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxops.core.failures import UserError
from jaxops.core.mesh import make_mesh
from jaxops.data.loader import Loader
from jaxops.tables.optimizers import LazyAdam, SparseAdam, clip_rows
from jaxops.tables.planner import Planner, passes_needed, wider
from jaxops.tables.spec import GROUPS, TableSpec
from jaxops.tables.tables import EmbeddingTables, _width

SPEC = TableSpec(rows=5000, dim=4, features=("a", "b"), placement="row")


def ids(seed, *shape):
    return np.random.default_rng(seed).integers(-1, 5000, shape).astype(np.int32)


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_every_id_finds_its_row(shards):
    batch = {"a": ids(0, 16, 7), "b": ids(1, 16)}
    planned = Planner({"t": SPEC}, shards, 16 // shards, {"t": 10**6})(batch)
    stored = planned["plan"]["t"]["stored"]
    assert stored.shape == (shards, 16 // shards * 8) and stored.dtype == np.int32
    for one in stored:
        read = one[one >= 0]
        assert np.array_equal(read, np.unique(read)) and np.all(one[len(read) :] == -1)
    for name, asked in batch.items():
        slots = planned["slots"][name].reshape(shards, -1)
        found = np.where(slots < 0, -1, np.take_along_axis(stored, np.maximum(slots, 0), 1))
        assert np.array_equal(found, SPEC.stored(asked).reshape(shards, -1))


def test_a_plan_is_as_wide_as_its_distinct_rows_need():
    spec = TableSpec(rows=5000, dim=4, features=("a",), placement="row")
    planner = Planner({"t": spec}, 2, 4, {"t": 10**6}, {"t": 8})
    full = Planner({"t": spec}, 2, 4, {"t": 10**6})
    steps = [8, wider(8), wider(wider(8))]
    for distinct, width in [(1, 8), (8, 8), (9, steps[1]), (steps[1], steps[1]), (steps[1] + 1, steps[2])]:
        batch = {"a": (np.arange(8 * 100) % distinct).reshape(8, 100)}
        batch["a"][4:] = -1  # the widest shard decides
        narrow, wide = planner(batch), full(batch)
        stored = narrow["plan"]["t"]["stored"]
        assert stored.shape == (2, width) and wide["plan"]["t"]["stored"].shape == (2, 400)
        assert np.array_equal(stored, wide["plan"]["t"]["stored"][:, :width])
        assert np.all(wide["plan"]["t"]["stored"][:, width:] == -1)
        assert np.array_equal(narrow["slots"]["a"], wide["slots"]["a"])


def test_ids_that_repeat_make_a_narrow_plan():
    batch = {"a": np.zeros((16, 50), np.int32), "b": np.ones(16, np.int32)}
    tables = EmbeddingTables({"t": SPEC}, make_mesh(data=8), batch)
    assert tables.plan(batch)["plan"]["t"]["stored"].shape == (8, wider(2))


@pytest.mark.parametrize("rows, ids, several, wanted", [
    (5000, 400, False, wider(2)),  # as the first batch needs
    (5000, 400, True, 400),  # whatever a batch may need
    (50, 400, True, 50),
    (50, 400, False, wider(2)),
    (3, 400, False, 3),
    (5000, 8, False, 8),
])  # fmt: skip
def test_plans_begin_as_wide_as_they_are_known_to_need(rows, ids, several, wanted):
    spec = TableSpec(rows=rows, dim=4, features=("a",), placement="replicated")
    first = np.full((2, ids), -1, np.int32)
    first[:, :2] = [0, 1]
    assert _width(spec, first, several) == wanted


def test_a_part_of_the_shards_is_planned_as_in_the_whole():
    batch = {"a": ids(0, 16, 7), "b": ids(1, 16)}
    planner = Planner({"t": SPEC}, 8, 2, {"t": 10})
    whole, part = planner(batch), planner({k: v[4:8] for k, v in batch.items()})
    assert np.array_equal(whole["plan"]["t"]["stored"][2:4], part["plan"]["t"]["stored"])
    assert np.array_equal(whole["plan"]["t"]["passes"][2:4], part["plan"]["t"]["passes"])
    assert np.array_equal(whole["slots"]["a"][4:8], part["slots"]["a"])
    with pytest.raises(UserError, match="3 examples are not whole batch shards of 2"):
        planner({k: v[:3] for k, v in batch.items()})


def test_the_input_workers_plan():
    class Source:
        examples = 64

        def batch(self, cursor, size):
            return {"a": ids(cursor, size, 3), "b": ids(cursor + 1, size)}

    planner = Planner({"t": SPEC}, 4, 4, {"t": 100})
    with Loader(Source(), 0, 16, finish=planner) as loader:
        for cursor in (0, 16):
            found, wanted = next(loader), planner(Source().batch(cursor, 16))
            jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_rows_are_each_stored_once_and_apart():
    at = SPEC.stored(np.arange(SPEC.rows))
    assert len(np.unique(at)) == SPEC.rows and at.max() < SPEC.stored_rows and SPEC.stored_rows % GROUPS == 0
    owners = at[:1024] // (SPEC.stored_rows // 8)
    assert np.array_equal(np.bincount(owners), [128] * 8)


def test_passes_are_the_fewest_that_fit():
    stored = np.arange(64, dtype=np.int32)
    assert passes_needed(stored, 32, 2, 32) == 1
    assert passes_needed(stored, 32, 2, 31) == 2
    assert passes_needed(stored, 32, 2, 1) == 32
    assert passes_needed(np.full(4, -1, np.int32), 32, 2, 1) == 1


def test_what_is_wrong_is_said_at_once():
    mesh = make_mesh(devices=jax.devices()[:1])
    bad = {
        "t": TableSpec(rows=0, dim=4, features=("a",), optimizer=SparseAdam(lr=0)),
        "u": TableSpec(rows=2, dim=4, features=("a",)),
    }
    with pytest.raises(UserError) as error:
        EmbeddingTables(bad, mesh, {})
    text = str(error.value)
    assert "tables.t.rows: expected a positive number" in text and "tables.t.optimizer.lr: expected" in text
    assert "tables.u.features: 'a' is read from 't' already" in text
    with pytest.raises(UserError, match=r"tables.t.features: 'a' is not in the batch; did you mean 'aa'\?"):
        EmbeddingTables({"t": TableSpec(rows=2, dim=4, features=("a",))}, mesh, {"aa": ids(0, 2)})


@pytest.mark.parametrize("every", [1, 3])
def test_lazy_adam_has_the_moments_of_dense_adam(every):
    """And its rows, where every step touches them; float64 throughout."""
    with jax.enable_x64(True):
        rule, tx = LazyAdam(lr=0.01), optax.adam(0.01)
        start = np.random.default_rng(0).standard_normal((5, 4))
        rows, dense = jnp.asarray(start), jnp.asarray(start)
        slots = {name: jnp.full((5, *shape), value) for name, (shape, value) in rule.slots(4).items()}
        with jax.numpy_dtype_promotion("standard"):
            opt = tx.init(dense)
            for step in range(1, 31):
                grads = jnp.asarray(np.random.default_rng(step).standard_normal((5, 4)) * (step % every == 0))
                updates, opt = tx.update(grads, opt)
                dense = optax.apply_updates(dense, updates)
                if step % every == 0:
                    rows, slots = rule.update(rows, slots, grads, jnp.int32(step))
                    np.testing.assert_allclose(slots["mu"], opt[0].mu, rtol=1e-12, atol=1e-14)
                    np.testing.assert_allclose(slots["nu"], opt[0].nu, rtol=1e-12, atol=1e-14)
        assert np.allclose(rows, dense, rtol=1e-12) == (every == 1)


def test_rows_are_clipped_one_by_one():
    grads = jnp.asarray([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    np.testing.assert_allclose(clip_rows(grads, 1.0), [[0.6, 0.8], [0.3, 0.4], [0, 0]], rtol=1e-6)
    assert clip_rows(grads, None) is grads
