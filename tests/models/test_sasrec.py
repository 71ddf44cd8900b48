"""SASRec: causal, blind to padding, dropout by example, the same under every remat policy; numpy's numbers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from toys import tiny_sasrec

from jaxops.core.fresh_state import init_state
from jaxops.core.mesh import make_mesh
from jaxops.core.sharding import named_leaves, place
from jaxops.models.functional import Functional
from jaxops.models.sasrec import PAD_ROWS, SASRec, SASRecConfig
from jaxops.objectives.ranking import softmax

N_ITEMS, LENGTH = 60, 5
KEY = jax.random.key(1)


@functools.cache
def model_and_params(**changes):
    """Parameters larger than they are born, so that every path matters."""
    model = tiny_sasrec(N_ITEMS, **changes)
    leaves, structure = jax.tree.flatten(jax.jit(model.init)(jax.random.key(0)))
    rng = np.random.default_rng(0)
    leaves = [x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32) for x in leaves]
    return model, jax.tree.unflatten(structure, leaves)


@functools.cache
def encoder(**changes):
    """(params, jitted encode(items, ids, key or None))."""
    model, params = model_and_params(**changes)
    run = jax.jit(lambda items, ids, key: model.encode(params, {"items": items, "id": ids}, key))
    return params, lambda items, key=None, ids=None: np.asarray(
        run(jnp.asarray(items), jnp.arange(len(items)) if ids is None else jnp.asarray(ids), key)
    )


def histories(rng=0, size=4, length=LENGTH, least=1):
    """Left-padded: example i has at least `least` items."""
    rng = np.random.default_rng(rng)
    items = rng.integers(1, N_ITEMS + 1, (size, length)).astype(np.int32)
    for row, pad in zip(items, rng.integers(0, length - least + 1, size), strict=True):
        row[:pad] = 0
    return items


def numpy_layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def numpy_attention(x, p, heads, real):
    q, k, v = ((x @ p[n]["kernel"] + p[n]["bias"]).reshape(len(x), heads, -1) for n in ("query", "key", "value"))
    logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(np.tril(np.ones((len(x), len(x)), bool)) & real, logits, -1e9)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", probs, v).reshape(x.shape) @ p["out"]["kernel"] + p["out"]["bias"]


def numpy_mlp(x, p):
    h = x @ p["up"]["kernel"] + p["up"]["bias"]
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return h @ p["down"]["kernel"] + p["down"]["bias"]


def numpy_encode(params, items, heads, norm):
    """SASRec without dropout in float64, one example at a time."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    table, position, last = params["item"]["embedding"], params["position"]["embedding"], params["norm"]
    out = []
    for row in items:
        x = table[row] * np.sqrt(table.shape[1]) + position[-len(row) :]
        x = numpy_layer_norm(x, last) if norm == "post" else x
        for name in sorted(n for n in params if n.startswith("block_")):
            p = params[name]
            if norm == "pre":
                x = x + numpy_attention(numpy_layer_norm(x, p["norm_attention"]), p["attention"], heads, row > 0)
                x = x + numpy_mlp(numpy_layer_norm(x, p["norm_mlp"]), p["mlp"])
            else:
                x = numpy_layer_norm(x + numpy_attention(x, p["attention"], heads, row > 0), p["norm_attention"])
                x = numpy_layer_norm(x + numpy_mlp(x, p["mlp"]), p["norm_mlp"])
        out.append(numpy_layer_norm(x, last) if norm == "pre" else x)
    return np.stack(out)


@pytest.mark.latest
@pytest.mark.parametrize("changes", [{"norm": "pre"}, {"norm": "post", "layers": 2}], ids=str)
def test_the_encoder_is_numpys(changes):
    params, encode = encoder(**changes)
    items = histories()
    found, expected = encode(items), numpy_encode(params, items, 2, changes["norm"])
    real = items > 0  # what stands at padding is nobody's business
    np.testing.assert_allclose(found[real], expected[real], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("changed", range(LENGTH))
def test_an_item_changes_nothing_before_it(changed):
    _, encode = encoder(norm="pre")
    items = histories(least=LENGTH)
    other = items.copy()
    other[:, changed] = items[:, changed] % N_ITEMS + 1
    before, after = encode(items), encode(other)
    np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
    assert not np.allclose(before[:, changed], after[:, changed])


def test_causal_in_training_too():
    _, encode = encoder(norm="pre")
    items = histories(least=LENGTH)
    other = items.copy()
    other[:, 3] = items[:, 3] % N_ITEMS + 1
    np.testing.assert_array_equal(encode(items, KEY)[:, :3], encode(other, KEY)[:, :3])


def test_padding_on_the_left_changes_nothing():
    """A short history alone, and the same behind padding: positions count from the most recent item."""
    _, encode = encoder(norm="pre")
    items = histories(least=LENGTH)
    for kept in (1, 2, 4):
        padded = items.copy()
        padded[:, : LENGTH - kept] = 0
        alone = encode(items[:, -kept:])
        np.testing.assert_allclose(encode(padded)[:, -kept:], alone, rtol=1e-5, atol=1e-6)
        assert not np.allclose(encode(items)[:, -1], alone[:, -1])


def test_nothing_but_padding_stays_finite():
    _, encode = encoder(norm="pre")
    assert np.all(np.isfinite(encode(np.zeros((4, LENGTH), np.int32), KEY)))


def test_examples_do_not_see_each_other_and_keep_their_dropout():
    _, encode = encoder(norm="pre")
    items, order = histories(), np.asarray([2, 0, 3, 1])
    whole = encode(items, KEY, ids=[7, 3, 9, 4])
    np.testing.assert_allclose(
        encode(items[order], KEY, ids=np.asarray([7, 3, 9, 4])[order]), whole[order], rtol=1e-5, atol=1e-6
    )
    assert not np.allclose(encode(items, KEY, ids=[8, 3, 9, 4])[0], whole[0])
    assert not np.allclose(encode(items, jax.random.key(2), ids=[7, 3, 9, 4]), whole)
    assert not np.allclose(encode(items), whole)


@pytest.mark.latest
def test_packed_histories_are_as_if_alone():
    """Two histories in one row, told apart by segment and position, say what each says by itself."""
    model, params = model_and_params(norm="pre")
    _, encode = encoder(norm="pre")
    packed = {
        "items": jnp.asarray([[0, 7, 9, 4, 11]]),
        "segment": jnp.asarray([[0, 1, 1, 2, 2]]),
        "position": jnp.asarray([[0, 3, 4, 3, 4]]),
        "id": jnp.arange(1),
    }
    found = np.asarray(jax.jit(lambda: model.encode(params, packed, None))())
    np.testing.assert_allclose(found[:, 1:3], encode([[7, 9]]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[:, 3:], encode([[4, 11]]), rtol=1e-5, atol=1e-6)


def test_rows_that_are_no_items_cannot_win():
    model, params = model_and_params(norm="pre")
    assert model.rows == PAD_ROWS and params["item"]["embedding"].shape == (PAD_ROWS, 8)
    batch = {"items": jnp.asarray(histories()), "id": jnp.arange(4)}
    logits = np.asarray(model.apply(params, batch, None))
    assert logits.shape == (4, LENGTH, PAD_ROWS) and logits.dtype == np.float32
    real = np.asarray(model.real_rows())
    np.testing.assert_array_equal(np.flatnonzero(real), np.arange(1, N_ITEMS + 1))
    assert (logits[..., ~real] == -1e9).all()
    expected = np.asarray(model.encode(params, batch, None), np.float64) @ np.asarray(params["item"]["embedding"]).T
    np.testing.assert_allclose(logits[..., real], expected[..., real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n_items", "rows"), [(127, 128), (128, 256), (1, 128)])
def test_the_item_matrix_is_padded_whatever_the_mesh(n_items, rows):
    assert tiny_sasrec(n_items).shapes["item"]["embedding"].shape == (rows, 8)


@functools.cache
def gradients(remat):
    model, params = model_and_params(norm="pre", remat=remat)
    items = histories(size=4)
    batch = {"items": items, "targets": items[:, ::-1], "weight": (items > 0).astype(np.float32), "id": np.arange(4)}
    batch = jax.tree.map(jnp.asarray, batch)
    loss = lambda params: softmax(model)(params, batch, KEY)["loss/softmax"].total
    return jax.jit(jax.grad(loss))(params), str(jax.make_jaxpr(jax.grad(loss))(params))


@pytest.mark.latest
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputing_changes_no_gradient(remat):
    plain, text = gradients("none")
    found, again = gradients(remat)
    for (path, x), (_, y) in zip(named_leaves(found), named_leaves(plain), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=path)
    assert "remat" not in text and "checkpoint" not in text and ("remat" in again or "checkpoint" in again)


def test_what_is_recomputed():
    dots = {remat: gradients(remat)[1].count("dot_general") for remat in ("none", "dots", "full")}
    assert dots["none"] <= dots["dots"] < dots["full"]


@pytest.mark.latest
def test_half_precision_runs_under_strict_promotion():
    model, params = model_and_params(norm="pre")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    batch = {"items": jnp.asarray(histories()), "id": jnp.arange(4)}
    run = jax.jit(lambda params: (model.encode(params, batch, KEY), model.apply(params, batch, KEY)))
    hidden, logits = run(half)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    exact = run(params)[0]
    real = histories() > 0
    np.testing.assert_allclose(np.asarray(hidden, np.float32)[real], np.asarray(exact)[real], atol=0.15, rtol=0.1)


@pytest.mark.latest
def test_parameters_are_nested_dicts_of_arrays():
    model, params = model_and_params(norm="pre")

    def check(tree):
        assert type(tree) is dict and all(isinstance(key, str) for key in tree)
        for value in tree.values():
            if isinstance(value, dict):
                check(value)
            else:
                assert isinstance(value, jax.Array)

    check(params)
    assert set(params) == {"item", "position", "block_0", "norm"}
    described = [(path, x.shape, x.dtype) for path, x in named_leaves(model.shapes)]
    assert described == [(path, x.shape, x.dtype) for path, x in named_leaves(params)]


def test_fresh_parameters():
    params = jax.jit(tiny_sasrec(N_ITEMS).init)(jax.random.key(0))
    again = jax.jit(tiny_sasrec(N_ITEMS).init)(jax.random.key(0))
    for (path, x), (_, y) in zip(named_leaves(params), named_leaves(again), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)
        if path.endswith("scale"):
            np.testing.assert_array_equal(x, 1)
        elif path.endswith("bias"):
            np.testing.assert_array_equal(x, 0)
        else:
            assert 0.015 < float(jnp.std(x)) < 0.025, path


def test_every_parameter_has_a_rule():
    model = tiny_sasrec(N_ITEMS)
    mesh = make_mesh(fsdp=4, tensor=2)
    placed = {p.path: p for p in place(model.shapes, model.rules, mesh)}
    assert placed["item/embedding"].spec == jax.P("tensor", "fsdp")
    assert placed["block_0/attention/query/kernel"].spec == jax.P("fsdp", "tensor")
    assert placed["block_0/mlp/down/kernel"].spec == jax.P("tensor", "fsdp")
    assert all(p.spec for p in placed.values() if p.path.endswith(("kernel", "embedding")))
    assert not any(p.dropped for p in placed.values())
    assert all(any(re.search(pattern, path) for pattern, _ in model.rules) for path in placed)


@pytest.mark.latest
def test_adams_moments_lie_like_the_parameters():
    model, mesh = tiny_sasrec(N_ITEMS), make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        make = lambda: init_state(model.init, jax.random.key(0), optax.adam(1e-3), mesh, model.rules)
        state = jax.eval_shape(make)
    moments = state.opt_state[0]
    for tree in (moments.mu, moments.nu):
        for (path, x), (_, p) in zip(named_leaves(tree), named_leaves(state.params), strict=True):
            assert x.sharding == p.sharding, path
            assert path.endswith(("bias", "scale")) or not x.sharding.is_fully_replicated, path


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"dim": 0}, "dim"),
        ({"layers": 0}, "layers"),
        ({"length": 0}, "length"),
        ({"hidden": 0}, "hidden"),
        ({"dropout": 1.0}, "dropout"),
        ({"dim": 8, "heads": 3}, "heads"),
    ],
)
def test_shapes_that_cannot_be(changes, path):
    assert [where for where, _ in SASRecConfig(**changes).problems()] == [path]
    assert SASRecConfig().problems() == []


def test_state_that_is_no_parameter_is_refused():
    with pytest.raises(TypeError, match="keeps state that is not a parameter"):
        Functional(lambda rngs: nnx.BatchNorm(4, rngs=rngs))
    with pytest.raises(TypeError, match="not a parameter"):
        Functional(lambda rngs: nnx.Dropout(0.5, rngs=nnx.Rngs(0)))


@pytest.mark.latest
def test_a_functional_module_is_pure():
    linear = Functional(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    params = linear.init(jax.random.key(0))
    x = jnp.ones((1, 3))
    out = jax.jit(lambda params, x: linear.bind(params)(x))(params, x)
    np.testing.assert_allclose(out, np.asarray(params["kernel"]).sum(0, keepdims=True), rtol=1e-6)
    assert {path: x.shape for path, x in named_leaves(linear.shapes)} == {"bias": (2,), "kernel": (3, 2)}


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_bags_of_inputs_are_pooled_by_weight(pool):
    draw = np.random.default_rng(0)
    shape = SASRecConfig(dim=4, layers=1, heads=1, length=3, dropout=0.0, inputs=("item", "tags"))
    items, tags = np.array([[0, 2, 1], [1, 1, 2]], np.int32), draw.integers(-1, 3, (2, 3, 2)).astype(np.int32)
    much = draw.random((2, 3, 2)).astype(np.float32)
    rows = {"item": draw.normal(size=(2, 3, 4)), "tags": draw.normal(size=(2, 3, 2, 4))}
    share = much.astype(np.float64) * (tags >= 0)
    held = (rows["tags"] * share[..., None]).sum(2)
    if pool == "mean":
        held = held / np.where(share.sum(2) > 0, share.sum(2), 1)[..., None]
    narrow = lambda x: jnp.asarray(x, jnp.float32)
    plain = {"id": jnp.arange(2, dtype=jnp.int32), "items": jnp.asarray(items)}
    both = {**plain, "tags": jnp.asarray(tags), "tags/weight": jnp.asarray(much), "rows": jax.tree.map(narrow, rows)}
    model = SASRec(shape, 5, {"tags": pool})
    params = model.init(jax.random.key(0))
    alone = SASRec(dataclasses.replace(shape, inputs=("item",)), 5)
    summed = {**plain, "rows": {"item": narrow(rows["item"] + held)}}
    np.testing.assert_allclose(model.encode(params, both, None), alone.encode(params, summed, None), atol=1e-5)
