"""Rules to placements: first match wins, nothing is dropped unsaid; activations by logical names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxops.core.failures import UserError
from jaxops.core.mesh import make_mesh
from jaxops.core.sharding import (
    LARGE,
    constrain,
    logical_axes,
    map_named,
    named_leaves,
    parameter_shardings,
    place,
)

pytestmark = pytest.mark.latest


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=2, tensor=2)


def test_paths():
    tree = {"blocks": [{"kernel": 1}, {"kernel": 2}], "bias": 3}
    assert named_leaves(tree) == [("bias", 3), ("blocks/0/kernel", 1), ("blocks/1/kernel", 2)]
    assert map_named(lambda path, x: f"{path}={x}", tree)["blocks"][1] == {"kernel": "blocks/1/kernel=2"}


def test_the_first_rule_that_matches_wins(mesh):
    rules = [(r"out/kernel$", ("tensor", "fsdp")), (r"kernel$", ("fsdp", "tensor")), (r"bias$", ())]
    params = {"out": {"kernel": leaf(4, 6), "bias": leaf(6)}, "up": {"kernel": leaf(4, 6)}, "other": leaf(3)}
    placed = {p.path: p for p in place(params, rules, mesh)}
    assert list(placed) == ["other", "out/bias", "out/kernel", "up/kernel"]
    assert placed["out/kernel"].spec == P("tensor", "fsdp")
    assert placed["up/kernel"].spec == P("fsdp", "tensor")
    assert placed["out/bias"].spec == placed["other"].spec == P()
    assert placed["up/kernel"].bytes_per_device == 4 * 6 * 4 // 4
    assert placed["up/kernel"].shape == (4, 6) and placed["up/kernel"].dtype == "float32"
    assert all(p.dropped == () for p in placed.values())


@pytest.mark.parametrize(
    ("shape", "axes", "spec", "dropped"),
    [
        ((4, 3), ("fsdp", "tensor"), P("fsdp"), ("tensor does not divide 3",)),
        ((3, 4), ("fsdp", "tensor"), P(None, "tensor"), ("fsdp does not divide 3",)),
        ((8, 2), (("fsdp", "tensor"), None), P(("fsdp", "tensor")), ()),
        ((6, 2), (("fsdp", "tensor"),), P("fsdp"), ("tensor does not divide 6",)),
        ((4, 4), ("sequence", "fsdp"), P(None, "fsdp"), ()),
        ((4, 4, 2), ("fsdp",), P("fsdp"), ()),
        ((4, 4), (None, None), P(), ()),
    ],
)
def test_an_axis_that_does_not_divide_is_dropped_and_said(mesh, shape, axes, spec, dropped):
    (found,) = place({"w": leaf(*shape)}, [("w", axes)], mesh)
    assert found.spec == spec
    assert found.dropped == dropped


def test_a_large_parameter_without_a_rule_is_refused(mesh):
    large, small = {"table": {"w.x": leaf(LARGE)}}, {"table": {"w": leaf(LARGE - 1)}}
    with pytest.raises(UserError, match=r"no rule matches parameter table/w\.x .*add one, for example \['w\\\\?\.x'"):
        place(large, [("other", ("fsdp",))], mesh)
    assert place(small, [], mesh)[0].spec == P()
    assert place(large, [("table", ())], mesh)[0].spec == P()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("w", ("fspd",)), r"names no mesh axis: fspd \(known: replica, data, fsdp"),
        (("w", (("data", "model"),)), "names no mesh axis: model"),
        (("w", (None, None, "fsdp")), "has 3 dimensions, parameter w has 2"),
        (("w", ("fsdp", "fsdp")), "names fsdp twice"),
        (("w", (("fsdp", "tensor"), "tensor")), "names tensor twice"),
        (("w(", ("fsdp",)), r"'w\(' is not a regular expression"),
    ],
)
def test_rules_that_cannot_be(mesh, rule, message):
    with pytest.raises(UserError, match=message):
        place({"w": leaf(4, 4)}, [rule], mesh)


def test_shardings_put_the_bytes_where_they_say(mesh):
    params = {"a": np.ones((4, 6), np.float32), "b": np.ones(5, np.float32)}
    rules = [("a", ("fsdp", "tensor")), ("b", ("fsdp",))]
    placed = jax.device_put(params, parameter_shardings(params, rules, mesh))
    for (path, x), placement in zip(named_leaves(placed), place(params, rules, mesh), strict=True):
        assert path == placement.path
        assert {shard.data.nbytes for shard in x.addressable_shards} == {placement.bytes_per_device}


def test_constrain_without_a_mesh_does_nothing():
    x = jnp.ones((2, 3))
    assert constrain(x, ("batch", None)) is x


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("batch",), r"1 names \('batch',\) for an array of rank 2"),
        (("batch", "width"), r"unknown logical names \['width'\] \(known: batch, length"),
    ],
)
def test_constrain_refuses(names, message):
    with pytest.raises(ValueError, match=message):
        constrain(jnp.ones((2, 3)), names)


def test_constrain_types_an_activation_in_an_explicit_mesh(mesh):
    seen = []

    def f(x):
        seen.append(jax.typeof(constrain(x, ("batch", "length", "heads"))).sharding.spec)
        with logical_axes({"heads": None, "length": "tensor"}):
            seen.append(jax.typeof(constrain(x, ("batch", "length", "heads"))).sharding.spec)
        seen.append(jax.typeof(constrain(x, ("batch", None, "heads"))).sharding.spec)
        return x

    with jax.set_mesh(mesh):
        jax.eval_shape(f, jnp.ones((4, 4, 3)))
    # 3 heads are not divided by 2: that axis is left out
    assert seen == [
        P(("data", "fsdp"), None, None),
        P(("data", "fsdp"), "tensor", None),
        P(("data", "fsdp"), None, None),
    ]


def test_constrain_holds_inside_auto_axes(mesh):
    def f(x):
        return jax.sharding.auto_axes(lambda x: constrain(x * 2, ("batch", "heads")), out_sharding=P())(x)

    with jax.set_mesh(mesh):
        x = jax.device_put(np.arange(16, dtype=np.float32).reshape(4, 4), jax.NamedSharding(mesh, P()))
        text = jax.jit(f).lower(x).as_text()
        np.testing.assert_array_equal(jax.jit(f)(x), 2 * np.arange(16).reshape(4, 4))
    assert "sharding_constraint" in text


def test_constrain_inside_shard_map_does_nothing(mesh):
    def f(x):
        y = constrain(x, ("batch", "heads"))
        assert y is x
        return y

    with jax.set_mesh(mesh):
        x = jax.device_put(np.ones((4, 4), np.float32), jax.NamedSharding(mesh, P("data")))
        assert jax.jit(jax.shard_map(f, in_specs=P("data"), out_specs=P("data")))(x).shape == (4, 4)


def test_logical_names_may_only_name_mesh_axes():
    with (
        pytest.raises(UserError, match=r"logical name 'heads' names no mesh axis: tensr; did you mean 'tensor'\?"),
        logical_axes({"heads": "tensr"}),
    ):
        pass


def test_logical_axes_end_with_their_block():
    with pytest.raises(RuntimeError), logical_axes({"mine": "data"}):
        constrain(jnp.ones(2), ("mine",))
        raise RuntimeError
    with pytest.raises(ValueError, match="unknown"):
        constrain(jnp.ones(2), ("mine",))
