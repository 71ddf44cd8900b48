"""Errors of programs, planted one by one: each is found in what is traced or compiled, without running."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from toys import RULES, init, mesh_of, predict, regression, rows, trainer

from jaxops.audit.programs import (
    collectives_finding,
    donation_finding,
    fence_finding,
    host_finding,
    promotions_finding,
    replicated_finding,
)
from jaxops.core.fence import unconstrained_kernels
from jaxops.core.fresh_state import abstract_state
from jaxops.core.sharding import constrain, place
from jaxops.core.sums import Sum
from jaxops.plan.collectives import Collective, collectives
from jaxops.plan.program import Compiled

SHAPES = jax.eval_shape(init, None)


def jaxpr_of(made, batch):
    with jax.set_mesh(made.mesh):
        program = made.built.programs(made.state, batch)[0]
        return program.fn.trace(*program.args).jaxpr


def test_a_callback_in_a_step():
    def printing(params, batch, key):
        jax.debug.print("mean {}", jnp.mean(batch["x"]))
        return regression(params, batch, key)

    def asking(params, batch, key):
        scaled = jax.pure_callback(lambda w: np.asarray(w), batch["weight"], batch["weight"])
        return regression(params, batch | {"weight": scaled}, key)

    for objective, word in ((printing, "debug"), (asking, "pure_callback")):
        found = host_finding({"train_step": jaxpr_of(trainer(objective=objective, accumulation=2), rows())})
        assert found.verdict == "failed" and word in found.why and "train_step" in found.why
    assert host_finding({"train_step": jaxpr_of(trainer(), rows())}).verdict == "passed"


def promotions(objective, compute=jnp.float32):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rows())
    with jax.set_mesh(mesh_of(data=1)), jax.numpy_dtype_promotion("standard"):
        return promotions_finding(
            jax.sharding.auto_axes(objective, out_sharding=P()), SHAPES, shapes, jnp.dtype(compute)
        )


def test_products_that_are_wider_than_the_config():
    """Data in float32 times kernels in bfloat16 is a product in float32: half the speed, and nobody is told."""

    def uncast(params, batch, key):
        error = predict(params, batch["x"]) - batch["y"]
        return {"loss/mse": Sum.of(jnp.sum(error**2, axis=-1), batch["weight"])}

    found = promotions(uncast, jnp.bfloat16)
    assert found.verdict == "failed" and found.measured == 1.0 and "cast the data" in found.why
    right = promotions(regression, jnp.bfloat16)
    assert right.verdict == "passed" and right.measured == 0.0
    assert promotions(uncast).verdict == "passed"  # in float32 there is nothing to widen


def test_float64_that_nobody_asked_for():
    def doubled(params, batch, key):
        entry = regression(params, batch, key)["loss/mse"]
        return {"loss/mse": Sum(entry.total * jnp.asarray(np.float64(2.0)), entry.count)}

    with jax.enable_x64(True), warnings.catch_warnings():
        found = promotions(doubled)
    assert found.verdict == "failed" and "float64" in found.why


def test_the_fence_is_told_with_its_line():
    unconstrained = lambda params, batch: regression(params, batch, None)
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    placed = place(SHAPES, RULES, mesh)
    found = fence_finding(unconstrained_kernels(unconstrained, SHAPES, rows(), mesh=mesh, placed=placed))
    assert found.verdict == "failed" and "kernel reaches dot_general at" in found.why

    def gathered(params, batch, key):
        held = {
            "up": params["up"] | {"kernel": constrain(params["up"]["kernel"], ("embed", "mlp"))},
            "down": params["down"] | {"kernel": constrain(params["down"]["kernel"], ("mlp", "embed"))},
        }
        return regression(held, batch, key)

    with_key = lambda params, batch: gathered(params, batch, None)
    assert fence_finding(unconstrained_kernels(with_key, SHAPES, rows(), mesh=mesh, placed=placed)).verdict == "passed"
    assert fence_finding(None).verdict == "not applicable"


def test_a_large_array_on_every_device():
    wide = lambda key: init(key) | {"table": jnp.ones((64, 16))}
    reading = lambda params, batch, key: regression(params, batch | {"y": batch["y"] + params["table"][0, :8]}, key)

    def found(rules, layout, large=1024):
        with jax.numpy_rank_promotion("allow"):
            made = trainer(layout=layout, objective=reading, start=wide, rules=rules)
            program = jaxpr_of(made, rows())
        return replicated_finding(abstract_state(made.state), program, dict(made.mesh.shape), large)

    split = [("table", ("fsdp",)), ("", ())]
    wrong = found([("", ())], {"fsdp": 4})
    assert wrong.verdict == "failed" and "table (4.0 KiB)" in wrong.why and "fsdp could divide it" in wrong.why
    assert found(split, {"fsdp": 4}).verdict == "passed"
    assert found([("", ())], {"data": 4}).verdict == "not applicable"
    assert found([("", ())], {"fsdp": 4}, large=2**20).verdict == "passed"


def test_an_array_that_the_step_closes_over():
    held = jnp.asarray(np.random.default_rng(0).normal(size=(32, 8)), jnp.float32)
    closing = lambda params, batch, key: regression(params, batch | {"y": batch["y"] + held}, key)
    made = trainer(objective=closing)
    found = replicated_finding(abstract_state(made.state), jaxpr_of(made, rows()), dict(made.mesh.shape), 512)
    assert found.verdict == "failed" and "closes over 1.0 KiB" in found.why


def test_a_donation_that_fails():
    good, bad = Compiled(0, aliased=100, donated=100), Compiled(0, aliased=40, donated=100)
    assert donation_finding({"a": good}).verdict == "passed"
    found = donation_finding({"a": good, "b": bad})
    assert found.verdict == "failed" and "b keeps 60 B of 100 B" in found.why and "a keeps" not in found.why
    assert donation_finding({"c": Compiled(0)}).verdict == "not applicable"


def exchanged(objective, layout, **options):
    made = trainer(objective=objective, layout=layout, rules=[("", ())], **options)
    batch = rows(0, 128)
    text = made.compiled(batch).as_text()
    state, sizes = abstract_state(made.state), dict(made.mesh.shape)
    found = collectives(text, sizes)
    return collectives_finding(found, state, options.get("accumulation", 1), sizes, coupled=False)


def test_gradients_that_are_reduced_in_a_loop(monkeypatch):
    """A scan over chunks of the batch adds up each chunk's gradient over the devices: as often as there are chunks."""
    monkeypatch.setattr("jaxops.audit.programs.LARGE", 0)

    def chunked(params, batch, key):
        def add(total, part):
            x, y, weight = part
            error = jnp.sum(jnp.square(predict(params, x) - y), axis=-1)
            return total + jnp.sum(error * weight), None

        cut = lambda x: constrain(x.reshape(8, 16, *x.shape[1:]), (None, "batch", *[None] * (x.ndim - 1)))
        parts = (cut(batch["x"]), cut(batch["y"]), cut(batch["weight"]))
        total, _ = jax.lax.scan(jax.checkpoint(add), jnp.zeros(()), parts)
        return {"loss/mse": Sum(total, jnp.sum(batch["weight"]))}

    plain = exchanged(regression, {"data": 8})
    assert plain.verdict == "passed" and any(one["axes"] == ("data",) for one in plain.measured)
    wrong = exchanged(chunked, {"data": 8})
    assert wrong.verdict == "failed" and "of it in loops" in wrong.why and "all-reduce over data" in wrong.why


def test_what_is_coupled_or_looked_up_is_told_and_not_bounded():
    state = abstract_state(trainer(layout={"data": 2}).state)
    huge = [Collective("all-gather", ("data",), True, 3, 2**30, 2**30, False)]
    sizes = {"data": 2, "fsdp": 1, "tensor": 1}
    assert collectives_finding(huge, state, 1, sizes, coupled=True).verdict == "passed"
    found = collectives_finding(huge, state, 1, sizes, coupled=False)
    assert found.verdict == "failed" and "1.0 GiB over the batch axes, 1.0 GiB of it in loops" in found.why
    assert collectives_finding([], state, 1, {"data": 1}, coupled=False).verdict == "not applicable"
    across = [Collective("all-reduce", ("tensor",), True, 3, 2**30, 2**30, False)]
    assert collectives_finding(across, state, 1, {"data": 2, "tensor": 2}, coupled=False).verdict == "passed"


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        yield
