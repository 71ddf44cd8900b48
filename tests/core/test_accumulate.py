"""Gradients of the global batch, however it is cut: against numpy, and where compiled programs reduce them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo_text import of_kind, operations
from jax.sharding import PartitionSpec as P
from toys import RULES, init, mesh_of, numpy_regression, regression, rows, trainer

from jaxops.core.accumulate import build_gradients, choose_reduction, microbatches
from jaxops.core.failures import UserError
from jaxops.core.mesh import batch_axes
from jaxops.core.random import example_keys
from jaxops.core.sharding import named_leaves, parameter_shardings
from jaxops.core.step import build_step
from jaxops.core.sums import Max, Sum, finalize


def gradients(batch, layout, accumulation, objective=regression, params=None, frozen=None, **options):
    """(sums, gradients, row gradients) on a mesh, by the reduction that the table chooses unless said otherwise."""
    mesh = mesh_of(**layout)
    params = init(jax.random.key(0)) if params is None else params
    if "reduction" not in options:
        replicated = mesh.shape["fsdp"] == mesh.shape["tensor"] == 1
        options["reduction"] = choose_reduction(
            dict(mesh.shape), replicated=replicated, accumulation=accumulation, tables=False
        )[0]

    def whole(both, batch, key):
        return objective({**both[0], **both[1]}, batch, key)

    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameter_shardings(params, RULES, mesh))
        run = build_gradients(whole, mesh, accumulation=accumulation, **options)

        @jax.jit
        def jitted(params, batch):
            batch = jax.tree.map(lambda x: jax.sharding.reshard(x, P(batch_axes(mesh))), batch)
            return run(params, frozen or {}, None, batch, jax.random.key(7))

        return jax.device_get(jax.block_until_ready(jitted(placed, batch)))


def close(found, expected, tolerance=1e-6):
    """Every entry within `tolerance` of the largest."""
    largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(expected))
    for (path, a), (_, b) in zip(named_leaves(found), named_leaves(expected), strict=True):
        assert np.max(np.abs(a - b)) <= tolerance * largest, path


TABLE = [
    ({}, True, 1, False, "plain", "one microbatch"),
    ({"data": 8}, True, 1, False, "plain", "one microbatch"),
    ({"data": 8}, True, 4, True, "plain", "looked-up rows"),
    ({"fsdp": 8}, False, 4, False, "plain", "parameters are sharded"),
    ({"data": 4, "tensor": 2}, True, 4, False, "plain", "the tensor axis cuts"),
    ({"data": 4, "sequence": 2}, True, 4, False, "plain", "the sequence axis cuts"),
    ({}, True, 4, False, "plain", "nothing to reduce over"),
    ({"data": 8}, True, 4, False, "after_loop", "one reduction after the accumulation loop"),
    ({"replica": 2, "data": 4}, True, 2, False, "after_loop", "one reduction"),
    ({"fsdp": 8}, True, 4, False, "after_loop", "one reduction"),
]


@pytest.mark.parametrize(("sizes", "replicated", "accumulation", "tables", "chosen", "why"), TABLE)
def test_every_row_of_the_table_of_reductions(sizes, replicated, accumulation, tables, chosen, why):
    found = choose_reduction(sizes, replicated=replicated, accumulation=accumulation, tables=tables)
    assert found[0] == chosen and why in found[1]


@pytest.mark.parametrize(
    ("layout", "rules", "accumulation", "chosen"),
    [
        ({"data": 8}, RULES, 1, "plain"),
        ({"data": 8}, RULES, 4, "after_loop"),
        ({"replica": 2, "data": 4}, RULES, 4, "after_loop"),
        ({"fsdp": 8}, RULES, 4, "plain"),
        ({"fsdp": 8}, None, 4, "after_loop"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, RULES, 4, "plain"),
        ({"data": 4, "tensor": 2}, None, 4, "plain"),
        ({"data": 8}, [("kernel", ("data",))], 4, "plain"),
        ({"replica": 2, "data": 4}, [("kernel", (None, ("replica", "fsdp")))], 4, "plain"),
    ],
)
def test_a_step_asks_the_table_with_the_rules_it_has(layout, rules, accumulation, chosen):
    step = build_step(regression, optax.sgd(0.1), mesh_of(**layout), rules=rules, accumulation=accumulation)
    assert step.reduction == chosen and step.reason


def test_microbatches_keep_blocks_together_and_rows_where_they_are():
    x = np.arange(24)
    cut = np.asarray(microbatches({"x": jnp.asarray(x)}, 3, 2)["x"])
    assert cut.shape == (3, 8) and sorted(cut.ravel()) == list(x)
    assert all((pair[0] % 2, pair[1]) == (0, pair[0] + 1) for pair in cut.reshape(-1, 2))
    # two devices hold rows 0-11 and 12-23: each half of a microbatch stays on its own
    assert (cut[:, :4] < 12).all() and (cut[:, 4:] >= 12).all()


LAYOUTS = [
    ({"data": 1}, 1),
    ({"data": 1}, 4),
    ({"data": 8}, 1),
    ({"data": 8}, 4),
    ({"fsdp": 8}, 4),
    ({"replica": 2, "data": 4}, 2),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 4),
]


@pytest.mark.latest
@pytest.mark.parametrize(("layout", "accumulation"), LAYOUTS)
def test_gradients_and_sums_are_numpys(layout, accumulation):
    """Ragged weights; with four microbatches one of them (every fourth row) has no weight at all."""
    batch = rows()
    batch["weight"][1::4] = 0
    batch["odd"][1::4] = 0
    weights = {"loss/size": 0.5}
    sums, found, row_grads = gradients(batch, layout, accumulation, weights=weights)
    _, expected, entries = numpy_regression(init(jax.random.key(0)), batch, (1.0, 0.5))
    close(found, expected)
    assert row_grads is None
    for name in ("loss/mse", "loss/size", "error"):
        np.testing.assert_allclose(sums[name].total, entries[name][0], rtol=1e-5)
        np.testing.assert_allclose(sums[name].count, entries[name][1], rtol=1e-6)
    np.testing.assert_allclose(sums["worst"].maximum, entries["worst"], rtol=1e-5)


@pytest.mark.parametrize(("layout", "accumulation"), [({"data": 8}, 4), ({"data": 1}, 1)])
def test_a_term_that_counts_nothing_contributes_nothing(layout, accumulation):
    batch = rows(weight=np.zeros(32, np.float32))
    sums, found, _ = gradients(batch, layout, accumulation)
    close(found, numpy_regression(init(jax.random.key(0)), batch)[1])
    assert np.isnan(finalize(sums)["loss/mse"]) and np.isfinite(finalize(sums)["loss/size"])


def test_padding_may_hold_anything():
    batch = rows()
    clean = numpy_regression(init(jax.random.key(0)), batch)[1]
    batch["y"][batch["weight"] == 0] = 1e30  # the error overflows
    close(gradients(batch, {"data": 8}, 4)[1], clean)


def noisy(params, batch, key):
    """Noise per example, and one draw that the step shares."""
    keys = example_keys(key, batch["id"])
    noise = jax.vmap(lambda k: jax.random.normal(k, (8,)))(keys) + jax.random.normal(key, (1, 8))
    return regression(params, batch | {"x": batch["x"] + noise}, key)


def by_position(params, batch, key):
    return regression(params, batch | {"x": batch["x"] + jax.random.normal(key, batch["x"].shape)}, key)


@pytest.mark.latest
def test_every_microbatch_gets_the_same_key():
    one = gradients(rows(), {"data": 1}, 1, noisy)[1]
    close(gradients(rows(), {"data": 1}, 4, noisy)[1], one)
    close(gradients(rows(), {"data": 8}, 4, noisy)[1], one)
    with pytest.raises(AssertionError):
        close(gradients(rows(), {"data": 1}, 4, by_position)[1], gradients(rows(), {"data": 1}, 1, by_position)[1])


def paired(params, batch, key):
    """Each example against its neighbour: coupled inside blocks of two."""
    out = regression_output(params, batch["x"]).reshape(-1, 2, 8)
    logits = jnp.einsum("bid,bjd->bij", out, batch["y"].reshape(-1, 2, 8))
    loss = -jax.nn.log_softmax(logits, axis=-1)[:, jnp.arange(2), jnp.arange(2)].reshape(-1)
    return {"loss/pair": Sum.of(loss, batch["weight"])}


def regression_output(params, x):
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None]) @ params["down"]["kernel"]


def test_blocks_are_never_parted():
    params = init(jax.random.key(0))
    params["down"].pop("bias")
    one = gradients(rows(), {"data": 1}, 1, paired, params)[1]
    close(gradients(rows(), {"data": 1}, 4, paired, params, block=2)[1], one)
    close(gradients(rows(), {"data": 4}, 4, paired, params, block=2)[1], one)


def test_frozen_parameters_are_read_and_not_differentiated():
    params = init(jax.random.key(0))
    frozen = {"down": params.pop("down")}
    found = gradients(rows(), {"data": 8}, 4, params=params, frozen=frozen)[1]
    assert set(found) == {"up"}
    close(found, {"up": numpy_regression(init(jax.random.key(0)), rows())[1]["up"]})


def test_a_finalizer_made_inside_the_objective():
    """A new function at every trace must not look like another structure."""

    def objective(params, batch, key):
        sums = regression(params, batch, key)
        mse, worst = sums["loss/mse"], sums["worst"]
        return sums | {
            "rmse": Sum(mse.total, mse.count, lambda x: np.sqrt(x)),
            "norm": Max(worst.maximum, lambda x: x + 1),
        }

    sums = gradients(rows(), {"data": 8}, 4, objective)[0]
    values = finalize(sums)
    assert values["rmse"] == pytest.approx(values["loss/mse"] ** 0.5)
    assert values["norm"] == pytest.approx(values["worst"] + 1)
    trained = trainer(objective=objective, accumulation=2)
    window = trained.step(rows(1), trained.step(rows(0)))
    assert finalize(jax.device_get(window))["rmse"] > 0
    assert trained.built._jitted._cache_size() == 1


def test_half_precision_parameters_accumulate_in_float32():
    """512 microbatches of equal gradients: bfloat16 sums would stop growing at 256."""

    def objective(params, batch, key):
        return {"loss/a": Sum.of(batch["x"] * params["w"].astype(jnp.float32), jnp.ones_like(batch["x"]))}

    found = gradients({"x": np.ones(512, np.float32)}, {"data": 1}, 512, objective, {"w": jnp.ones((), jnp.bfloat16)})[
        1
    ]
    assert found["w"].dtype == jnp.bfloat16 and float(found["w"]) == 1.0


def test_what_an_objective_returns_is_checked_while_tracing():
    with pytest.raises(UserError, match="nothing to minimise"):
        gradients(rows(), {"data": 8}, 4, lambda p, b, k: {"m": Sum.of(b["x"])})
    with pytest.raises(UserError, match="weight for loss/typo"):
        gradients(rows(), {"data": 1}, 1, weights={"loss/typo": 1.0})


SMALL = 8
"""Entries of anything that is not a gradient: totals, counts, norms."""


def large_reductions(text):
    return [op for op in of_kind(text, "all-reduce", "reduce-scatter") if op.largest > SMALL]


@pytest.mark.latest
@pytest.mark.parametrize("layout", [{"data": 8}, {"replica": 2, "data": 4}])
def test_after_loop_reduces_gradients_once_outside_the_loop(layout):
    batch = rows()
    text = trainer(optax.adam(1e-2), layout, accumulation=4).compiled(batch).as_text()
    assert any(op.loop for op in operations(text) if op.kind == "dot"), "the accumulation loop was unrolled away"
    large = large_reductions(text)
    sizes = [x.size for x in jax.tree.leaves(init(jax.random.key(0)))]
    assert len(large) == 1 and large[0].loop is None
    assert sum(sizes) <= large[0].entries <= sum(sizes) + SMALL
    assert not [op for op in of_kind(text, "all-reduce", "all-gather", "reduce-scatter", "all-to-all") if op.loop]


def test_plain_under_data_with_one_microbatch_reduces_each_gradient_once():
    text = trainer(optax.adam(1e-2), {"data": 8}).compiled(rows()).as_text()
    sizes = [x.size for x in jax.tree.leaves(init(jax.random.key(0)))]
    large = large_reductions(text)
    assert sum(op.entries for op in large) <= sum(sizes) + SMALL


@pytest.mark.latest
def test_plain_with_sharded_parameters_reduces_inside_the_loop():
    """What the table says of fsdp: so the count above can tell the two apart."""
    text = trainer(optax.adam(1e-2), {"fsdp": 8}, accumulation=4).compiled(rows()).as_text()
    assert any(op.loop for op in large_reductions(text))


@pytest.mark.latest
def test_the_counts_only_pass_has_no_model_in_it():
    """One device: two loops, the first without a matmul; and no more matmuls than one microbatch needs."""
    count_dots = lambda t: sum(op.kind == "dot" for op in t)
    alone = operations(trainer().compiled(rows()).as_text())
    accumulated = operations(trainer(accumulation=4).compiled(rows()).as_text())
    loops = {op.loop for op in accumulated} - {None}
    assert len(loops) == 2
    dots = sorted(count_dots(op for op in accumulated if op.loop == loop) for loop in loops)
    assert dots == [0, count_dots(alone)]
    assert count_dots(op for op in accumulated if op.loop is None) == 0
