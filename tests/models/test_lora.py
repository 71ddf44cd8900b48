"""Low-rank adapters: exact at the start, alone in being trained, the same merged as in use, on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from toy_language import Texts, ToyLanguage, language_task
from toys import host, mesh_of

from jaxops.core.failures import UserError
from jaxops.core.fresh_state import init_state
from jaxops.core.sharding import named_leaves
from jaxops.core.step import build_step
from jaxops.models.dense import Dense
from jaxops.models.functional import Functional
from jaxops.models.lora import Adapted, Lora, LoraConfig
from jaxops.objectives.language import next_token
from jaxops.testing import LAYOUTS, check

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


class Layer(nnx.Module):
    """A residual layer of the toy below."""

    def __init__(self, dim, rngs):
        normal = nnx.initializers.normal(0.3)
        self.up = Dense(dim, 2 * dim, ("embed", "mlp"), kernel_init=normal, rngs=rngs)
        self.down = Dense(2 * dim, dim, ("mlp", "embed"), kernel_init=normal, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


@dataclasses.dataclass(frozen=True)
class Deep(ToyLanguage):
    """The toy with three layers, scanned over stacked parameters."""

    rules = [
        (r"up/kernel$", (None, "fsdp", "tensor")),
        (r"down/kernel$", (None, "tensor", "fsdp")),
        *ToyLanguage.rules,
    ]

    @property
    def layer(self):
        return Functional(lambda rngs: Layer(self.dim, rngs))

    def init(self, key):
        return super().init(key) | {"layers": jax.vmap(self.layer.init)(jax.random.split(key, 3))}

    def hidden(self, params, tokens, segment, position, keys=None):
        x, layer = super().hidden(params, tokens, segment, position, keys), self.layer
        return jax.lax.scan(lambda x, held: (layer.bind(held)(x), None), x, params["layers"])[0]


def given(**changes):
    model = Deep()
    lora = Lora(model, LoraConfig(**({"rank": 4, "match": "layers|dense"} | changes)))
    params = lora.init(jax.random.key(0))
    return model, lora, params, jax.tree.map(jnp.asarray, Texts().batch(0, 8))


def moved(params):
    """Adapters off their zeros."""
    names = dict(named_leaves(params["lora"]))
    keys = dict(zip(names, jax.random.split(jax.random.key(7), len(names)), strict=True))
    shift = lambda path, x: x + 0.2 * jax.random.normal(keys[path], x.shape)
    paths = [shift(path, x) for path, x in names.items()]
    return params | {"lora": jax.tree.unflatten(jax.tree.structure(params["lora"]), paths)}


def test_a_fresh_adapter_changes_nothing_at_all():
    model, lora, params, batch = given()
    run = jax.jit(lambda params: next_token(model)(params, batch, None)["loss/nll"].total)
    with_lora = jax.jit(lambda params: lora.on(next_token(model))(params, batch, None)["loss/nll"].total)
    assert float(with_lora(params)) == float(run(lora.base(params)))
    kernels = {path for path, _ in named_leaves(params["lora"])}
    names = ("dense/kernel", "layers/up/kernel", "layers/down/kernel")
    assert kernels == {f"{name}/{side}" for name in names for side in "ab"}
    a, b = params["lora"]["layers"]["up"]["kernel"].values()
    assert a.shape == (3, 16, 4) and b.shape == (3, 4, 32) and not np.any(b) and len(np.unique(a)) > 150
    assert float(jnp.max(jnp.abs(a))) <= 0.25 and float(jnp.std(a)) == pytest.approx(0.25 / 3**0.5, rel=0.1)
    for path, x in named_leaves(lora.merge(params)):
        np.testing.assert_array_equal(x, dict(named_leaves(params))[path])


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_merged_for_good_is_what_is_used(alpha):
    model, lora, params, batch = given(alpha=alpha)
    params = moved(params)
    merged, wide = lora.merge(params), lambda x: np.asarray(x, np.float64)
    scale = 2.0 if alpha is None else alpha / 4
    for name, held in (("up", params["lora"]["layers"]["up"]["kernel"]), ("dense", params["lora"]["dense"]["kernel"])):
        base, found = (tree["layers"][name] if name == "up" else tree[name] for tree in (params, merged))
        expected = wide(base["kernel"]) + scale * wide(held["a"]) @ wide(held["b"])
        np.testing.assert_allclose(found["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert set(merged) == set(model.shapes) and not any(isinstance(x, Adapted) for x in jax.tree.leaves(merged))
    used = jax.jit(lora.on(next_token(model)))(params, batch, None)
    plain = jax.jit(next_token(model))(merged, batch, None)
    base = jax.jit(next_token(model))(lora.base(params), batch, None)
    np.testing.assert_allclose(used["loss/nll"].total, plain["loss/nll"].total, rtol=1e-5)
    assert abs(float(used["loss/nll"].total) - float(base["loss/nll"].total)) > 1e-2


def test_a_change_below_the_precision_of_a_bfloat16_base_is_felt():
    """Where base + product would be rounded back to the base, the layer's output moves all the same."""
    layer = Functional(lambda rngs: Layer(16, rngs))
    base = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.bfloat16), layer.shapes)
    base["up"]["bias"] = jnp.zeros(32, jnp.bfloat16)
    sign = jnp.asarray(np.resize([1.0, -1.0], 16), jnp.bfloat16)
    a, b = 1e-2 * sign[:, None] * jnp.ones((16, 2), jnp.bfloat16), jnp.full((2, 32), 5e-2, jnp.bfloat16)
    kernel = Adapted(base["up"]["kernel"], a, b, 1.0)  # adds 1e-3 to ones, whose next number is 1.0078
    np.testing.assert_array_equal(kernel.merged(), base["up"]["kernel"])
    up = lambda kernel: layer.bind(base | {"up": base["up"] | {"kernel": kernel}}).up(sign[None])
    np.testing.assert_array_equal(up(base["up"]["kernel"]), jnp.zeros((1, 32), jnp.bfloat16))
    expected = sum(np.asarray(sign, np.float64)) + np.asarray(sign, np.float64) @ (
        np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    )
    np.testing.assert_allclose(np.asarray(up(kernel), np.float64)[0], expected, rtol=1e-2)


def test_only_adapters_are_trained_in_float32_over_a_bfloat16_base():
    model, lora, _, batch = given()
    mesh, tx = mesh_of(**CUBE), optax.adam(1e-2)
    with jax.set_mesh(mesh):
        state = init_state(
            lora.init,
            jax.random.key(0),
            tx,
            mesh,
            lora.rules,
            frozen=lora.frozen,
            dtype=jnp.bfloat16,
            dtypes=lora.dtypes,
        )
        before = host((state.params, state.frozen))
        assert set(state.params) == {"lora"} and set(state.frozen) == set(model.shapes)
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
        assert {x.dtype for x in jax.tree.leaves(state.frozen)} == {jnp.dtype(jnp.bfloat16)}
        spec = jax.typeof(state.params["lora"]["layers"]["up"]["kernel"]["a"]).sharding.spec
        assert "fsdp" in str(spec)
        step = build_step(lora.on(next_token(model)), tx, mesh, rules=lora.rules, compute_dtype=jnp.bfloat16)
        losses = []
        for _ in range(3):
            state, sums = jax.block_until_ready(step(state, batch))
            losses.append(float(sums["loss/nll"].value()))
    after = host((state.params, state.frozen))
    for old, new in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1]), strict=True):
        np.testing.assert_array_equal(old, new)
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(before[0]), jax.tree.leaves(after[0]), strict=True))
    assert losses[2] < losses[0]


@pytest.mark.slow
def test_the_update_is_that_of_one_device_and_the_fence_accepts_it():
    model = Deep()
    lora = Lora(model, LoraConfig(rank=4, match="layers|dense"))
    task = language_task(lambda _: lora.on(next_token(model, chunk=8)), model)
    task = dataclasses.replace(task, model=Started(lora), rules=lora.rules)
    found = check(task, LAYOUTS, (1, 4))
    assert all(case.gradient > 0 for case in found if case.layout != LAYOUTS[0])


@dataclasses.dataclass
class Started:
    """A model whose adapters are not zero at the start, so that both have a gradient."""

    lora: Lora

    @property
    def shapes(self):
        return self.lora.shapes

    def init(self, key):
        return moved(self.lora.init(key))


def test_what_cannot_be():
    for config, message in (
        (LoraConfig(match="("), "not a regular expression"),
        (
            LoraConfig(match="bias$"),
            r"no kernel \(there are: dense/kernel, layers/down/kernel, layers/up/kernel",
        ),
        (LoraConfig(rank=16, match="up"), "rank: 16 is not below the sides of layers/up/kernel, 16 x 32"),
    ):
        with pytest.raises(UserError, match=message):
            Lora(Deep(), config)
