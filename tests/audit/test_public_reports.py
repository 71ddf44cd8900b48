"""Silent errors that others have reported of their trainers, and the like of them in an objective here: each is found.

* huggingface/transformers#24725, #34191: with gradient accumulation each microbatch's mean over tokens counts alike.
* huggingface/transformers#34242, PrimeIntellect-ai/prime-rl#2562: each device's mean over its tokens counts alike.
* huggingface/trl#805, meta-pytorch/torchtune#875: texts packed into one row attend to each other.
* google-deepmind/mujoco#2306, google/jaxopt#451: a value of weak type in the state compiles the step twice.
* jax-ml/jax#9675: a donated buffer that is not used again, with a warning at most.
* google/flax#4973: a vmapped module draws the same dropout for all examples.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from toys import mesh_of, predict, regression, regression_task, rows, trainer

from jaxops.audit.contract import ObjectiveCase, keys_finding, sums_finding
from jaxops.audit.programs import donation_finding, types_finding
from jaxops.audit.runs import recompiles_finding
from jaxops.audit.updates import case_of, packing_finding, update_findings
from jaxops.core.sums import Sum
from jaxops.plan.program import Compiled, placed
from jaxops.run import training


def mean_of_tokens(params, batch, key):
    entry = regression(params, batch, key)["loss/mse"]
    return {"loss/nll": Sum(entry.total / jnp.maximum(entry.count, 1), jnp.ones(()))}


def test_the_mean_of_each_microbatch():
    task = regression_task(mean_of_tokens)
    assert "count of loss/nll is not a sum" in sums_finding(case_of(task, 16)).why
    same, parts = update_findings(task, {"data": 2}, 16, steps=1)
    assert (same.verdict, parts.verdict) == ("passed", "failed") and parts.measured["gradient"] > 1e-3


def mean_of_devices(params, batch, key):
    def local(params, x, y, weight):
        error = jnp.sum(jnp.square(predict(params, x) - y), axis=-1)
        return jax.lax.pmean(jnp.sum(error * weight) / jnp.maximum(jnp.sum(weight), 1), "data")

    shard = jax.shard_map(local, in_specs=(P(), P("data"), P("data"), P("data")), out_specs=P())
    count = jnp.sum(batch["weight"])
    return {"loss/nll": Sum(shard(params, batch["x"], batch["y"], batch["weight"]) * count, count)}


def test_the_mean_of_each_device():
    same, _ = update_findings(regression_task(mean_of_devices), {"data": 4}, 16, steps=1)
    assert same.verdict == "failed" and same.measured["gradient"] > 1e-3 and "gradient by" in same.why


def reader(attends):
    """The next letter from the mean of what `attends` lets a place see."""

    def objective(params, batch, key):
        seen = attends(batch["segment"]) * jnp.tril(jnp.ones((8, 8)))[None]
        hidden = jnp.einsum("bts,bsd->btd", seen, params["table"][batch["tokens"]])
        logits = hidden @ params["head"]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return {"loss/nll": Sum.of(nll, batch["mask"])}

    return objective


def packed_rows():
    rng = np.random.default_rng(0)
    segment = np.array(
        [[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 2, 2, 3, 3, 3, 3], [1] * 8, [1, 1, 1, 1, 1, 0, 0, 0]], np.int32
    )
    tokens = rng.integers(0, 5, (2, 4, 8)).astype(np.int32)
    mask = (segment > 0).astype(np.float32)
    return {"id": np.arange(4), "tokens": tokens[0], "targets": tokens[1], "segment": segment, "mask": mask}


def test_texts_that_attend_to_the_text_before():
    params = {"table": 0.3 * jnp.ones((5, 4)) + jnp.eye(5, 4), "head": jnp.eye(4, 5)}
    own = lambda segment: (segment[:, :, None] == segment[:, None, :]).astype(jnp.float32)
    right = packing_finding(ObjectiveCase(reader(own), params, packed_rows()))
    assert right.verdict == "passed" and "2 packed rows are trained as 5 separate ones" in right.why
    wrong = packing_finding(ObjectiveCase(reader(lambda segment: jnp.ones((*segment.shape, 8))), params, packed_rows()))
    assert wrong.verdict == "failed" and wrong.measured > 1e-2 and "must not leave a segment" in wrong.why


def with_weak_scale():
    """Plain descent that keeps a scale, which begins as a number of Python."""
    init = lambda params: {"scale": 1.0}
    update = lambda grads, state, params=None: (
        jax.tree.map(lambda g: -0.1 * g, grads),
        {"scale": jnp.asarray(state["scale"], jnp.float32) * jnp.float32(0.9)},
    )
    return optax.GradientTransformation(init, update)


def test_a_weak_type_in_the_state():
    wrong, right = trainer(with_weak_scale()), trainer(optax.adam(0.1))
    for made, verdict in ((wrong, "failed"), (right, "passed")):
        with jax.set_mesh(made.mesh):
            (program,) = made.built.programs(jax.tree.map(abstract, made.state), rows())
            after = jax.eval_shape(program.fn, *program.args)[0]
        types = types_finding(program.args[0], after)
        again = recompiles_finding(made.built, made.state, [rows(at) for at in range(3)], made.mesh)
        assert (types.verdict, again.verdict) == (verdict, verdict)
        if verdict == "failed":
            assert "opt_state" in types.why and "weak" in types.why and again.measured == 1


def test_a_weak_type_is_not_lost_where_the_state_is_abstract():
    with jax.set_mesh(mesh_of(data=2)):
        found = training.abstract(lambda: {"weak": jnp.multiply(2.0, 3.0), "strong": jnp.float32(1)}, mesh_of(data=2))
        assert found["weak"].weak_type and not found["strong"].weak_type
        again = placed(found, mesh_of(data=2))
        assert again["weak"].weak_type and not again["strong"].weak_type


def abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, weak_type=jax.typeof(x).weak_type)


def test_a_donation_that_comes_to_nothing():
    """What the compiler says of two updates: one returns what it is given, one returns it narrower."""

    def compiled(update):
        lowered = jax.jit(update, donate_argnums=0).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32))
        memory = lowered.compile().memory_analysis()
        return Compiled(0.0, aliased=memory.alias_size_in_bytes, donated=64 * 64 * 4)

    right = compiled(lambda x: x + 1)
    try:
        wrong = compiled(lambda x: (x + 1).astype(jnp.bfloat16))
    except UserWarning:  # jax says so, and warnings are errors here
        wrong = Compiled(0.0, aliased=0, donated=64 * 64 * 4)
    assert donation_finding({"train_step": right}).verdict == "passed"
    found = donation_finding({"train_step": right, "other": wrong})
    assert found.verdict == "failed" and "other keeps 16.0 KiB of 16.0 KiB" in found.why


def test_the_same_dropout_for_all_examples():
    def dropped(params, batch, key):
        one = lambda x: x if key is None else jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0.0)
        return regression(params, batch | {"x": jax.vmap(one)(batch["x"])}, key)

    found = keys_finding(case_of(regression_task(dropped), 8))
    assert found.verdict == "failed" and "same draws, whatever their ids" in found.why
    assert mesh_of(data=1).size == 1
