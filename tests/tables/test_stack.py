"""Tables that are exchanged together: each id still reads and trains a row of its own table."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxops.core.mesh import batch_sharding, make_mesh
from jaxops.tables.optimizers import Adagrad, TableSgd
from jaxops.tables.spec import TableSpec, stack
from jaxops.tables.tables import EmbeddingTables, reading

SPECS = {
    "user": TableSpec(rows=3000, dim=4, features=("user",), placement="row", optimizer=TableSgd(lr=1.0)),
    "item": TableSpec(
        rows=500, dim=4, features=("item", "history"), placement="row", optimizer=TableSgd(lr=1.0), unknown=3
    ),
    "genre": TableSpec(rows=20, dim=4, features=("genre",), optimizer=TableSgd(lr=1.0)),
    "wide": TableSpec(rows=20, dim=8, features=("wide",), optimizer=TableSgd(lr=1.0)),
    "hour": TableSpec(rows=24, dim=4, features=("hour",), optimizer=TableSgd(lr=1.0)),
    "other": TableSpec(rows=30, dim=4, features=("other",), optimizer=Adagrad()),
    "own": TableSpec(rows=3000, dim=4, features=("own",), placement="row", optimizer=TableSgd(lr=1.0), capacity=8),
}


def batch():
    draw = np.random.default_rng(0).integers
    shapes = {"user": (16,), "item": (16,), "history": (16, 5), "genre": (16, 3), "wide": (16,), "hour": (16,)}
    out = {name: draw(-1, 20, shape).astype(np.int32) for name, shape in shapes.items()}
    out["item"][0] = 700  # outside of its table, inside of the stack
    return {**out, "other": draw(0, 30, 16).astype(np.int32), "own": draw(0, 3000, 16).astype(np.int32)}


def test_tables_of_one_sort_lie_together():
    stacked = stack(SPECS)
    assert list(stacked) == ["user_and_1_more", "genre_and_1_more", "wide", "other", "own"]
    both = stacked["user_and_1_more"]
    assert (both.rows, both.placed, both.features) == (3500, "row", ("user", "item", "history"))
    assert both.ids_of("item", np.array([0, 499, 500, -1, -7])).tolist() == [3000, 3499, 3003, -1, 3003]
    assert both.ids_of("user", np.array([0, 2999, 3000])).tolist() == [0, 2999, 0]
    assert stacked["own"] is SPECS["own"] and stacked["wide"].placed == "replicated"
    assert sum(spec.bytes() for spec in stacked.values()) <= sum(spec.bytes() for spec in SPECS.values())


def test_a_stack_reads_and_writes_the_rows_of_its_members():
    """What each feature reads from a stack, and after a step, is what it reads from tables that lie apart."""
    given = batch()
    mesh = make_mesh(data=8, devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        together = EmbeddingTables(stack(SPECS), mesh, given)
        apart = EmbeddingTables(SPECS, mesh, given)
        state = together.init(jax.random.key(0))
        rows = {name: np.asarray(table["rows"]) for name, table in state.items()}
        copied = {}
        for name, table in apart.init(jax.random.key(1)).items():
            spec, home = (
                SPECS[name],
                next(k for k, s in together.specs.items() if SPECS[name].features[0] in s.features),
            )
            ids = np.arange(spec.rows)
            values = np.array(table["rows"])
            values[spec.stored(ids)] = rows[home][
                together.specs[home].stored(together.specs[home].ids_of(spec.features[0], ids))
            ]
            copied[name] = {**table, "rows": jax.device_put(jnp.asarray(values), table["rows"].sharding)}

        def both(tables, held, planned):
            found = tables.lookup(held, planned)
            grads = {k: jnp.sin(v) for k, v in found.items()}
            return tables.expand(found, planned), tables.apply(held, planned, grads, jnp.bool_(True))

        step = jax.jit(both, static_argnums=0)
        for _ in range(2):
            read = {}
            for key, tables, held in (("together", together, state), ("apart", apart, copied)):
                planned = jax.device_put(tables.plan(given), batch_sharding(mesh))
                found, after = step(tables, held, planned)
                read[key] = {k: np.asarray(v) for k, v in found.items()}
                state, copied = (after, copied) if key == "together" else (state, after)
            for name, values in read["apart"].items():
                np.testing.assert_array_equal(values, read["together"][name], err_msg=name)


def test_tables_can_be_read_for_batches_that_lack_features():
    given = batch()
    mesh = make_mesh(data=8, devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        tables = EmbeddingTables(stack(SPECS), mesh, given)
        state = tables.init(jax.random.key(0))
        planned = jax.device_put(tables.plan(given), batch_sharding(mesh))
        read = jax.jit(lambda tables, state, plan: tables.expand(tables.lookup(state, plan), plan), static_argnums=0)
        whole = read(tables, state, planned)
        few = {name: given[name] for name in ("item", "wide")}
        reader = reading(tables.specs, tables.mesh, few)
        assert set(reader.specs) == {"user_and_1_more", "wide"}
        planned = jax.device_put(reader.plan(few), batch_sharding(mesh))
        found = read(reader, state, planned)
        assert set(found) == {"item", "wide"}
        for name, rows in found.items():
            np.testing.assert_array_equal(rows, whole[name])
