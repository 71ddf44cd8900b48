"""Two towers against numpy float64: what each reads, lengths of one, and the loss that they are made for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.core.mesh import make_mesh
from jaxops.core.sharding import place
from jaxops.core.sums import merge
from jaxops.models.inputs import Input
from jaxops.models.two_tower import TwoTower, TwoTowerConfig
from jaxops.objectives.retrieval import Towers, in_batch_softmax

BATCH = 8
USER = [Input(name="user", dim=4), Input(name="history", dim=3, bag=True)]
ITEM = [Input(name="item", dim=3), Input(name="genre", dim=2, bag=True, pool="sum")]
KEY = jax.random.key(1)


def example_batch():
    """Example 0 has an empty history and no genre; the last one is padding."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    history, genre = (rng.integers(-1, 5, (BATCH, n)).astype(np.int32) for n in (4, 2))
    history[0], genre[0] = -1, -1
    weight = np.ones(BATCH, np.float32)
    weight[-1] = 0
    batch = {
        "id": np.arange(BATCH, dtype=np.int32),
        "weight": weight,
        "user": np.arange(BATCH, dtype=np.int32),
        "item": rng.integers(1, 6, BATCH).astype(np.int32),
        "history": history,
        "genre": genre,
        "rows": {
            "user": draw(BATCH, 4),
            "item": draw(BATCH, 3),
            "history": draw(BATCH, 4, 3) * (history >= 0)[..., None],
            "genre": draw(BATCH, 2, 2) * (genre >= 0)[..., None],
        },
    }
    return jax.tree.map(jnp.asarray, batch)


def model_and_params(**changes):
    config = TwoTowerConfig(
        **{"user": ("user", "history"), "item": ("item", "genre"), "dim": 5, "user_hidden": (6,), **changes}
    )
    model = TwoTower(config, USER, ITEM)
    leaves, structure = jax.tree.flatten(jax.jit(model.init)(jax.random.key(0)))
    rng = np.random.default_rng(1)
    leaves = [x + jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32) for x in leaves]
    return model, jax.tree.unflatten(structure, leaves)


def numpy_tower(x, p, normalise):
    for at in range(sum(name.startswith("layer_") for name in p)):
        x = np.maximum(x @ p[f"layer_{at}"]["kernel"] + p[f"layer_{at}"]["bias"], 0)
    x = x @ p["out"]["kernel"] + p["out"]["bias"]
    return x / np.linalg.norm(x, axis=-1, keepdims=True) if normalise else x


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("hidden", [(7, 6), ()])
def test_the_vectors_are_numpys(hidden, normalise):
    model, params = model_and_params(item_hidden=hidden, normalise=normalise)
    batch = example_batch()
    both = lambda params, batch: (model.users(params, batch, None), model.items(params, batch, None))
    users, items = jax.jit(both)(params, batch)
    params, batch = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, batch))
    there = np.sum(batch["history"] >= 0, axis=1, keepdims=True)
    history = batch["rows"]["history"].sum(1) / np.maximum(there, 1)
    x = np.concatenate([batch["rows"]["user"], history], axis=1)
    np.testing.assert_allclose(users, numpy_tower(x, params["user"], normalise), rtol=2e-5, atol=2e-5)
    x = np.concatenate([batch["rows"]["item"], batch["rows"]["genre"].sum(1)], axis=1)
    np.testing.assert_allclose(items, numpy_tower(x, params["item"], normalise), rtol=2e-5, atol=2e-5)
    assert users.shape == items.shape == (BATCH, 5)


def test_each_tower_reads_its_own_features_alone():
    """A catalogue is encoded from batches that know nothing of users."""
    model, params = model_and_params()
    batch = example_batch()

    def only(names):
        rows = {name: batch["rows"][name] for name in names}
        return {"id": batch["id"], "rows": rows} | {name: batch[name] for name in names}

    np.testing.assert_array_equal(
        model.users(params, only(("user", "history")), None), model.users(params, batch, None)
    )
    np.testing.assert_array_equal(model.items(params, only(("item", "genre")), None), model.items(params, batch, None))


def test_a_vector_of_nothing_has_no_gradient():
    """Fresh biases are zero: a user without any known feature comes out as the zero vector, which has no direction."""
    model, _ = model_and_params()
    params, batch = model.init(jax.random.key(0)), example_batch()
    rows = {name: x.at[0].set(0) for name, x in batch["rows"].items()}
    run = lambda params, rows: model.users(params, {**batch, "rows": rows}, None)
    np.testing.assert_array_equal(run(params, rows)[0], 0)
    grads = jax.jit(jax.grad(lambda *args: jnp.sum(run(*args)), argnums=(0, 1)))(params, rows)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads))
    # not a million times the others', as an epsilon under the root would have it
    alone = jax.grad(lambda params: jnp.sum(run(params, rows)[0]))(params)
    assert not any(np.any(x) for x in jax.tree.leaves(alone))


def test_half_precision_runs_under_strict_promotion():
    model, params = model_and_params()
    batch = example_batch()
    cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    half = {**batch, "rows": cast(batch["rows"])}
    found = jax.jit(lambda params, batch: model.users(params, batch, KEY))(cast(params), half)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), model.users(params, batch, None), atol=0.05)
    sums = in_batch_softmax(model, 4)(cast(params), half, KEY)["loss/in_batch_softmax"]
    assert sums.total.dtype == jnp.float32 and np.isfinite(sums.total)


def test_dropout_is_of_the_example_and_other_in_each_tower():
    same = [Input(name="user", dim=4)]
    config = TwoTowerConfig(dim=4, user_hidden=(64,), item_hidden=(64,), dropout=0.5)
    model, batch = TwoTower(config, same, same), example_batch()
    params = model.init(jax.random.key(0))
    params = {"user": params["user"], "item": params["user"]}
    users, items = model.users(params, batch, KEY), model.items(params, batch, KEY)
    np.testing.assert_array_equal(model.users(params, batch, None), model.items(params, batch, None))
    assert not np.allclose(users, items)  # one mask for both would tie them
    order = np.asarray([3, 0, 4, 1, 2, 7, 6, 5])
    turned = model.users(params, jax.tree.map(lambda x: x[order], batch), KEY)
    np.testing.assert_allclose(turned, users[order], rtol=1e-5, atol=1e-6)


def test_two_halves_merge_to_the_whole():
    """Blocks of four couple; the cut into microbatches falls between them."""
    model, params = model_and_params(dropout=0.3)
    assert isinstance(model, Towers)
    batch, objective = example_batch(), in_batch_softmax(model, 4, temperature=0.2)
    run = jax.jit(lambda batch: objective(params, batch, KEY))
    whole = run(batch)["loss/in_batch_softmax"]
    halves = merge(*(run(jax.tree.map(lambda x, at=at: x[at : at + 4], batch)) for at in (0, 4)))
    assert float(whole.count) == float(halves["loss/in_batch_softmax"].count) == BATCH - 1
    np.testing.assert_allclose(halves["loss/in_batch_softmax"].total, whole.total, rtol=1e-5)


def test_layers_are_split_over_tensor():
    inputs = [Input(name="user", dim=16)]
    model = TwoTower(TwoTowerConfig(), inputs, inputs)
    placed = {p.path: p for p in place(model.shapes, model.rules, make_mesh(fsdp=4, tensor=2))}
    assert all(placed[f"{tower}/layer_0/kernel"].spec == jax.P(None, "tensor") for tower in ("user", "item"))
    assert all(placed[f"{tower}/out/kernel"].spec == jax.P() for tower in ("user", "item"))


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"dim": 0}, "dim"),
        ({"history": 0}, "history"),
        ({"user": ()}, "user"),
        ({"item": ("genre",)}, "item"),
        ({"user_hidden": (0,)}, "user_hidden"),
        ({"item_hidden": (8, 0)}, "item_hidden"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_shapes_that_cannot_be(changes, path):
    assert [where for where, _ in TwoTowerConfig(**changes).problems()] == [path]
    assert TwoTowerConfig().problems() == []
