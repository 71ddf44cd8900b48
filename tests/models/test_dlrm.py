"""DLRM against numpy float64; what no layer of it may round, leak or refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import feature_batch, moved_params, numpy_mlp

from jaxops.core.failures import UserError
from jaxops.core.mesh import make_mesh
from jaxops.core.sharding import named_leaves, place
from jaxops.models.dlrm import DLRM, DLRMConfig
from jaxops.models.inputs import Input

BATCH, DIM, NUMERIC = 5, 4, 3
INPUTS = [Input(name="user", dim=DIM), Input(name="item", dim=DIM), Input(name="tags", dim=DIM, bag=True)]
KEY = jax.random.key(1)


def example_batch(seed=0, size=BATCH):
    return feature_batch({"user": DIM, "item": DIM, "tags": DIM}, NUMERIC, seed, size)


def model_and_params(numeric=NUMERIC, outputs=1, inputs=INPUTS, **changes):
    model = DLRM(DLRMConfig(bottom=(6,), top=(8, 5), **changes), inputs, numeric, outputs)
    return model, moved_params(model)


def numpy_dlrm(params, batch, numeric=NUMERIC):
    """Example by example, pair by pair."""
    params, batch = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, batch))
    out = []
    for example in range(len(batch["id"])):
        there = (batch["tags"][example] >= 0) * batch["tags/weight"][example]
        bag = (there[:, None] * batch["rows"]["tags"][example]).sum(0) / max(there.sum(), 1e-30)
        vectors = [batch["rows"]["user"][example], batch["rows"]["item"][example], bag]
        bottom = []
        if numeric:
            bottom = [numpy_mlp(batch["numeric"][example], params["bottom"])]
        vectors = bottom + vectors
        pairs = [vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i)]
        x = numpy_mlp(np.concatenate([*bottom, pairs]), params["top"])
        heads = [params["heads"][f"head_{at}"] for at in range(len(params["heads"]))]
        out.append([(numpy_mlp(x, h.get("tower", {})) @ h["out"]["kernel"] + h["out"]["bias"])[0] for h in heads])
    out = np.asarray(out)
    return out[:, 0] if out.shape[1] == 1 else out


@pytest.mark.parametrize(
    "changes",
    [{}, {"numeric": 0}, {"outputs": 3}, {"outputs": 2, "heads": (7, 3)}, {"heads": (4,)}],
    ids=str,
)
def test_the_logits_are_numpys(changes):
    model, params = model_and_params(**changes)
    batch = example_batch()
    numeric = changes.get("numeric", NUMERIC)
    if not numeric:
        del batch["numeric"]
        assert "bottom" not in params
    found = jax.jit(lambda params, batch: model.apply(params, batch, None))(params, batch)
    outputs = changes.get("outputs", 1)
    assert found.dtype == jnp.float32 and found.shape == ((BATCH,) if outputs == 1 else (BATCH, outputs))
    np.testing.assert_allclose(found, numpy_dlrm(params, batch, numeric), rtol=2e-5, atol=2e-5)


def test_gradients_are_finite_with_an_empty_bag():
    model, params = model_and_params()
    batch = example_batch()
    loss = lambda params, rows: jnp.sum(jnp.square(model.apply(params, {**batch, "rows": rows}, KEY)))
    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, batch["rows"])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads))
    np.testing.assert_array_equal(grads[1]["tags"][0], 0)
    assert np.any(np.asarray(grads[1]["user"][0]) != 0)


def test_half_precision_gives_float32_logits_that_are_not_rounded():
    """Logits rounded to bfloat16 are ties by the hundred, and AUC counts ties half."""
    model, params = model_and_params()
    batch = example_batch(size=512)
    cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    found = jax.jit(lambda p, b: model.apply(p, b, KEY))(cast(params), {**batch, "rows": cast(batch["rows"])})
    assert found.dtype == jnp.float32
    exact = np.asarray(model.apply(params, batch, None))
    np.testing.assert_allclose(found, exact, atol=0.03 * np.abs(exact).max(), rtol=0.1)
    rounded = np.asarray(found.astype(jnp.bfloat16).astype(jnp.float32))
    assert np.mean(rounded != np.asarray(found)) > 0.9


def test_rows_may_be_of_another_precision_than_the_parameters():
    model, params = model_and_params()
    batch = example_batch()
    batch["rows"]["user"] = batch["rows"]["user"].astype(jnp.bfloat16)
    assert model.apply(params, batch, None).dtype == jnp.float32


def test_dropout_is_of_the_example_and_off_without_a_key():
    model, params = model_and_params(dropout=0.5)
    batch = example_batch()
    run = jax.jit(lambda batch, key: model.apply(params, batch, key))
    whole, order = np.asarray(run(batch, KEY)), np.asarray([3, 0, 4, 1, 2])
    np.testing.assert_allclose(run(jax.tree.map(lambda x: x[order], batch), KEY), whole[order], rtol=1e-5, atol=1e-6)
    without = model_and_params()[0].apply(params, batch, None)  # XLA fuses otherwise outside of jit: the last bit
    np.testing.assert_allclose(run(batch, None), without, rtol=1e-5, atol=1e-6)
    assert not np.allclose(whole, run(batch, None))
    assert not np.allclose(whole, run({**batch, "id": batch["id"] + 10}, KEY))


@pytest.mark.parametrize(
    ("inputs", "numeric", "said"),
    [
        ([Input(name="user", dim=4), Input(name="item", dim=8)], 3, "user 4, item 8"),
        ([Input(name="user", dim=4)], 0, "user 4"),
        ([], 3, "expected two or more"),
    ],
)
def test_features_that_cannot_be_multiplied(inputs, numeric, said):
    with pytest.raises(UserError, match=said):
        DLRM(DLRMConfig(), inputs, numeric)


def test_layers_are_split_over_tensor_and_nothing_over_fsdp():
    model = DLRM(DLRMConfig(), INPUTS, NUMERIC, 2)
    placed = {p.path: p for p in place(model.shapes, model.rules, make_mesh(fsdp=4, tensor=2))}
    assert placed["top/layer_1/kernel"].spec == placed["bottom/layer_0/kernel"].spec == jax.P(None, "tensor")
    assert placed["bottom/out/kernel"].spec == placed["heads/head_1/out/kernel"].spec == jax.P()
    assert not any(p.spec for p in placed.values() if p.path.endswith("bias"))


@pytest.mark.latest
def test_fresh_parameters_are_what_shapes_says():
    model = DLRM(DLRMConfig(heads=(4,)), INPUTS, NUMERIC, 2)
    params = jax.jit(model.init)(jax.random.key(0))
    described = [(path, x.shape, x.dtype) for path, x in named_leaves(model.shapes)]
    assert described == [(path, x.shape, x.dtype) for path, x in named_leaves(params)]
    assert all(not np.any(x) for path, x in named_leaves(params) if path.endswith("bias"))
    std = float(jnp.std(params["top"]["layer_1"]["kernel"]))
    assert std == pytest.approx((2 / 128) ** 0.5, rel=0.1)  # He et al. 2015: 2 / fan in


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"bottom": (0,)}, "bottom"),
        ({"top": (8, -1)}, "top"),
        ({"heads": (0,)}, "heads"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_shapes_that_cannot_be(changes, path):
    assert [where for where, _ in DLRMConfig(**changes).problems()] == [path]
    assert DLRMConfig().problems() == []
