"""The mesh: a fixed vocabulary of axes with sizes from the config, always of explicit axis types.

Explicit types make sharding part of an array's type, so optimizer state inherits its sharding from the parameters
(under Auto axes `jit(tx.init)` silently replicates it).
"""

import dataclasses
import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxops.core.failures import UserError

AXES = ("replica", "data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("replica", "data", "fsdp")
"""The axes that the leading dimension of a batch is sharded over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The sizes of the mesh axes; -1 for one of them means "the rest of the devices"."""

    replica: int = 1
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def sizes(self, devices: int) -> dict[str, int]:
        """Returns the size of every axis on `devices` devices.

        Raises:
          UserError: a size is 0 or below -1, two are -1, or the product is not the number of devices.
        """
        sizes = dataclasses.asdict(self)
        bad = [f"mesh.{axis}={size}" for axis, size in sizes.items() if size == 0 or size < -1]
        if bad:
            raise UserError(f"{', '.join(bad)}: a mesh axis is a positive number, or -1 for the rest")
        rest = [axis for axis, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise UserError(f"mesh.{rest[0]} and mesh.{rest[1]} are both -1: only one axis can be 'the rest'")
        known = math.prod(size for size in sizes.values() if size != -1)
        if rest and devices % known == 0:
            sizes[rest[0]] = devices // known
        if math.prod(sizes.values()) != devices:
            wanted = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1)
            raise UserError(
                f"mesh: {wanted or 'one device'} does not fit {devices} devices"
                f" (axes multiply to {known}; set one axis to -1 to use the rest)"
            )
        return sizes

    def problems(self) -> list[tuple[str, str]]:
        """Returns what is wrong for any number of devices, as (dotted path, message)."""
        found = [
            (axis, "expected a positive number, or -1 for the rest")
            for axis, size in dataclasses.asdict(self).items()
            if size == 0 or size < -1
        ]
        rest = [axis for axis, size in dataclasses.asdict(self).items() if size == -1]
        return found + [(axis, f"only one axis can be -1, and {rest[0]} is") for axis in rest[1:]]


def make_mesh(
    *,
    replica: int = 1,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh with every axis of the vocabulary, each explicit; a size of -1 takes the rest of the devices.

    Args:
      replica: divides the batch; with several slices (`device.slice_index`) it crosses the slow network between them.
      data: divides the batch.
      fsdp: divides the batch, and parameters by their sharding rules.
      tensor: divides the kernels and activations of a layer, by rules and logical names.
      sequence: divides the length of sequences.
      devices: the devices of the mesh; None takes all.

    Raises:
      UserError: the sizes do not fit the devices.

    Example:
      mesh = jaxops.make_mesh(data=2, fsdp=-1)
      print(dict(mesh.shape))
    """
    devices = list(jax.devices() if devices is None else devices)
    config = MeshConfig(replica=replica, data=data, fsdp=fsdp, tensor=tensor, sequence=sequence)
    try:
        sizes = config.sizes(len(devices))
    except UserError as error:
        if devices[0].platform != "cpu":
            raise
        raise UserError(f"{error}; --cpu-devices N stands N virtual devices in for them on this machine") from None
    shape = tuple(sizes[axis] for axis in AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and sizes["replica"] % slices == 0:
        inner = (sizes["replica"] // slices, *shape[1:])
        across = (slices, 1, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inner, across, devices=devices, allow_split_physical_axes=True)
    elif devices[0].platform == "cpu":
        grid = np.array(devices).reshape(shape)
    else:
        # Where no product of whole axes of the torus has the size of an axis, one of them is split (tensor 4 on 16x16).
        grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def batch_axes(mesh: Mesh | jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """Returns the batch axes whose size is above one; axes of size one are left out of every spec."""
    return tuple(axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1)


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch's leading dimension."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every leaf of a batch: its first dimension is sharded over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def describe_devices(mesh: Mesh | None = None) -> str:
    """Describes the devices of the mesh, or all devices, and the version of jax: `8 x cpu, jax 0.10.2`."""
    devices = list(mesh.devices.flat) if mesh is not None else jax.devices()
    kind = devices[0].device_kind
    return f"{len(devices)} x {kind}, jax {jax.__version__}"


def serialise_dispatch(mesh: Mesh) -> bool:
    """Returns whether the host must wait for each step on this mesh before it calls the next.

    Several virtual CPU devices share one pool of threads. Two steps in flight can each hold a part of it inside a
    collective and wait forever (seen on jax 0.10.2: the all-reduce rendezvous aborts the process after 40 s).
    """
    devices = list(mesh.devices.flat)
    return devices[0].platform == "cpu" and len(devices) > 1


def use_cpu_devices(count: int) -> None:
    """Asks for `count` virtual CPU devices, before the first computation; other backends ignore it.

    Example:
      jaxops.use_cpu_devices(8)
      mesh = jaxops.make_mesh(data=8)
    """
    os.environ.setdefault("NPROC", str(2 * count))  # a larger thread pool: see serialise_dispatch
    jax.config.update("jax_num_cpu_devices", count)
