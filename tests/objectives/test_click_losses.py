"""Binary cross-entropy against numpy float64; labels that are not known; the same however a batch is cut up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxops.core.fresh_state import init_state
from jaxops.core.mesh import make_mesh
from jaxops.core.sharding import named_leaves
from jaxops.core.step import build_step
from jaxops.core.sums import finalize, merge
from jaxops.models.dcn import DCNv2, DCNv2Config
from jaxops.models.dlrm import DLRM, DLRMConfig
from jaxops.models.inputs import Input
from jaxops.models.linear import LinearConfig, LogisticRegression
from jaxops.objectives.clicks import ClickModel, bce, binary_cross_entropy, multi_task

BATCH, NUMERIC, TASKS = 16, 3, ("click", "buy")
KEY = jax.random.key(1)


class Given:
    """Logits that are the parameters themselves."""

    def apply(self, params, batch, key):
        return params


def model_of(kind, outputs):
    dim = outputs if kind == "linear" else 4
    inputs = [Input(name="user", dim=dim), Input(name="tags", dim=dim, bag=True)]
    if kind == "dlrm":
        return DLRM(DLRMConfig(bottom=(8,), top=(8,), dropout=0.3), inputs, NUMERIC, outputs), dim
    if kind == "dcnv2":
        return DCNv2(DCNv2Config(cross_layers=2, rank=2, deep=(8,), dropout=0.3), inputs, NUMERIC, outputs), dim
    return LogisticRegression(LinearConfig(), inputs, NUMERIC, outputs), dim


def example_batch(dim, tasks):
    """Ragged: padding at the end, labels that are not known, empty bags."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    tags = rng.integers(-1, 5, (BATCH, 3)).astype(np.int32)
    tags[::5] = -1
    label = (rng.random((BATCH, tasks)) < 0.4).astype(np.float32)
    label[rng.random((BATCH, tasks)) < 0.3] = np.nan
    weight = np.ones(BATCH, np.float32)
    weight[-3:] = 0
    batch = {
        "id": np.arange(BATCH, dtype=np.int32),
        "weight": weight,
        "user": np.arange(BATCH, dtype=np.int32),
        "tags": tags,
        "numeric": draw(BATCH, NUMERIC),
        "label": label[:, 0] if tasks == 1 else label,
        "rows": {"user": draw(BATCH, dim), "tags": draw(BATCH, 3, dim) * (tags >= 0)[..., None]},
    }
    return jax.tree.map(jnp.asarray, batch)


def test_cross_entropy_is_numpys_and_stable():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(0, 4, 64).astype(np.float32), rng.random(64).astype(np.float32)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = -(label * np.log(p) + (1 - label) * np.log(1 - p))
    np.testing.assert_allclose(binary_cross_entropy(jnp.asarray(logits), jnp.asarray(label)), expected, rtol=1e-5)
    far = binary_cross_entropy(jnp.asarray([1e4, -1e4, 1e4, -1e4]), jnp.asarray([1.0, 0.0, 0.0, 1.0]))
    np.testing.assert_array_equal(far, [0, 0, 1e4, 1e4])
    grads = jax.grad(lambda x: jnp.sum(binary_cross_entropy(x, jnp.asarray([0.0, 1.0]))))(jnp.asarray([1e4, -1e4]))
    np.testing.assert_array_equal(grads, [1, -1])


def test_one_label_is_a_weighted_mean():
    rng = np.random.default_rng(1)
    logits, label = rng.normal(size=BATCH).astype(np.float32), (rng.random(BATCH) < 0.5).astype(np.float32)
    weight = rng.integers(0, 3, BATCH).astype(np.float32)
    found = bce(Given())(jnp.asarray(logits), {"label": jnp.asarray(label), "weight": jnp.asarray(weight)}, None)
    each = np.log1p(np.exp(logits.astype(np.float64))) - label * logits
    assert set(found) == {"loss/bce"} and float(found["loss/bce"].count) == weight.sum()
    assert finalize(found)["loss/bce"] == pytest.approx((weight * each).sum() / weight.sum(), rel=1e-5)


def test_unknown_labels_count_for_nothing_in_their_own_term_alone():
    logits = jnp.asarray([[0.5, -1.0], [2.0, 0.3], [-0.7, 1.1], [9.0, 9.0]])
    label = jnp.asarray([[1.0, np.nan], [np.nan, np.nan], [0.0, 1.0], [np.nan, 0.0]])
    batch = {"label": label, "weight": jnp.asarray([1.0, 1.0, 2.0, 0.0])}
    objective = multi_task(Given(), TASKS)
    found = objective(logits, batch, None)
    loss = lambda x, y: np.log1p(np.exp(x)) - y * x
    assert list(found) == ["loss/click", "loss/buy"]
    assert float(found["loss/click"].count) == 3 and float(found["loss/buy"].count) == 2
    assert float(found["loss/click"].total) == pytest.approx(loss(0.5, 1) + 2 * loss(-0.7, 0), rel=1e-6)
    assert float(found["loss/buy"].total) == pytest.approx(2 * loss(1.1, 1), rel=1e-6)
    total = lambda logits: sum(entry.total for entry in objective(logits, batch, None).values())
    grads = np.asarray(jax.grad(total)(logits))
    assert np.all(np.isfinite(grads))
    np.testing.assert_array_equal(grads != 0, [[True, False], [False, False], [True, True], [False, False]])


def test_a_task_of_which_nothing_is_known_has_no_count():
    batch = {"label": jnp.asarray([[1.0, np.nan], [0.0, np.nan]]), "weight": jnp.ones(2)}
    found = multi_task(Given(), TASKS)(jnp.zeros((2, 2)), batch, None)
    assert float(found["loss/buy"].count) == 0 and float(found["loss/buy"].total) == 0
    assert (
        float(bce(Given())(jnp.zeros(1), {"label": jnp.full(1, np.nan), "weight": jnp.ones(1)}, None)["loss/bce"].count)
        == 0
    )


@pytest.mark.parametrize("names", [(), ("click", "click")])
def test_names_that_cannot_be(names):
    with pytest.raises(ValueError, match="each once"):
        multi_task(Given(), names)


def objective_of(kind, tasks):
    model, dim = model_of(kind, tasks)
    assert isinstance(model, ClickModel)
    made = bce(model) if tasks == 1 else multi_task(model, TASKS)
    return model, made, example_batch(dim, tasks)


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("kind", ["dlrm", "dcnv2", "linear"])
def test_two_halves_merge_to_the_whole(kind, tasks):
    model, objective, batch = objective_of(kind, tasks)
    params = jax.tree.map(lambda x: x + 0.1, model.init(jax.random.key(0)))
    run = jax.jit(lambda batch: objective(params, batch, KEY))
    half = BATCH // 2
    whole = run(batch)
    halves = merge(*(run(jax.tree.map(lambda x, at=at: x[at : at + half], batch)) for at in (0, half)))
    for name, entry in whole.items():
        assert float(halves[name].count) == float(entry.count) > 0
        np.testing.assert_allclose(halves[name].total, entry.total, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["dlrm", "dcnv2", "linear"])
def test_gradients_are_finite_with_empty_bags_and_unknown_labels(kind):
    model, objective, batch = objective_of(kind, 2)
    loss = lambda params, rows: sum(e.total for e in objective(params, {**batch, "rows": rows}, KEY).values())
    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(model.init(jax.random.key(0)), batch["rows"])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads))
    np.testing.assert_array_equal(grads[1]["user"][-3:], 0)  # padding


@pytest.mark.parametrize("kind", ["dlrm", "dcnv2", "linear"])
def test_a_step_on_any_mesh_is_the_step_on_one_device(kind):
    """Two microbatches on a mesh that cuts everything, dropout on: the parameters of one device and one microbatch.

    (With kernels on ("fsdp", "tensor") DLRM's came out wrong here, by 0.3.)
    """
    model, objective, batch = objective_of(kind, 2)

    def after_a_step(accumulation, **sizes):
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        mesh, tx = make_mesh(**sizes, devices=devices), optax.sgd(0.5)
        with jax.set_mesh(mesh):
            state = init_state(model.init, jax.random.key(0), tx, mesh, model.rules)
            step = build_step(objective, tx, mesh, rules=model.rules, accumulation=accumulation)
            return jax.device_get(step(state, batch)[0].params)

    one, cut = after_a_step(1, data=1), after_a_step(2, data=2, fsdp=2, tensor=2)
    for (path, x), (_, y) in zip(named_leaves(cut), named_leaves(one), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=path)
