"""Tables on every mesh against a dense reference: the same rows, slots and losses after 50 steps, and nothing dense."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo_text import operations

from jaxops.core.checkpoint import Checkpoints
from jaxops.core.fresh_state import abstract_state, init_state
from jaxops.core.mesh import make_mesh
from jaxops.core.step import build_step
from jaxops.core.sums import Sum
from jaxops.tables.optimizers import Adagrad, LazyAdam, RowwiseAdagrad, SparseAdam, TableSgd
from jaxops.tables.planner import Planner
from jaxops.tables.spec import TableSpec, stack
from jaxops.tables.tables import EmbeddingTables

ROWS, DIM, BATCH, LENGTH = 3000, 8, 64, 5


def batch_of(seed, rows=ROWS, batch=BATCH):
    """Zipf ids, a fifth of them missing, two features of one table and one of another."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.zipf(1.3, (batch, LENGTH)) - 1, rows - 1)
    return {
        "history": np.where(rng.random((batch, LENGTH)) < 0.2, -1, ids).astype(np.int32),
        "item": rng.integers(0, rows, batch).astype(np.int32),
        "place": rng.integers(0, 50, batch).astype(np.int32),
        "y": rng.standard_normal(batch).astype(np.float32),
        "weight": np.ones(batch, np.float32),
        "id": np.arange(batch, dtype=np.int32),
    }


def model(params, history, item, place, y, weight):
    x = history.sum(1) + item * place
    error = (jnp.tanh(x @ params["w"]).sum(-1) - y) ** 2
    return {"loss/error": Sum.of(error, weight)}


def objective(params, batch, key):
    rows = batch["rows"]
    return model(params, rows["history"], rows["item"], rows["place"], batch["y"], batch["weight"])


def specs_of(optimizer, placement="row", dtype="float32", capacity=None):
    shared = {"dim": DIM, "optimizer": optimizer, "placement": placement, "dtype": dtype, "scale": 0.3}
    return {
        "item": TableSpec(rows=ROWS, features=("history", "item"), capacity=capacity, **shared),
        "place": TableSpec(rows=50, features=("place",), **shared),
    }


@dataclasses.dataclass
class Trainer:
    optimizer: object
    layout: dict
    placement: str = "row"
    accumulation: int = 1
    dtype: str = "float32"
    capacity: int | None = None

    def __post_init__(self):
        count = int(np.prod(list(self.layout.values())))
        self.mesh = make_mesh(**self.layout, devices=jax.devices()[:count])
        specs = specs_of(self.optimizer, self.placement, self.dtype, self.capacity)
        tx = optax.sgd(0.05)
        with jax.set_mesh(self.mesh):
            self.tables = EmbeddingTables(specs, self.mesh, batch_of(0))
            init = lambda key: {"w": jax.random.normal(jax.random.key(3), (DIM, 4), self.dtype)}
            self.state = init_state(
                init, jax.random.key(0), tx, self.mesh, [(".*", ())], tables=self.tables, dtype=self.dtype
            )
            self.step = build_step(
                objective, tx, self.mesh, accumulation=self.accumulation, tables=self.tables, rules=[(".*", ())]
            )

    def __call__(self, batch):
        return float(self.sums(batch)["loss/error"].total)

    def sums(self, batch):
        batch = {k: v.astype(self.dtype) if v.dtype == np.float32 else v for k, v in batch.items()}
        with jax.set_mesh(self.mesh):
            self.state, sums = jax.block_until_ready(self.step(self.state, self.tables.plan(batch)))
        return sums

    def logical(self, slot="rows"):
        """By table, in the order of ids."""
        at = {name: spec.stored(np.arange(spec.rows)) for name, spec in self.tables.specs.items()}
        return {name: np.asarray(self.state.tables[name][slot])[at[name]] for name in at}


class Dense:
    """The same model with its tables as parameters under optax, or with a rule on all rows where they are touched."""

    def __init__(self, trainer, tx=None):
        params = {"w": jnp.asarray(np.asarray(trainer.state.params["w"]))}
        tables = {name: jnp.asarray(x) for name, x in trainer.logical().items()}
        self.tx, self.rule = tx, trainer.optimizer
        opt = tx.init(tables) if tx else {name: self._slots(x) for name, x in tables.items()}
        self.state, self.step = (params, tables, opt, jnp.int32(0)), jax.jit(self._step)

    tables = property(lambda self: self.state[1])
    opt = property(lambda self: self.state[2])

    def _slots(self, table):
        kept = self.rule.slots(DIM).items()
        return {slot: jnp.full((len(table), *shape), value, table.dtype) for slot, (shape, value) in kept}

    def _step(self, state, batch):
        params, tables, opt, count = state
        take = lambda table, ids: jnp.where((ids >= 0)[..., None], table[jnp.maximum(ids, 0)], 0)

        def loss(params, tables):
            rows = {name: take(tables["item"], batch[name]) for name in ("history", "item")}
            y, weight = (batch[name].astype(tables["item"].dtype) for name in ("y", "weight"))
            sums = model(params, rows["history"], rows["item"], take(tables["place"], batch["place"]), y, weight)
            error = sums["loss/error"]
            return error.total / error.count, error.total

        (_, total), (grads, by_row) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, tables)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
        if self.tx:
            with jax.numpy_dtype_promotion("standard"):
                updates, opt = self.tx.update(by_row, opt, tables)
                return (params, optax.apply_updates(tables, updates), opt, count + 1), total
        for name, features in {"item": ("history", "item"), "place": ("place",)}.items():
            asked = jnp.concatenate([batch[feature].ravel() for feature in features])
            here = jnp.isin(jnp.arange(len(tables[name]), dtype=jnp.int32), asked)
            only = lambda new, old, here=here: jnp.where(here.reshape(-1, *[1] * (new.ndim - 1)), new, old)
            new = self.rule.update(tables[name], opt[name], by_row[name], count + 1)
            tables = {**tables, name: only(new[0], tables[name])}
            opt = {**opt, name: {slot: only(x, opt[name][slot]) for slot, x in new[1].items()}}
        return (params, tables, opt, count + 1), total

    def __call__(self, batch):
        self.state, total = self.step(self.state, batch)
        return float(total)


INSIDE = {"dynamic-update-slice", "conditional"}
"""How a CPU writes a row into a table."""


def assert_close(found, wanted, bound):
    for name, x in wanted.items():
        assert np.max(np.abs(np.asarray(found[name]) - np.asarray(x))) < bound, name


LAYOUTS = [
    ({"data": 1}, "row", 1),
    ({"data": 8}, "row", 1),
    ({"data": 8}, "replicated", 1),
    ({"data": 2, "fsdp": 2, "tensor": 2}, "row", 4),
    ({"data": 8}, "row", 4),
    ({"data": 1}, "replicated", 4),
]


def on_layouts(*rules):
    """Every rule on every layout. Quick: each rule on two of the first four, each of these with one rule or two."""
    return [
        pytest.param(*rule, *layout, marks=() if at < 4 and (at - 2 * number) % 4 < 2 else pytest.mark.slow)
        for number, rule in enumerate(rules)
        for at, layout in enumerate(LAYOUTS)
    ]


@pytest.mark.latest
@pytest.mark.parametrize(
    "optimizer, tx, layout, placement, accumulation",
    on_layouts((TableSgd(lr=0.1), optax.sgd(0.1)), (Adagrad(lr=0.1), optax.adagrad(0.1))),
)
def test_fifty_steps_are_those_of_optax_on_the_dense_table(optimizer, tx, layout, placement, accumulation):
    ours = Trainer(optimizer, layout, placement, accumulation)
    dense = Dense(ours, tx)
    start = dense.tables
    for seed in range(50):
        batch = batch_of(seed)
        assert ours(batch) == pytest.approx(dense(batch), rel=1e-5)
    assert_close(ours.logical(), dense.tables, 1e-6)
    assert max(float(jnp.max(jnp.abs(dense.tables[name] - start[name]))) for name in start) > 0.05


@pytest.mark.parametrize(
    "optimizer, layout, placement, accumulation",
    on_layouts((RowwiseAdagrad(lr=0.1),), (SparseAdam(lr=0.01),), (LazyAdam(lr=0.01),)),
)
def test_fifty_steps_in_float64_of_the_rules_that_optax_has_not(optimizer, layout, placement, accumulation):
    with jax.enable_x64(True):
        ours = Trainer(optimizer, layout, placement, accumulation, "float64")
        dense = Dense(ours)
        for seed in range(50):
            batch = batch_of(seed)
            ours(batch), dense(batch)
        assert_close(ours.logical(), dense.tables, 1e-6)
        for slot in optimizer.slots(DIM):
            assert_close(ours.logical(slot), {name: x[slot] for name, x in dense.opt.items()}, 1e-6)


@pytest.mark.parametrize("optimizer", [pytest.param(Adagrad(lr=0.1), marks=pytest.mark.slow), RowwiseAdagrad(lr=0.1)])
def test_what_does_not_fit_the_capacity_goes_in_more_passes(optimizer):
    tight = Trainer(optimizer, {"data": 8}, capacity=3)
    roomy = Trainer(optimizer, {"data": 8})
    passes = []
    for seed in range(10):
        batch = batch_of(seed)
        few, many = roomy.sums(batch), tight.sums(batch)
        passes.append([float(sums["tables/item/passes"].maximum) for sums in (few, many)])
        assert float(many["loss/error"].total) == pytest.approx(float(few["loss/error"].total), rel=1e-6)
    assert min(many for _, many in passes) > 1 == max(few for few, _ in passes)
    assert_close(tight.logical(), roomy.logical(), 1e-6)
    assert_close(tight.logical("sum"), roomy.logical("sum"), 1e-6)


def test_one_device_exchanges_nothing_whatever_the_capacity():
    alone, eight = Trainer(Adagrad(lr=0.1), {"data": 1}, capacity=3), Trainer(Adagrad(lr=0.1), {"data": 8})
    for seed in range(3):
        sums = alone.sums(batch_of(seed))
        assert float(sums["tables/item/passes"].maximum) == 1
        eight(batch_of(seed))
    assert_close(alone.logical(), eight.logical(), 1e-6)


@pytest.mark.parametrize(
    "optimizer, dtype",
    [
        pytest.param(Adagrad(lr=0.1), "float32", marks=pytest.mark.slow),
        pytest.param(RowwiseAdagrad(lr=0.1), "float64", marks=pytest.mark.slow),
        (LazyAdam(lr=0.01), "float64"),
    ],
)
def test_a_checkpoint_of_eight_devices_goes_on_on_four_two_and_one(optimizer, dtype, tmp_path):
    """Rows and slots restored by their type alone: the next steps are those of the run that stayed."""
    with jax.enable_x64(dtype == "float64"):
        carry_on(optimizer, dtype, tmp_path)


def carry_on(optimizer, dtype, tmp_path):
    stayed = Trainer(optimizer, {"data": 8}, dtype=dtype)
    for seed in range(5):
        stayed(batch_of(seed))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, stayed.state, {})
        moved = [Trainer(optimizer, {"data": count}, dtype=dtype) for count in (4, 2, 1)]
        for one in moved:
            one.state = checkpoints.restore(5, abstract_state(one.state))
    for seed in range(5, 8):
        loss = stayed(batch_of(seed))
        assert [one(batch_of(seed)) for one in moved] == pytest.approx([loss] * 3, rel=1e-5)
    for one in moved:
        assert_close(one.logical(), stayed.logical(), 1e-6)


@pytest.mark.parametrize("placement", ["row", "replicated"])
def test_how_wide_a_plan_is_changes_nothing(placement):
    narrow, full = (Trainer(Adagrad(lr=0.1), {"data": 8}, placement) for _ in range(2))
    for trainer, widths in [(narrow, {"item": 8, "place": 8}), (full, {})]:
        trainer.tables.plan = Planner(trainer.tables.specs, 8, BATCH // 8, trainer.tables.capacities, widths)
    few = lambda batch: {**batch, "item": batch["item"] % 3}
    for seed in range(8):
        batch = few(batch_of(seed))
        assert narrow(batch) == pytest.approx(full(batch), rel=1e-6)
    wide, thin = (x.tables.plan(few(batch_of(0)))["plan"]["item"]["stored"].shape[1] for x in (full, narrow))
    assert thin < wide, "nothing was compared"
    assert_close(narrow.logical(), full.logical(), 1e-6)
    assert_close(narrow.logical("sum"), full.logical("sum"), 1e-6)


def test_fresh_rows_are_the_same_on_every_mesh_and_no_two_alike():
    wide, alone = Trainer(TableSgd(), {"data": 8}).logical(), Trainer(TableSgd(), {"data": 1}).logical()
    for name, rows in wide.items():
        assert np.array_equal(rows, alone[name])
        assert len(np.unique(rows[:, 0])) > 0.99 * len(rows) and np.std(rows) == pytest.approx(0.3, rel=0.1)


def test_rows_begin_as_the_spec_says():
    mesh = make_mesh(data=8)
    specs = {
        name: TableSpec(rows=40_000, dim=4, features=(name,), init=init, scale=scale)
        for name, init, scale in [("a", "normal", 0.5), ("b", "uniform", 0.5), ("c", "uniform", 0.0)]
    }
    assert len(stack(specs)) == 3, "tables that begin differently are no stack"
    batch = {name: np.zeros(8, np.int32) for name in specs}
    with jax.set_mesh(mesh):
        made = EmbeddingTables(specs, mesh, batch).init(jax.random.key(0))
    normal, uniform, zero = (np.asarray(made[name]["rows"]) for name in specs)
    assert normal.std() == pytest.approx(0.5, rel=0.02) and np.abs(normal).max() > 1.5
    assert uniform.std() == pytest.approx(0.5 / 3**0.5, rel=0.02) and 0.49 < np.abs(uniform).max() <= 0.5
    assert abs(uniform.mean()) < 0.01 and not zero.any()


def test_a_skipped_step_writes_nothing():
    ours = Trainer(LazyAdam(), {"data": 8})
    ours(batch_of(0))
    before = jax.device_get(ours.state.tables)
    ours(batch_of(1) | {"y": np.full(BATCH, np.nan, np.float32)})
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(ours.state.tables))
    assert before["item"]["count"] == 1


def test_ids_outside_of_the_table_read_the_row_for_the_unknown():
    ours = Trainer(TableSgd(), {"data": 8})
    batch = batch_of(0)
    odd = batch | {"item": np.where(np.arange(BATCH) % 2, ROWS + 7, -9).astype(np.int32)}
    assert ours.tables.plan(odd)["slots"]["item"].min() >= 0
    same = batch | {"item": np.zeros(BATCH, np.int32)}
    assert ours(odd) == Trainer(TableSgd(), {"data": 8})(same)


@pytest.mark.parametrize("layout", [{"data": 1}, {"data": 8}, {"data": 2, "fsdp": 4}])
def test_nothing_in_the_program_is_as_large_as_a_table(layout):
    rows, dim = 1 << 19, 16
    mesh = make_mesh(**layout, devices=jax.devices()[: int(np.prod(list(layout.values())))])
    local = rows // int(np.prod(list(layout.values())))
    with jax.set_mesh(mesh):
        specs = {"item": TableSpec(rows=rows, dim=dim, features=("history", "item"), optimizer=Adagrad())}
        tables = EmbeddingTables(specs, mesh, batch_of(0, rows))
        tx = optax.sgd(0.1)
        state = init_state(
            lambda key: {"w": jnp.ones((dim, 4))}, jax.random.key(0), tx, mesh, [(".*", ())], tables=tables
        )

        def objective(params, batch, key):
            x = batch["rows"]["history"].sum(1) + batch["rows"]["item"]
            return {"loss/e": Sum.of((x @ params["w"]).sum(-1) ** 2, batch["weight"])}

        step = build_step(objective, tx, mesh, tables=tables, rules=[(".*", ())], accumulation=2)
        program = step.programs(state, tables.plan(batch_of(0, rows)))[0]
        compiled = program.fn.lower(*program.args).compile()
    ops = operations(compiled.as_text())
    exchanged = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
    moved = [op for op in ops if op.kind.removesuffix("-start") in exchanged]
    assert all(op.largest < local * dim // 8 for op in moved), moved
    assert (sum(op.kind.startswith("all-to-all") for op in moved) >= 4) == (mesh.size > 1)
    # of the table's size there are only the tables themselves, on their way in and out: nothing is filled or computed
    large = {op.kind for op in ops if op.largest >= local * dim}
    assert large <= {
        "parameter",
        "tuple",
        "get-tuple-element",
        "while",
        "scatter",
        "fusion",
        "bitcast",
        "call",
        *INSIDE,
    }
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * 2 * 4 * local * dim
