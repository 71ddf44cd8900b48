"""What orbax wrote, read by tensorstore: the same bits as orbax reads, on any mesh, and memory that nobody shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxops.core import orbax_io, read_arrays
from jaxops.core.checkpoint import Checkpoints

P = PartitionSpec
TREE = {
    "a": {
        "kernel": np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32),
        "0": np.arange(8, dtype=np.int32),
    },
    "b.c": np.linspace(-3, 3, 16).astype(jnp.bfloat16),
    "step": np.int32(7),
    "on": np.array([True, False]),
    "fp8": np.arange(8).astype(jnp.float8_e4m3fn),
}


def mesh_of(*sizes):
    return jax.make_mesh(sizes, ("data", "fsdp")[: len(sizes)], axis_types=(AxisType.Explicit,) * len(sizes))


@pytest.fixture
def folder(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, TREE, {})
    return epath.Path(tmp_path / "1" / orbax_io.ITEM)


def wanted(sharding=None):
    flat = {"a.kernel": TREE["a"]["kernel"], "a.0": TREE["a"]["0"]} | {k: v for k, v in TREE.items() if k != "a"}
    split = lambda x: None if sharding is None else sharding if x.ndim == 2 else NamedSharding(sharding.mesh, P())
    return flat, {k: jax.ShapeDtypeStruct(np.shape(v), v.dtype, sharding=split(v)) for k, v in flat.items()}


def test_orbax_reads_the_same(folder):
    from orbax.checkpoint import v1

    theirs = v1.load(folder.parent, checkpointable_name=orbax_io.ITEM)
    ours = read_arrays.read_arrays(folder, wanted()[1])
    for name, value in {"a.kernel": theirs["a"]["kernel"], "b.c": theirs["b.c"], "step": theirs["step"]}.items():
        assert ours[name].dtype == value.dtype and np.array_equal(ours[name], value)


@pytest.mark.parametrize("sizes, spec", [((8,), P("data")), ((2, 4), P("fsdp", "data")), ((2, 2), P(None, "fsdp"))])
def test_every_mesh_gets_its_pieces(folder, sizes, spec):
    sharding = NamedSharding(mesh_of(*sizes), spec)
    flat, abstract = wanted(sharding)
    for name, found in read_arrays.read_arrays(folder, abstract).items():
        assert found.sharding == abstract[name].sharding and found.dtype == flat[name].dtype, name
        assert np.array_equal(found, flat[name]), name


def test_a_piece_that_devices_share_is_not_overwritten_by_one_of_them(folder):
    """Replicas on CPU share the memory that was read: a step that may overwrite its input must not write there."""
    _, abstract = wanted(NamedSharding(mesh_of(8), P()))
    found = read_arrays.read_arrays(folder, {"a.kernel": abstract["a.kernel"]})["a.kernel"]
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    found = step(step(found))
    assert all(np.array_equal(s.data, TREE["a"]["kernel"] + 1 + 1) for s in found.addressable_shards)


def test_little_is_in_flight_where_little_may_be(folder, monkeypatch):
    monkeypatch.setattr(read_arrays, "_IN_FLIGHT", 1)
    flat, abstract = wanted(NamedSharding(mesh_of(8), P("data")))
    assert all(np.array_equal(x, flat[name]) for name, x in read_arrays.read_arrays(folder, abstract).items())


@pytest.mark.parametrize(
    "name, like, said",
    [
        ("nothing", jax.ShapeDtypeStruct((2,), np.float32), "nothing"),
        ("step", jax.ShapeDtypeStruct((2,), np.int32), r"step is int32\[\], not int32\[2\]"),
        ("b.c", jax.ShapeDtypeStruct((16,), np.float32), r"b.c is bfloat16\[16\], not float32\[16\]"),
    ],
)
def test_nothing_is_cast_or_made_up(folder, name, like, said):
    with pytest.raises(ValueError, match=said):
        read_arrays.read_arrays(folder, {name: like})
