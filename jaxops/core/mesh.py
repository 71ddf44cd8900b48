"""The mesh: a fixed vocabulary of axes, sizes from the config, always of explicit axis types.

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
"""The axes that the leading dimension of a batch is divided over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Axis sizes; -1 for one of them means "the rest of the devices"."""

    replica: int = 1
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of every axis on `devices` devices.

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
        """What is wrong whatever the number of devices (dotted path, message)."""
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
    """A mesh with every axis of the vocabulary, each explicit; -1 takes the rest of the devices.

    With several slices (`device.slice_index`) the replica axis crosses the slow network between them.

    Raises:
      UserError: the sizes do not fit the devices.
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
        grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1, 1, 1), devices=devices)
    elif devices[0].platform == "cpu":
        grid = np.array(devices).reshape(shape)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices=devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def batch_axes(mesh: Mesh | jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """The batch axes that really divide anything (axes of size one are left out of every spec)."""
    return tuple(axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1)


def batch_shards(mesh: Mesh) -> int:
    """Into how many pieces the leading dimension of a batch is cut."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every leaf of a batch: its first dimension over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def describe_devices(mesh: Mesh | None = None) -> str:
    """What the run runs on, for people: `8 x cpu, jax 0.10.2`."""
    devices = list(mesh.devices.flat) if mesh is not None else jax.devices()
    kind = devices[0].device_kind
    return f"{len(devices)} x {kind}, jax {jax.__version__}"


def serialise_dispatch(mesh: Mesh) -> bool:
    """Whether steps must be waited for one by one on this mesh.

    Several virtual CPU devices share one pool of threads; two steps in flight can each hold a part of it inside
    a collective and wait for ever (seen on jax 0.10.2: the all-reduce rendezvous aborts the process after 40 s).
    """
    devices = list(mesh.devices.flat)
    return devices[0].platform == "cpu" and len(devices) > 1


def use_cpu_devices(count: int) -> None:
    """Asks for `count` virtual CPU devices; must come before the first computation, and only CPU backends heed it."""
    os.environ.setdefault("NPROC", str(2 * count))  # a larger thread pool: see serialise_dispatch
    jax.config.update("jax_num_cpu_devices", count)
