"""Meshes from sizes: what fits, what "the rest" is, what is refused, and how batches are cut."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxops.core.failures import UserError
from jaxops.core.mesh import (
    AXES,
    MeshConfig,
    batch_axes,
    batch_sharding,
    batch_shards,
    describe_devices,
    make_mesh,
    serialise_dispatch,
)

pytestmark = pytest.mark.latest


@pytest.mark.parametrize(
    ("asked", "devices", "expected"),
    [
        ({}, 1, {}),
        ({"data": -1}, 8, {"data": 8}),
        ({"data": -1}, 1, {}),
        ({"fsdp": -1, "tensor": 2}, 8, {"fsdp": 4, "tensor": 2}),
        ({"replica": 2, "fsdp": 4}, 8, {"replica": 2, "fsdp": 4}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({"data": 8, "sequence": -1}, 8, {"data": 8}),
    ],
)
def test_sizes(asked, devices, expected):
    assert MeshConfig(**asked).sizes(devices) == dict.fromkeys(AXES, 1) | expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"data": 0}, "mesh.data=0: a mesh axis is a positive number, or -1 for the rest"),
        ({"data": 2, "tensor": -3}, "mesh.tensor=-3: "),
        ({"data": -1, "fsdp": -1}, "mesh.data and mesh.fsdp are both -1"),
        ({"data": 3}, r"mesh: data 3 does not fit 8 devices \(axes multiply to 3"),
        ({"data": -1, "tensor": 3}, r"tensor 3 does not fit 8 devices \(axes multiply to 3"),
        ({}, r"mesh: one device does not fit 8 devices \(axes multiply to 1; set one axis to -1"),
        ({"data": 16}, "data 16 does not fit 8 devices"),
    ],
)
def test_sizes_that_do_not_fit(asked, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(**asked).sizes(8)


def test_what_is_wrong_on_any_machine():
    assert MeshConfig(data=-1).problems() == []
    found = dict(MeshConfig(data=-1, fsdp=-1, tensor=0).problems())
    assert set(found) == {"fsdp", "tensor"}
    assert "only one axis can be -1, and data is" in found["fsdp"]


def test_every_axis_is_there_and_explicit():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Explicit,) * 5
    assert dict(mesh.shape) == {"replica": 1, "data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(data=4)
    assert make_mesh(data=-1, devices=jax.devices()[:4]).shape["data"] == 4


def test_a_batch_is_cut_over_the_batch_axes_that_divide():
    mesh = make_mesh(replica=2, fsdp=2, tensor=2)
    assert batch_axes(mesh) == ("replica", "fsdp")
    assert batch_axes(mesh.abstract_mesh) == ("replica", "fsdp")
    assert batch_shards(mesh) == 4
    assert batch_sharding(mesh).spec == PartitionSpec(("replica", "fsdp"))
    x = jax.device_put(np.arange(8.0), batch_sharding(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2,)}


def test_one_device_cuts_nothing():
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    assert batch_axes(mesh) == () and batch_shards(mesh) == 1
    assert jax.device_put(np.arange(3.0), batch_sharding(mesh)).shape == (3,)


def test_a_type_follows_an_array():
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        x = jax.device_put(np.ones((8, 2), np.float32), jax.NamedSharding(mesh, PartitionSpec("fsdp")))
        seen = []
        jax.jit(lambda x: seen.append(jax.typeof(x * 2).sharding.spec))(x)
    assert seen == [PartitionSpec("fsdp", None)]


def test_devices_for_people():
    assert describe_devices() == f"8 x cpu, jax {jax.__version__}"
    assert describe_devices(make_mesh(devices=jax.devices()[:1])) == f"1 x cpu, jax {jax.__version__}"


def test_virtual_devices_are_waited_for():
    assert serialise_dispatch(make_mesh(data=8))
    assert not serialise_dispatch(make_mesh(devices=jax.devices()[:1]))


def test_slices_lie_along_the_replica_axis():
    """Two slices of four: the replica axis, and nothing else, crosses the network between them."""

    class Chip:
        platform, device_kind, process_index = "cpu", "cpu", 0

        def __init__(self, index):
            self.id, self.slice_index = index, index // 4

    mesh = make_mesh(replica=2, data=4, devices=[Chip(i) for i in range(8)])
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices).reshape(2, 4)
    np.testing.assert_array_equal(slices, [[0] * 4, [1] * 4])


def test_cpu_devices_are_asked_for_before_the_first_computation():
    code = (
        "import os; os.environ.pop('NPROC', None)\n"
        "from jaxops.core.mesh import use_cpu_devices\n"
        "use_cpu_devices(3)\n"
        "import jax; print(len(jax.devices()), os.environ['NPROC'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["3", "6"], done.stderr
