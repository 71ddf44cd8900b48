"""DCNv2 against numpy float64: full and low rank, beside and below the deep tower."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import feature_batch, moved_params, numpy_mlp

from jaxops.core.failures import UserError
from jaxops.core.mesh import make_mesh
from jaxops.core.sharding import named_leaves, place
from jaxops.models.dcn import DCNv2, DCNv2Config
from jaxops.models.inputs import Input

BATCH, DIM, NUMERIC = 5, 4, 3
INPUTS = [Input(name="user", dim=DIM), Input(name="item", dim=2), Input(name="tags", dim=DIM, bag=True)]
KEY = jax.random.key(1)


def example_batch(seed=0, size=BATCH):
    return feature_batch({"user": DIM, "item": 2, "tags": DIM}, NUMERIC, seed, size)


WIDTH = NUMERIC + DIM + 2 + DIM


def model_and_params(numeric=NUMERIC, outputs=1, **changes):
    model = DCNv2(DCNv2Config(**{"cross_layers": 2, "deep": (8, 5), **changes}), INPUTS, numeric, outputs)
    return model, moved_params(model)


def numpy_dcn(params, batch, numeric, structure):
    params, batch = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, batch))
    out = []
    for example in range(len(batch["id"])):
        there = (batch["tags"][example] >= 0) * batch["tags/weight"][example]
        bag = (there[:, None] * batch["rows"]["tags"][example]).sum(0) / max(there.sum(), 1e-30)
        numbers = [batch["numeric"][example]] if numeric else []
        first = np.concatenate([*numbers, batch["rows"]["user"][example], batch["rows"]["item"][example], bag])
        x = first
        for at in range(sum(name.startswith("cross_") for name in params)):
            p = params[f"cross_{at}"]
            inner = p["down"]["kernel"] @ p["up"]["kernel"] if "down" in p else p["up"]["kernel"]
            x = first * (x @ inner + p["up"]["bias"]) + x
        if structure == "stacked":
            x = numpy_mlp(x, params["deep"])
        else:
            x = np.concatenate([x, numpy_mlp(first, params["deep"])])
        heads = [params["heads"][f"head_{at}"] for at in range(len(params["heads"]))]
        out.append([(numpy_mlp(x, h.get("tower", {})) @ h["out"]["kernel"] + h["out"]["bias"])[0] for h in heads])
    out = np.asarray(out)
    return out[:, 0] if out.shape[1] == 1 else out


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"rank": 3, "cross_layers": 3}, {"numeric": 0}, {"outputs": 2}, {"outputs": 2, "heads": (6,)}],
    ids=str,
)
def test_the_logits_are_numpys(changes, structure):
    model, params = model_and_params(structure=structure, **changes)
    batch, numeric, outputs = example_batch(), changes.get("numeric", NUMERIC), changes.get("outputs", 1)
    if not numeric:
        del batch["numeric"]
    found = jax.jit(lambda params, batch: model.apply(params, batch, None))(params, batch)
    assert found.dtype == jnp.float32 and found.shape == ((BATCH,) if outputs == 1 else (BATCH, outputs))
    np.testing.assert_allclose(found, numpy_dcn(params, batch, numeric, structure), rtol=2e-5, atol=2e-5)


def test_a_low_rank_has_fewer_parameters():
    full, low = model_and_params()[1]["cross_0"], model_and_params(rank=2)[1]["cross_0"]
    assert {path: x.shape for path, x in named_leaves(full)} == {"up/kernel": (WIDTH, WIDTH), "up/bias": (WIDTH,)}
    assert {path: x.shape for path, x in named_leaves(low)} == {
        "down/kernel": (WIDTH, 2),
        "up/kernel": (2, WIDTH),
        "up/bias": (WIDTH,),
    }


def test_gradients_are_finite_with_an_empty_bag():
    model, params = model_and_params(rank=3)
    batch = example_batch()
    loss = lambda params, rows: jnp.sum(jnp.square(model.apply(params, {**batch, "rows": rows}, KEY)))
    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, batch["rows"])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads))
    np.testing.assert_array_equal(grads[1]["tags"][0], 0)
    assert np.any(np.asarray(grads[1]["user"][0]) != 0)


def test_half_precision_gives_float32_logits_that_are_not_rounded():
    model, params = model_and_params(rank=3)
    batch = example_batch(size=512)
    cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    found = jax.jit(lambda p, b: model.apply(p, b, KEY))(cast(params), {**batch, "rows": cast(batch["rows"])})
    assert found.dtype == jnp.float32
    exact = np.asarray(model.apply(params, batch, None))
    np.testing.assert_allclose(found, exact, atol=0.03 * np.abs(exact).max(), rtol=0.1)
    rounded = np.asarray(found.astype(jnp.bfloat16).astype(jnp.float32))
    assert np.mean(rounded != np.asarray(found)) > 0.9


def test_dropout_is_of_the_example_and_off_without_a_key():
    model, params = model_and_params(dropout=0.5)
    batch = example_batch()
    run = jax.jit(lambda batch, key: model.apply(params, batch, key))
    whole, order = np.asarray(run(batch, KEY)), np.asarray([3, 0, 4, 1, 2])
    np.testing.assert_allclose(run(jax.tree.map(lambda x: x[order], batch), KEY), whole[order], rtol=1e-5, atol=1e-6)
    assert not np.allclose(whole, run(batch, None))
    assert not np.allclose(whole, run({**batch, "id": batch["id"] + 10}, KEY))


def test_nothing_to_cross_is_refused():
    with pytest.raises(UserError, match="at least one feature or number"):
        DCNv2(DCNv2Config(), [], 0)


def test_layers_are_split_over_tensor_and_crosses_are_whole():
    inputs = [Input(name="user", dim=16), Input(name="item", dim=16)]
    model = DCNv2(DCNv2Config(rank=8), inputs, 0)
    placed = {p.path: p for p in place(model.shapes, model.rules, make_mesh(fsdp=4, tensor=2))}
    assert placed["deep/layer_0/kernel"].spec == jax.P(None, "tensor")
    assert placed["cross_0/down/kernel"].spec == placed["cross_0/up/kernel"].spec == jax.P()
    assert not any(p.dropped for p in placed.values())
    assert not any(p.spec for p in placed.values() if p.path.endswith("bias"))


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"cross_layers": 0}, "cross_layers"),
        ({"rank": 0}, "rank"),
        ({"deep": (0,)}, "deep"),
        ({"heads": (-1,)}, "heads"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_shapes_that_cannot_be(changes, path):
    assert [where for where, _ in DCNv2Config(**changes).problems()] == [path]
    assert DCNv2Config().problems() == []
