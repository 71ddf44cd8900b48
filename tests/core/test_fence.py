"""Kernels that lie over fsdp when they are multiplied are named, whatever lies between; wrong gradients are real."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toys import regression_task

from jaxops.core.failures import UserError
from jaxops.core.fence import over_fsdp, refuse_unconstrained, unconstrained_kernels
from jaxops.core.mesh import make_mesh
from jaxops.core.sharding import constrain, place
from jaxops.core.sums import Sum
from jaxops.testing import check, compare_layouts

pytestmark = pytest.mark.latest

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
RULES = [(r"^layers$", (None, "fsdp", "tensor")), (r"^bias$", ("fsdp",)), (r"^small$", ()), (r".*", ("fsdp", "tensor"))]
PARAMS = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in {"w": (8, 8), "v": (8, 8), "layers": (3, 8, 8), "bias": (8,), "small": (8, 8)}.items()
}
BATCH = {"x": jax.ShapeDtypeStruct((16, 8), jnp.float32), "at": jax.ShapeDtypeStruct((16,), jnp.int32)}
gathered = functools.partial(constrain, names=("embed", "mlp"))


def mesh_of(**sizes):
    return make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])


def named(fn, mesh=None):
    """The paths that are refused of `fn(params, batch, key)`."""
    mesh = mesh or mesh_of(**CUBE)
    key = jax.eval_shape(lambda: jax.random.key(0))
    found = unconstrained_kernels(fn, PARAMS, BATCH, key, mesh=mesh, placed=place(PARAMS, RULES, mesh))
    return sorted({one.path for one in found})


@jax.custom_vjp
def doubled(w):
    return 2 * w


doubled.defvjp(lambda w: (2 * w, None), lambda kept, g: (2 * g,))


def in_a_scan(params, batch, use=lambda w: w):
    def layer(h, w):
        return jnp.tanh(h @ use(w)), None

    return jax.lax.scan(jax.checkpoint(layer), batch["x"], params["layers"])[0]


def carried(params, batch, key):
    """The kernel goes round a loop before it is multiplied, and changes places on the way."""

    def turn(at, carry):
        first, second, h = carry
        return second, first, h @ first

    return jax.lax.fori_loop(0, 3, turn, (params["small"], params["w"], batch["x"]))[2]


def in_a_branch(params, batch, key):
    h = batch["x"]
    return jax.lax.cond(h[0, 0] > 0, lambda w, h: h @ w, lambda w, h: h @ gathered(w), params["w"], h)


def over_data_alone(params, batch, key):
    """A shard_map that is manual over data: fsdp is still XLA's."""
    local = lambda w, x: x @ w
    return jax.shard_map(local, in_specs=(P(), P("data")), out_specs=P("data"), axis_names={"data"})(
        params["w"], batch["x"]
    )


AS_THEY_LIE = {
    "plain": lambda p, b, k: b["x"] @ p["w"],
    "as the left factor": lambda p, b, k: p["w"] @ b["x"].T,
    "tied": lambda p, b, k: jnp.einsum("bd,vd->bv", gathered(p["w"])[b["at"]], p["w"]),
    "cast": lambda p, b, k: b["x"].astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
    "transposed and reshaped": lambda p, b, k: b["x"] @ p["w"].T.reshape(8, 2, 4).reshape(8, 8),
    "sliced": lambda p, b, k: b["x"][:, :4] @ p["w"][2:6],
    "one of several": lambda p, b, k: b["x"] @ p["layers"][b["at"][0]],
    "broadcast": lambda p, b, k: jnp.einsum("bd,bdf->bf", b["x"], jnp.broadcast_to(p["w"], (16, 8, 8))),
    "scaled": lambda p, b, k: b["x"] @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)),
    "scaled by a number of the data": lambda p, b, k: b["x"] @ (p["w"] * b["x"][0, 0][None, None]),
    "masked by a key": lambda p, b, k: b["x"] @ jnp.where(jax.random.bernoulli(k, 0.5, (8, 8)), p["w"], 0.0),
    "rows drawn by a key": lambda p, b, k: b["x"] @ p["w"][jax.random.randint(k, (4,), 0, 8)].T,
    "added to another": lambda p, b, k: b["x"] @ (gathered(p["v"]) + p["w"]),
    "joined to another": lambda p, b, k: b["x"] @ jnp.concatenate([gathered(p["v"]), p["w"]], axis=1),
    "in jit": lambda p, b, k: jax.jit(lambda w, x: x @ w)(p["w"], b["x"]),
    "in remat": lambda p, b, k: jax.checkpoint(lambda w, x: x @ w)(p["w"], b["x"]),
    "in vmap": lambda p, b, k: jax.vmap(lambda x: x @ p["w"])(b["x"]),
    "behind a custom derivative": lambda p, b, k: b["x"] @ doubled(p["w"]),
    "carried round a loop": carried,
    "in a branch": in_a_branch,
    "in a shard_map over data": over_data_alone,
    "constrained to where it lies": lambda p, b, k: (
        b["x"] @ jax.lax.with_sharding_constraint(p["w"], P("fsdp", "tensor"))
    ),
    "constrained to nothing": lambda p, b, k: (
        b["x"] @ jax.lax.with_sharding_constraint(p["w"], P(P.UNCONSTRAINED, None))
    ),
    "constrained too late": lambda p, b, k: gathered(b["x"] @ p["w"]),
    "convolved": lambda p, b, k: jax.lax.conv(b["x"][:, :, None], p["w"][:, :, None], (1,), "SAME"),
}

CONSTRAINED = {
    "gathered": lambda p, b, k: b["x"] @ gathered(p["w"]),
    "gathered, then changed": lambda p, b, k: b["x"] @ (gathered(p["w"]).astype(jnp.float32).T * 2)[:4].T,
    "by jax itself": lambda p, b, k: b["x"] @ jax.lax.with_sharding_constraint(p["w"], P(None, "tensor")),
    "in a scan": lambda p, b, k: in_a_scan(p, b, gathered),
    "before a scan": lambda p, b, k: in_a_scan({"layers": constrain(p["layers"], (None, "embed", "mlp"))}, b),
    "kept off fsdp": lambda p, b, k: b["x"] @ p["small"],
    "where fsdp is manual": lambda p, b, k: jax.shard_map(
        lambda w, x: x @ jax.lax.all_gather(w, "fsdp", tiled=True),
        in_specs=(P("fsdp"), P("fsdp")),
        out_specs=P("fsdp"),
        axis_names={"fsdp"},
    )(p["w"], b["x"]),
    "looked up": lambda p, b, k: p["w"][b["at"]] @ gathered(p["v"]),
    "a bias": lambda p, b, k: (b["x"] + p["bias"][None]) @ gathered(p["w"]),
    "a scale": lambda p, b, k: (b["x"] * p["bias"][None]) @ gathered(p["w"]),
    "a penalty": lambda p, b, k: jnp.sum(b["x"] @ gathered(p["v"])) + jnp.sum(jnp.square(p["w"])),
    "data with data": lambda p, b, k: (b["x"] * p["bias"][None]) @ b["x"].T,
}


@pytest.mark.parametrize("case", AS_THEY_LIE)
def test_a_kernel_that_is_multiplied_as_it_lies_is_named(case):
    assert named(AS_THEY_LIE[case]) == ["layers" if case == "one of several" else "w"]


def test_layers_that_a_scan_cuts_out_are_named_once():
    mesh = mesh_of(**CUBE)
    found = unconstrained_kernels(in_a_scan, PARAMS, BATCH, mesh=mesh, placed=place(PARAMS, RULES, mesh))
    (one,) = found
    assert (one.path, one.spec, one.product) == ("layers", P(None, "fsdp", "tensor"), "dot_general")
    assert "test_fence.py:" in one.where and "layer" in one.where


@pytest.mark.parametrize("case", CONSTRAINED)
def test_what_is_constrained_or_no_kernel_passes(case):
    assert named(CONSTRAINED[case]) == []


@pytest.mark.parametrize(
    ("sizes", "refused"), [({"data": 8}, []), ({"data": 4, "tensor": 2}, []), ({"fsdp": 8}, ["w"]), (CUBE, ["w"])]
)
def test_fsdp_alone_decides(sizes, refused):
    """Not that data and tensor are there as well: another mesh is a matter of a word in the config."""
    mesh = mesh_of(**sizes)
    assert named(AS_THEY_LIE["plain"], mesh) == refused
    assert ("w" in over_fsdp(place(PARAMS, RULES, mesh))) == bool(refused)


def test_arrays_on_the_mesh_are_as_good_as_shapes():
    mesh = mesh_of(**CUBE)
    placed = place(PARAMS, RULES, mesh)
    params = {p.path: jax.device_put(np.ones(p.shape, np.float32), NamedSharding(mesh, p.spec)) for p in placed}
    batch = {"x": np.ones((16, 8), np.float32), "at": np.zeros(16, np.int32)}
    both = lambda p, b: {"loss": jnp.sum(b["x"] @ p["w"]), "note": "no array"}
    assert [one.path for one in unconstrained_kernels(both, params, batch, mesh=mesh, placed=placed)] == ["w"]


def test_the_refusal_names_parameter_place_and_cure():
    mesh = mesh_of(**CUBE)
    twice = lambda p, b: b["x"] @ p["w"] @ p["w"] @ p["layers"][0]
    found = unconstrained_kernels(twice, PARAMS, BATCH, mesh=mesh, placed=place(PARAMS, RULES, mesh))
    with pytest.raises(UserError) as caught:
        refuse_unconstrained(found)
    text = str(caught.value)
    assert text.count("  w (fsdp, tensor) reaches dot_general at ") == 1 and "test_fence.py:" in text
    assert "  layers (-, fsdp, tensor) reaches" in text and "silently wrong gradients" in text
    assert 'jaxops.constrain(kernel, ("embed", "mlp"))' in text and "sharding.rules: ['w', []]" in text
    assert caught.value.shared  # every process of a job comes to it
    refuse_unconstrained([])


WIDE, HIDDEN = 32, 128


class Planted:
    """Three kernels on ("fsdp", "tensor"): the second reads what the first has split over tensor."""

    rules = [(r".*", ("fsdp", "tensor"))]
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in {"a": (WIDE, HIDDEN), "b": (HIDDEN, WIDE), "c": (WIDE, HIDDEN)}.items()
    }

    def init(self, key):
        wave = lambda *shape: 0.1 * jnp.sin(0.7 + 1.3 * jnp.arange(np.prod(shape), dtype=jnp.float32) ** 1.1)
        return {name: wave(*x.shape).reshape(x.shape) for name, x in self.shapes.items()}


class Draws:
    examples = 10**6

    def batch(self, cursor, size):
        x = np.random.default_rng(cursor).normal(size=(size, WIDE)).astype(np.float32)
        return {"id": np.arange(cursor, cursor + size, dtype=np.int32), "x": x}


def planted(use):
    def objective(params, batch, key):
        h = jax.nn.relu(batch["x"] @ use(params["a"]))
        h = jax.nn.relu(h @ use(params["b"]))
        return {"loss/square": Sum.of(jnp.mean(jnp.square(h @ use(params["c"])), axis=-1))}

    return regression_task(objective, Draws(), model=Planted(), rules=Planted.rules)


def test_the_planted_program_is_wrong_is_refused_and_is_cured():
    """The day that the first assertion fails XLA is mended, and the fence can come down."""
    options = {"accumulations": (1,), "batch_size": 64, "steps": 1}
    (wrong,) = compare_layouts(planted(lambda w: w), [CUBE], **options)
    assert wrong.gradient > 0.1
    with pytest.raises(UserError, match=r"  a \(fsdp, tensor\) reaches dot_general at .*test_fence.py:"):
        check(planted(lambda w: w), [CUBE], **options)
    (cured,) = check(planted(gathered), [CUBE], **options)
    assert cured.gradient < 1e-6
