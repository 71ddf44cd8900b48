"""The moving average of rows, kept by the touched alone, against one that looks at every row after every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.core.mesh import batch_sharding, make_mesh
from jaxops.tables.average import left
from jaxops.tables.optimizers import TableSgd
from jaxops.tables.spec import TableSpec
from jaxops.tables.tables import EmbeddingTables, evaluated

ROWS, DIM = 300, 4


def placed(mesh, planned):
    return jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), planned)


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.99, 0.999])
def test_what_is_left_is_the_product_of_the_rates(decay):
    rates = np.minimum(decay, (1 + np.arange(20_000)) / (10 + np.arange(20_000)))
    logs = np.concatenate([[0.0], np.cumsum(np.log(rates))])
    since = np.array([0, 0, 0, 3, 8, 9, 500, 8_990, 12_000, 19_900, 7, 100])
    now = np.array([0, 1, 40, 3, 9, 11, 700, 9_100, 12_900, 19_950, 900, 19_000])
    found = left(decay, jnp.asarray(since, jnp.int32), jnp.asarray(now, jnp.int32))
    np.testing.assert_allclose(found, np.exp(logs[now] - logs[since]), rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize(("placement", "decay"), [("row", 0.5), ("replicated", 0.999)])
def test_it_is_the_average_of_all_rows_after_all_steps(placement, decay):
    mesh = make_mesh(data=8)
    spec = TableSpec(
        rows=ROWS, dim=DIM, features=("item",), optimizer=TableSgd(lr=0.3), scale=1, placement=placement, ema=decay
    )
    draw = np.random.default_rng(0)
    batches = [{"item": np.minimum(draw.zipf(1.4, (16, 3)) - 1, ROWS - 1).astype(np.int32)} for _ in range(40)]
    with jax.set_mesh(mesh):
        tables = EmbeddingTables({"item": spec}, mesh, batches[0])
        state = tables.init(jax.random.key(1))
        at = spec.stored(np.arange(ROWS))
        rows = lambda state: np.asarray(state["item"]["rows"], np.float64)[at]
        average = rows(state)
        keep = jnp.ones((), bool)
        step = jax.jit(
            lambda state, batch: tables.apply(
                state, batch, jax.tree.map(lambda x: jnp.sin(3 * x) + 0.1, tables.lookup(state, batch)), keep
            )
        )
        for t, batch in enumerate(batches):
            state = jax.block_until_ready(step(state, placed(mesh, tables.plan(batch))))
            rate = min(decay, (1 + t) / (10 + t))
            average = average + (1 - rate) * (rows(state) - average)
        found = np.asarray(jax.jit(lambda table: evaluated(spec, table))(state["item"]))[at]
    np.testing.assert_allclose(found, average, rtol=2e-6, atol=2e-6)
    assert np.abs(found - rows(state)).max() > 0.05  # the average is not the rows
    touched = np.isin(np.arange(ROWS), np.concatenate([batch["item"].ravel() for batch in batches]))
    np.testing.assert_array_equal(found[~touched], rows(state)[~touched].astype(np.float32))


def test_a_skipped_step_leaves_it():
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    spec = TableSpec(rows=ROWS, dim=DIM, features=("item",), optimizer=TableSgd(lr=0.3), placement="row", ema=0.9)
    batch = {"item": np.arange(16, dtype=np.int32)}
    with jax.set_mesh(mesh):
        tables = EmbeddingTables({"item": spec}, mesh, batch)
        state, planned = tables.init(jax.random.key(1)), placed(mesh, tables.plan(batch))
        grads = jax.tree.map(jnp.ones_like, tables.lookup(state, planned))
        for keep in (True, False):
            after = jax.jit(tables.apply)(state, planned, grads, jnp.asarray(keep))
            same = [np.array_equal(after["item"][name], state["item"][name]) for name in state["item"]]
            assert same == [not keep] * len(same)
