"""The step as a value-to-value function: donated, windowed, clipped, skipped, with tables and extras."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from toys import RULES, host, init, mesh_of, numpy_regression, predict, regression, rows, trainer

from jaxops.core.failures import UserError
from jaxops.core.flops import count_flops
from jaxops.core.fresh_state import abstract_state, init_state
from jaxops.core.mesh import batch_sharding
from jaxops.core.optimizer import ema
from jaxops.core.sharding import named_leaves
from jaxops.core.step import Extra, cast, global_norm
from jaxops.core.sums import Max, Sum, finalize
from jaxops.core.turn import advanced

FSDP = {"fsdp": 8}


def same(a, b):
    for (path, x), (_, y) in zip(named_leaves(a), named_leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)


def sgd(params, grads, lr=0.1):
    return jax.tree.map(lambda p, g: np.asarray(p, np.float64) - lr * g, params, grads)


@pytest.mark.latest
def test_one_sgd_step_is_numpys():
    t = trainer(loss_weights={"loss/size": 0.25})
    before = host(t.state.params)
    sums = t.step(rows())
    _, grads, entries = numpy_regression(before, rows(), (1.0, 0.25))
    for (path, x), (_, y) in zip(named_leaves(t.state.params), named_leaves(sgd(before, grads)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=path)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    values = finalize(jax.device_get(sums))
    assert values["grad_norm"] == pytest.approx(norm, rel=1e-5) == pytest.approx(values["grad_norm_max"], rel=1e-5)
    assert values["loss/mse"] == pytest.approx(entries["loss/mse"][0] / entries["loss/mse"][1], rel=1e-5)
    assert values["nonfinite"] == 0 and values["nonfinite_first"] == -np.inf
    assert int(t.state.step) == 1


@pytest.mark.latest
@pytest.mark.parametrize("layout", [{"data": 1}, FSDP])
def test_the_state_is_donated_and_the_window_is_not(layout):
    """The loop waits on the sums of earlier steps, so those must outlive the next one."""
    t = trainer(optax.adam(1e-2), layout, extras={"ema": ema(0.9)}, frozen=("^down",))
    old = jax.tree.leaves(t.state)
    first = t.step(rows(0))
    assert all(x.is_deleted() for x in old)
    second = t.step(rows(1), first)
    assert not any(x.is_deleted() for x in jax.tree.leaves((t.state, first, second)))
    assert t.built._jitted._cache_size() == 1


def test_the_objective_is_traced_once():
    """By `programs`; the FLOPs, the empty window and the steps take that trace."""
    traced = []

    def objective(params, batch, key):
        traced.append(len(traced))
        return regression(params, batch, key)

    t = trainer(layout=FSDP, objective=objective)
    with jax.set_mesh(t.mesh):
        program = t.built.programs(abstract_state(t.state), rows())[0]
        once = len(traced)
        assert count_flops(program.fn, *program.args).total > 0
    t.step(rows(1), t.step(rows()))
    assert once >= 1 and len(traced) == once


@pytest.mark.latest
def test_a_window_is_the_sum_of_its_steps():
    one, whole = trainer(), trainer()
    window, parts = None, []
    for seed in range(3):
        window = whole.step(rows(seed), window)
        parts.append(host(one.step(rows(seed))))
    window = host(window)
    for name, entry in window.items():
        steps = [part[name] for part in parts]
        if isinstance(entry, Max):
            np.testing.assert_array_equal(entry.maximum, np.max([s.maximum for s in steps], 0))
        else:
            np.testing.assert_allclose(entry.total, np.sum([s.total for s in steps], 0), rtol=1e-6)
            np.testing.assert_allclose(entry.count, np.sum([s.count for s in steps], 0), rtol=1e-6)
    assert finalize(window)["nonfinite"] == 0 and float(window["nonfinite"].count) == 3


def test_an_empty_window_is_the_identity_and_no_second_program():
    t = trainer()
    with jax.set_mesh(t.mesh):
        empty = t.built.empty_window(t.state, rows())
    assert float(empty["loss/mse"].total) == 0 and float(empty["worst"].maximum) == -np.inf
    t.step(rows(), empty)
    t.step(rows())
    assert t.built._jitted._cache_size() == 1


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_gradients_are_clipped_to_the_global_norm(clip):
    t = trainer(clip=clip)
    before = host(t.state.params)
    sums = finalize(host(t.step(rows())))
    grads = numpy_regression(before, rows())[1]
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    assert sums["grad_norm"] == pytest.approx(norm, rel=1e-5)  # as it was before clipping
    expected = sgd(before, jax.tree.map(lambda g: g * min(1, clip / norm), grads))
    for (path, x), (_, y) in zip(named_leaves(t.state.params), named_leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=path)


def test_groups_of_paths_have_norms_of_their_own():
    """Numpy: `up` clipped hard, `down/kernel` hardly, and the bias of `down`, which no pattern matches, not at all."""
    clip = {"^up/": 0.05, r"^down/kernel$": 1e6}
    t = trainer(clip=clip)
    before = host(t.state.params)
    found = finalize(host(t.step(rows())))
    grads = numpy_regression(before, rows())[1]
    norm = lambda tree: np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(tree)))
    assert found["grad_norm"] == pytest.approx(norm(grads), rel=1e-5)
    assert found["grad_norm/up"] == pytest.approx(norm(grads["up"]), rel=1e-5)
    assert found["grad_norm/down/kernel"] == pytest.approx(norm(grads["down"]["kernel"]), rel=1e-5)
    assert found["grad_norm/default"] == pytest.approx(norm(grads["down"]["bias"]), rel=1e-5)
    grads["up"] = jax.tree.map(lambda g: g * 0.05 / norm(grads["up"]), grads["up"])
    for (path, x), (_, y) in zip(named_leaves(t.state.params), named_leaves(sgd(before, grads)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=path)


def test_the_default_norm_is_that_of_the_rest():
    one, other = trainer(clip={"^up/": 0.05, "default": 0.01}), trainer(clip={"^up/": 0.05, "^down/": 0.01})
    one.step(rows()), other.step(rows())
    same(host(one.state.params), host(other.state.params))


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"^pu/": 1.0}, r"optimizer.clip: '\^pu/' matches no trained parameter \(there are: .*up/kernel"),
        ({"^up/": 1.0, "kernel": 1.0}, "optimizer.clip: up/kernel is matched by '.up/' and by 'kernel'"),
    ],
)
def test_groups_that_cannot_be(clip, message):
    with pytest.raises(UserError, match=message):
        trainer(clip=clip).step(rows())


def test_an_inner_update_counts_updates_and_leaves_the_step():
    """Dropout differs from update to update of one step, as it does from step to step of supervised training."""

    def objective(params, batch, key):
        return regression(params, batch, key) | {"key": Sum.of(jax.random.uniform(key, ()))}

    inner, outer = trainer(objective=objective, advance_step=False), trainer(objective=objective)
    drawn = [[finalize(host(t.step(rows(n))))["key"] for n in range(3)] for t in (inner, outer)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3
    assert (int(inner.state.step), int(inner.state.updates)) == (0, 3)
    assert (int(outer.state.step), int(outer.state.updates)) == (3, 3)
    same(host(inner.state.params), host(outer.state.params))
    assert int(advanced(inner.state).step) == 1


@pytest.mark.parametrize("layout", [{"data": 1}, FSDP])
def test_frozen_leaves_that_are_not_read_are_no_arguments_and_stay_what_they_are(layout):
    def start(key):
        return init(key) | {"reference": init(key), "base": {"shift": jnp.ones((8,))}}

    def objective(params, batch, key):
        assert "reference" not in params
        return regression(params, batch | {"y": batch["y"] + params["base"]["shift"][None]}, key)

    whole = trainer(objective=lambda p, b, k: objective({n: p[n] for n in ("up", "down", "base")}, b, k), start=start,
                    frozen=("^reference/", "^base/"), layout=layout)  # fmt: skip
    t = trainer(objective=objective, start=start, frozen=("^reference/", "^base/"), reads=("^base/",), layout=layout)
    kept = t.state.frozen["reference"]
    for n in range(2):
        t.step(rows(n)), whole.step(rows(n))
    same(host(t.state.params), host(whole.state.params))
    assert jax.tree.structure(t.state) == jax.tree.structure(whole.state)
    assert all(a is b for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(t.state.frozen["reference"]), strict=True))
    with jax.set_mesh(t.mesh):
        (program,) = t.built.programs(abstract_state(t.state), rows())
        (every,) = whole.built.programs(abstract_state(whole.state), rows())
        inputs = [len(jax.make_jaxpr(p.fn)(*p.args).jaxpr.invars) for p in (program, every)]
    assert [name for name, _ in named_leaves(program.args[0].frozen)] == ["base/shift"]
    assert inputs[1] - inputs[0] == len(jax.tree.leaves(kept)) == 4


def test_a_frozen_leaf_that_is_wanted_but_not_read_has_words():
    t = trainer(start=lambda key: init(key) | {"reference": init(key)}, frozen=("^reference/",), reads=("^base/",),
                objective=lambda p, b, k: regression(p["reference"], b, k))  # fmt: skip
    with pytest.raises(KeyError) as caught:
        t.step(rows())
    assert "frozen leaves alone that match reads=['^base/']" in caught.value.__notes__[0]


def test_extras_that_do_not_fit_the_state_have_words():
    t = trainer(extras={"ema": ema(0.9)})
    other = trainer(extras={"eam": ema(0.9)})
    none = trainer()

    def apply(step, state):
        with jax.set_mesh(t.mesh):
            step.built(state.state, rows())

    with pytest.raises(UserError, match=r"state.extra\['ema'\] is not among .*\(there: none\)"):
        apply(none, t)
    with pytest.raises(UserError, match=r"\(there: eam\); did you mean 'eam'.*Extra\(init\)"):
        apply(other, t)
    with pytest.raises(UserError, match=r"extras\['ema'\] is not in state.extra \(there: none\)"):
        apply(t, none)


def test_an_extra_without_an_update_stays():
    t = trainer(extras={"kl": Extra(lambda params: {"coef": jnp.float32(0.05)})})
    t.step(rows())
    assert float(t.state.extra["kl"]["coef"]) == np.float32(0.05)


def test_a_batch_that_does_not_divide_into_blocks_has_words():
    with pytest.raises(UserError, match="32 examples do not divide into 3 microbatches"):
        trainer(accumulation=3).step(rows())
    with pytest.raises(UserError, match="32 examples do not divide into 4 microbatches of blocks of 3"):
        trainer(accumulation=4, block=3).step(rows())


def test_an_objective_that_couples_more_than_its_block_is_told_what_it_saw():
    def objective(params, batch, key):
        pairs = batch["x"].reshape(-1, 2, 8)
        return {"loss/pairs": Sum.of(jnp.sum(jnp.square(pairs @ params["up"]["kernel"]), axis=(1, 2)))}

    trainer(objective=objective, accumulation=16, block=2).step(rows())
    with pytest.raises(TypeError) as caught:
        trainer(objective=objective, accumulation=32).step(rows())
    assert any("a microbatch of 1 of 32 examples" in note and "block=" in note for note in caught.value.__notes__)


def test_global_norm_of_half_precision_is_float32():
    tree = {"a": jnp.full((300,), 2.0, jnp.bfloat16), "b": jnp.full((2, 2), 3.0)}
    assert global_norm(tree).dtype == jnp.float32
    np.testing.assert_allclose(global_norm(tree), np.sqrt(300 * 4 + 4 * 9), rtol=1e-6)
    assert float(global_norm({})) == 0


BROKEN = {
    "the loss": lambda batch: batch | {"y": np.where(np.arange(8) == 0, np.nan, batch["y"])},
    "an overflow": lambda batch: batch | {"y": batch["y"] * np.float32(1e25)},
}


@pytest.mark.latest
@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_but_step(how, accumulation):
    t = trainer(optax.adam(1e-2), extras={"ema": ema(0.9)}, accumulation=accumulation, clip=1.0)
    window = t.step(rows(0))
    before, seen = host(t.state), host(window)
    window = t.step(BROKEN[how](rows(1)), window)
    after = host(t.state)
    same((after.params, after.opt_state, after.extra), (before.params, before.opt_state, before.extra))
    assert int(after.step) == int(before.step) + 1 == 2
    skipped = finalize(host(window))
    assert skipped["nonfinite"] == 0.5 and skipped["nonfinite_first"] == -1.0
    for name, entry in seen.items():  # what the bad step saw is not in the metrics
        if name not in ("nonfinite", "nonfinite_first"):
            same(entry, jax.tree.map(np.asarray, host(window)[name]))
    window = t.step(rows(2), window)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(t.state.params))
    assert finalize(host(window))["nonfinite"] == pytest.approx(1 / 3)
    assert not np.array_equal(host(t.state.params)["down"]["kernel"], after.params["down"]["kernel"])


def test_a_metric_that_is_not_finite_stops_nothing():
    def objective(params, batch, key):
        return regression(params, batch, key) | {"odd": Sum(jnp.float32(np.nan), jnp.float32(1))}

    t = trainer(objective=objective)
    before = host(t.state.params)
    values = finalize(host(t.step(rows())))
    assert values["nonfinite"] == 0 and np.isnan(values["odd"]) and np.isfinite(values["loss/mse"])
    assert not np.array_equal(before["up"]["kernel"], t.state.params["up"]["kernel"])


def test_frozen_leaves_do_not_move_and_have_no_optimizer_state():
    t = trainer(optax.adam(1e-1), FSDP, frozen=("^down/",))
    before = host((t.state.params, t.state.frozen))
    names = {name for name, _ in named_leaves(t.state.opt_state)}
    assert names and not any("down" in name for name in names)
    for seed in range(2):
        t.step(rows(seed))
    same(before[1], t.state.frozen)
    assert set(t.state.params) == {"up"} and set(t.state.frozen) == {"down"}
    assert not np.array_equal(before[0]["up"]["kernel"], t.state.params["up"]["kernel"])


@pytest.mark.latest
def test_optimizer_state_lies_like_its_parameters():
    """By type and as compiled: under fsdp nothing that belongs to a sharded parameter is replicated."""
    t = trainer(optax.adam(1e-2), FSDP, extras={"ema": ema(0.9)})
    specs = {path: x.sharding.spec for path, x in named_leaves(t.state.params)}
    assert specs["up/kernel"] == P("fsdp", None) and specs["down/kernel"] == P(None, "fsdp")
    compiled = t.compiled(rows())
    placed = compiled.input_shardings[0][0]
    returned = compiled.output_shardings[0]
    for tree in (t.state, placed, returned):
        parts = {
            "mu": tree.opt_state[0].mu,
            "nu": tree.opt_state[0].nu,
            "ema": tree.extra["ema"],
            "params": tree.params,
        }
        for part, moments in parts.items():
            for path, x in named_leaves(moments):
                sharding = getattr(x, "sharding", x)
                expected = jax.NamedSharding(t.mesh, specs[path])
                shape = t.state.params[path.split("/")[0]][path.split("/")[1]].shape
                assert sharding.is_equivalent_to(expected, len(shape)), (part, path)
                if path.endswith("kernel"):
                    assert not sharding.is_fully_replicated, (part, path)
    t.step(rows())
    moments = t.state.opt_state[0].mu["up"]["kernel"]
    assert {shard.data.shape for shard in moments.addressable_shards} == {(1, 16)}


@pytest.mark.latest
def test_parameters_are_made_in_place_and_the_same_on_every_mesh():
    start = lambda key: jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), init(key))
    one, many = trainer(start=start), trainer(layout={"data": 2, "fsdp": 2, "tensor": 2}, start=start)
    same(host(one.state.params), host(many.state.params))
    up = many.state.params["up"]["kernel"]
    assert up.sharding.spec == P("fsdp", "tensor") and up.addressable_shards[0].data.shape == (4, 8)
    for _, leaf in named_leaves(many.state):
        assert leaf.sharding.mesh == many.mesh


def test_a_state_can_be_planned_without_being_made():
    mesh = mesh_of(**FSDP)
    make = lambda: init_state(init, jax.random.key(0), optax.adam(1e-2), mesh, RULES, extras={"ema": ema(0.9)})
    with jax.set_mesh(mesh):
        planned, real = jax.eval_shape(make), abstract_state(make())
    for (path, a), (_, b) in zip(named_leaves(planned), named_leaves(real), strict=True):
        assert (a.shape, a.dtype, a.sharding.spec) == (b.shape, b.dtype, b.sharding.spec), path


@pytest.mark.latest
def test_programs_are_what_is_run():
    t = trainer(optax.adam(1e-2), FSDP, accumulation=2)
    with jax.set_mesh(t.mesh):
        (program,) = t.built.programs(abstract_state(t.state), rows())
        assert program.name == "train_step"
        compiled = program.fn.lower(*program.args).compile()
        empty = t.built.empty_window(t.state, rows())
        batch = jax.device_put(rows(), batch_sharding(t.mesh))
        state, sums = jax.block_until_ready(compiled(t.state, batch, empty))
    other = trainer(optax.adam(1e-2), FSDP, accumulation=2)
    same(host(sums), host(other.step(rows())))
    same(host(state), host(other.state))


@pytest.mark.latest
def test_half_precision_computes_but_gradients_and_sums_are_float32():
    seen = {}

    def objective(params, batch, key):
        seen["params"] = {path: x.dtype for path, x in named_leaves(params)}
        return regression(params, batch, key)

    grads = {}
    spy = optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda g, s, p=None: (grads.update(dtypes={x.dtype for x in jax.tree.leaves(g)}) or g, s),
    )
    t = trainer(optax.chain(spy, optax.sgd(0.1)), objective=objective, compute_dtype=jnp.bfloat16, accumulation=2)
    reference = trainer()
    sums = t.step(rows())
    expected = finalize(host(reference.step(rows())))
    assert set(seen["params"].values()) == {jnp.dtype(jnp.bfloat16)}
    assert grads["dtypes"] == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(t.state.params)} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(sums)} == {jnp.dtype(jnp.float32)}
    values = finalize(host(sums))
    assert values["loss/mse"] == pytest.approx(expected["loss/mse"], rel=2e-2)
    assert values["loss/mse"] != expected["loss/mse"]


def test_half_precision_parameters_are_stored_so():
    t = trainer(optax.adam(1e-2), dtype=jnp.bfloat16)
    t.step(rows())
    assert {x.dtype for x in jax.tree.leaves(t.state.params)} == {jnp.dtype(jnp.bfloat16)}


def test_cast_leaves_integers_alone():
    tree = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.int32)}
    out = cast(tree, jnp.bfloat16)
    assert out["a"].dtype == jnp.bfloat16 and out["b"].dtype == jnp.int32
    assert cast(tree, None) is tree


def test_moving_average_is_numpys():
    decay, t = 0.5, trainer(extras={"ema": ema(0.5)})
    average = jax.tree.map(lambda x: np.asarray(x, np.float64), host(t.state.params))
    same(host(t.state.extra["ema"]), host(t.state.params))
    for step in range(6):
        t.step(rows(step))
        rate = min(decay, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p, r=rate: r * a + (1 - r) * p, average, host(t.state.params))
    for (path, x), (_, y) in zip(named_leaves(t.state.extra["ema"]), named_leaves(average), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7, err_msg=path)


def test_an_extra_sees_the_sums_of_the_global_batch():
    """A running baseline of the loss: what a KL controller or a logQ estimate does."""
    baseline = Extra(
        init=lambda params: jnp.zeros(()),
        update=lambda value, params, sums, step, batch: (
            0.5 * value + 0.5 * sums["loss/mse"].total / sums["loss/mse"].count
        ),
    )
    t = trainer(layout={"data": 8}, extras={"baseline": baseline}, accumulation=4)
    expected = 0.0
    for seed in range(2):
        values = finalize(host(t.step(rows(seed))))
        expected = 0.5 * expected + 0.5 * values["loss/mse"]
        assert float(t.state.extra["baseline"]) == pytest.approx(expected, rel=1e-5)


def test_an_extra_reads_into_the_batch_what_it_knew_before_the_step():
    """Counts of what came up, as a logQ correction needs them: read before, updated after, from the global batch."""
    counts = Extra(
        init=lambda params: jnp.zeros(()),
        update=lambda value, params, sums, step, batch: value + jnp.sum(batch["weight"]),
        read=lambda value, batch: {"before": jnp.broadcast_to(value, batch["weight"].shape)},
    )

    def objective(params, batch, key):
        return {**regression(params, batch, key), "before": Sum.of(batch["before"])}

    for layout, accumulation in (({"data": 1}, 1), ({"data": 8}, 2)):
        t = trainer(layout=layout, extras={"counts": counts}, accumulation=accumulation, objective=objective)
        expected = 0.0
        for seed in range(3):
            values = finalize(host(t.step(rows(seed))))
            assert values["before"] == pytest.approx(expected, rel=1e-6)
            expected += float(np.sum(rows(seed)["weight"]))


def test_dropout_differs_from_step_to_step_and_repeats_with_the_seed():
    def objective(params, batch, key):
        return regression(params, batch | {"x": batch["x"] + jax.random.normal(key, (1, 8))}, key)

    def run(seed):
        t = trainer(optax.sgd(0.0), objective=objective, seed=seed)
        return [finalize(host(t.step(rows())))["loss/mse"] for _ in range(2)]

    first = run(1)
    assert first[0] != first[1] and first == run(1) and first != run(2)


TABLE_ROWS, WIDTH = 12, 8


@dataclasses.dataclass(frozen=True)
class DenseTable:
    """The smallest thing that keeps the protocol: a replicated table, one plan a step, SGD on touched rows."""

    lr: float

    def init(self, key):
        return {"w": jax.random.normal(jax.random.key(9), (TABLE_ROWS, WIDTH))}

    def lookup(self, tables, batch):
        take = jax.sharding.auto_axes(lambda w, unique: w[unique], out_sharding=P())
        return {"w": take(tables["w"], batch["unique"])}

    def expand(self, rows, batch):
        return rows

    def metrics(self, batch):
        return {}

    def apply(self, tables, batch, row_grads, keep):
        def write(w, unique, grads, keep):
            return w.at[unique].add(jnp.where(keep, -self.lr * grads, 0))

        out = jax.typeof(tables["w"]).sharding.spec
        return {
            "w": jax.sharding.auto_axes(write, out_sharding=out)(tables["w"], batch["unique"], row_grads["w"], keep)
        }


def with_features(batch):
    """Two features an example, planned: unique ids (padded with row 0), and where each id went."""
    rng = np.random.default_rng(batch["id"][0])
    ids = rng.integers(0, TABLE_ROWS, (len(batch["id"]), 2)).astype(np.int32)
    unique, slot = np.unique(ids, return_inverse=True)
    padded = np.zeros(len(batch["id"]), np.int32)
    padded[: len(unique)] = unique
    return batch | {"features": ids, "unique": padded, "slot": slot.reshape(ids.shape).astype(np.int32)}


def from_table(params, batch, key):
    return regression(params, batch | {"x": batch["rows"]["w"][batch["slot"]].sum(1)}, key)


def from_parameter(params, batch, key):
    dense = {name: params[name] for name in ("up", "down")}
    return regression(dense, batch | {"x": params["table"][batch["features"]].sum(1)}, key)


def init_with_table(key):
    return init(key) | {"table": jax.random.normal(jax.random.key(9), (TABLE_ROWS, WIDTH))}


@pytest.mark.latest
@pytest.mark.parametrize(("layout", "accumulation"), [({"data": 1}, 1), ({"data": 1}, 4), ({"data": 8}, 4)])
def test_a_table_outside_params_trains_like_a_parameter(layout, accumulation):
    options = {"layout": layout, "accumulation": accumulation}
    outside = trainer(objective=from_table, tables=DenseTable(0.1), **options)
    inside = trainer(objective=from_parameter, start=init_with_table)
    assert outside.built.reduction == "plain"
    for seed in range(4):
        batch = with_features(rows(seed))
        if seed == 2:  # skipped: neither the parameters nor a row of the table may move
            before = host((outside.state.params, outside.state.tables))
            batch["y"][3] = np.nan
            outside.step(batch)
            same(before, host((outside.state.params, outside.state.tables)))
        else:
            outside.step(batch)
            inside.step(batch)
    np.testing.assert_allclose(outside.state.tables["w"], inside.state.params["table"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        outside.state.params["up"]["kernel"], inside.state.params["up"]["kernel"], rtol=1e-5, atol=1e-6
    )
    assert int(outside.state.step) == 4


def test_a_row_gradient_that_is_not_finite_is_skipped_too():
    """The loss and every dense gradient are finite; only d sqrt(row) at zero is not."""

    def objective(params, batch, key):
        sums = regression(params, batch, key)
        root = jnp.sqrt(jnp.abs(batch["rows"]["w"][batch["slot"]].sum((1, 2))) * 0)
        return sums | {"loss/root": Sum.of(root, batch["weight"])}

    t = trainer(objective=objective, tables=DenseTable(0.1))
    before = host((t.state.params, t.state.tables))
    values = finalize(host(t.step(with_features(rows()))))
    assert values["nonfinite"] == 1
    same(before, host((t.state.params, t.state.tables)))


def test_learning_happens():
    """A regression that can be solved is solved: 60 steps of Adam on four layouts' worth of machinery."""
    t = trainer(optax.adam(3e-2), {"data": 2, "fsdp": 2, "tensor": 2}, accumulation=2, clip=10.0)
    truth = host(init(None, scale=0.7))
    losses = []
    for seed in range(60):
        batch = rows(seed, odd=np.zeros(32, np.float32))
        batch["y"] = np.asarray(predict(truth, batch["x"]))
        losses.append(finalize(host(t.step(batch)))["loss/mse"])
    assert losses[-1] < 0.1 * losses[0]
