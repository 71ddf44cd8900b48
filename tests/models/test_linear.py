"""Logistic regression against numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import feature_batch, moved_params

from jaxops.core.failures import UserError
from jaxops.core.sharding import named_leaves
from jaxops.models.inputs import Input
from jaxops.models.linear import LinearConfig, LogisticRegression

BATCH, NUMERIC = 5, 3


def inputs_of(outputs):
    return [Input(name="user", dim=outputs), Input(name="tags", dim=outputs, bag=True, pool="sum")]


def example_batch(outputs=1):
    return feature_batch(dict.fromkeys(("user", "item", "tags"), outputs), NUMERIC, 0, BATCH)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("numeric", [0, NUMERIC])
def test_the_logits_are_numpys(numeric, outputs):
    model = LogisticRegression(LinearConfig(), inputs_of(outputs), numeric, outputs)
    params, batch = moved_params(model), example_batch(outputs)
    found = jax.jit(lambda params, batch: model.apply(params, batch, None))(params, batch)
    wide_params, wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, batch))
    bag = (wide["rows"]["tags"] * wide["tags/weight"][..., None]).sum(1)
    expected = wide_params["bias"] + wide["rows"]["user"] + bag
    if numeric:
        expected = expected + wide["numeric"] @ wide_params["numeric"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected[:, 0] if outputs == 1 else expected, rtol=1e-5, atol=1e-5)


@pytest.mark.latest
def test_it_begins_at_zero_and_says_its_shapes():
    model = LogisticRegression(LinearConfig(), inputs_of(1), NUMERIC)
    params = model.init(jax.random.key(0))
    assert {path: x.shape for path, x in named_leaves(params)} == {"bias": (1,), "numeric": (NUMERIC, 1)}
    described = [(path, x.shape, x.dtype) for path, x in named_leaves(model.shapes)]
    assert described == [(path, x.shape, x.dtype) for path, x in named_leaves(params)]
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(model.shapes))
    assert not any(np.any(x) for x in jax.tree.leaves(params))
    assert set(LogisticRegression(LinearConfig(), inputs_of(1), 0).shapes) == {"bias"}


def test_half_precision_gives_float32_logits_and_finite_gradients():
    model, batch = LogisticRegression(LinearConfig(), inputs_of(1), NUMERIC), example_batch()
    cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    params, rows = cast(moved_params(model)), cast(batch["rows"])
    run = lambda params, rows: model.apply(params, {**batch, "rows": rows}, None)
    assert run(params, rows).dtype == jnp.float32
    grads = jax.jit(jax.grad(lambda *args: jnp.sum(jnp.square(run(*args))), argnums=(0, 1)))(params, rows)
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in jax.tree.leaves(grads))


@pytest.mark.parametrize(("dim", "outputs"), [(8, 1), (1, 2)])
def test_tables_of_another_width_are_refused(dim, outputs):
    with pytest.raises(UserError, match=rf"rows of dim {outputs}.*set dim of user"):
        LogisticRegression(LinearConfig(), [Input(name="user", dim=dim)], 0, outputs)


def test_it_has_nothing_to_get_wrong():
    assert LinearConfig().problems() == []
