"""What `jaxops shardings` says of tables, held against the arrays that are made and the program that is compiled."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from hlo_text import of_kind
from test_tables import batch_of, objective

from jaxops.core.failures import UserError
from jaxops.core.fresh_state import init_state
from jaxops.core.memory import bytes_per_device
from jaxops.core.mesh import make_mesh
from jaxops.core.step import build_step
from jaxops.tables.explain import costs, require_room
from jaxops.tables.optimizers import Adagrad, LazyAdam, RowwiseAdagrad, TableSgd
from jaxops.tables.spec import TableSpec, stack
from jaxops.tables.tables import EmbeddingTables

SPECS = {
    "item": TableSpec(rows=3000, dim=8, features=("history", "item"), placement="row", optimizer=Adagrad(), ema=0.9),
    "place": TableSpec(rows=50, dim=8, features=("place",), optimizer=RowwiseAdagrad()),
}


def tables_on(shards, specs=None):
    mesh = make_mesh(data=shards, devices=jax.devices()[:shards])
    return mesh, EmbeddingTables(specs or SPECS, mesh, batch_of(0))


@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize("optimizer", [TableSgd(), RowwiseAdagrad(), LazyAdam()])
def test_bytes_are_those_of_the_arrays_in_either_placement(shards, optimizer):
    specs = {name: dataclasses.replace(spec, optimizer=optimizer) for name, spec in SPECS.items()}
    other = {"row": "replicated", "replicated": "row"}
    for turn in (specs, {name: dataclasses.replace(s, placement=other[s.placed]) for name, s in specs.items()}):
        mesh, tables = tables_on(shards, turn)
        with jax.set_mesh(mesh):
            state = tables.init(jax.random.key(0))
        found = {cost.name: cost for cost in costs(tables, turn)}
        if turn is specs:
            first = found
        for name, cost in found.items():
            arrays = {slot: x for slot, x in state[name].items() if slot != "count"}
            assert cost.bytes_per_device == bytes_per_device(arrays) == tables.bytes_per_device()[name]
            assert cost.bytes_per_device == (
                first[name].bytes_per_device if turn is specs else first[name].runner_up_bytes
            )


def test_what_is_exchanged_is_in_the_program():
    """Of what an all-to-all gives a device, one part in eight is its own; an all-reduce sends nearly twice its size."""
    mesh, tables = tables_on(8)
    with jax.set_mesh(mesh):
        state = init_state(
            lambda key: {"w": jax.random.normal(key, (8, 4))}, jax.random.key(0), optax.sgd(0.1), mesh, [(".*", ())],
            tables=tables,
        )  # fmt: skip
        step = build_step(objective, optax.sgd(0.1), mesh, tables=tables, rules=[(".*", ())])
        program = step.programs(state, tables.plan(batch_of(0)))[0]
        text = program.fn.lower(*program.args).compile().as_text()
    item, place = costs(tables, SPECS)
    swapped = sum(op.entries for op in of_kind(text, "all-to-all") if op.loop is None)
    assert item.exchanged == 4 * swapped * 7 // 8
    reduced = sorted(op.largest for op in of_kind(text, "all-reduce"))[-2:]
    assert reduced == [50, 50 * 8], "which rows are touched, and their gradients; those of `item` are not summed so"
    assert place.exchanged == 2 * 4 * sum(reduced) * 7 // 8
    assert all(cost.exchanged == 0 for cost in costs(tables_on(1)[1], SPECS))


def test_a_table_that_no_plan_has_is_told():
    _, tables = tables_on(8)
    with pytest.raises(UserError, match="tables: user, year left out of the plan"):
        costs(tables, {**SPECS, "user": SPECS["item"], "year": SPECS["place"]})


def test_a_stack_is_told_by_its_members():
    twin = dataclasses.replace(SPECS["place"], features=("item",))
    asked = {"place": SPECS["place"], "twin": twin, "item": dataclasses.replace(SPECS["item"], features=("history",))}
    _, tables = tables_on(8, stack(asked))
    found = {cost.members: cost for cost in costs(tables, asked)}
    assert set(found) == {("place", "twin"), ("item",)}
    both = found["place", "twin"]
    assert (both.rows, both.placement, both.runner_up, both.why) == (
        100,
        "replicated",
        "row",
        "100 rows, at most 20,000",
    )
    assert found["item",].why == "as the config says"


def test_what_does_not_fit_is_told_with_the_largest():
    _, tables = tables_on(8)
    total = sum(tables.bytes_per_device().values())
    require_room(tables, total, "a device")
    require_room(tables, None, "a device")
    with pytest.raises(UserError, match=r"a device has 0\.0 GiB; the largest is item \(.*, row\)\. Divide rows over"):
        require_room(tables, total - 1, "a device")
    assert np.argmax(list(tables.bytes_per_device().values())) == 0
