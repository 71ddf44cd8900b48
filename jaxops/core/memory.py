"""An explanation of out-of-memory errors: the bytes on a device by group, and the settings that would help."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxops.core.failures import RunFailed
from jaxops.core.sharding import named_leaves

GROUPS = ("params", "frozen", "tables", "opt_state", "extra")


def device_memory(mesh: Mesh) -> tuple[int | None, str]:
    """Returns the bytes that a device of the mesh may use (None where they are unknown), and a name for the device.

    Virtual devices of a CPU divide the memory of the machine evenly.
    """
    device = mesh.devices.flat[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit"), device.device_kind
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // len(mesh.local_devices), "this machine, over its virtual devices,"


@contextlib.contextmanager
def explained(state: Callable[[], Any]) -> Iterator[None]:
    """Turns an out-of-memory error inside into a message about `state()`, which may be abstract.

    Raises:
      RunFailed: a device ran out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
            raise RunFailed(out_of_memory(state())) from error
        raise


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that the arrays of a tree take on each device, by their shard shapes."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for _, leaf in named_leaves(tree))


def out_of_memory(state: Any) -> str:
    """Returns the message: the bytes on each device by group of the state, then the settings that would help."""
    lines = ["out of device memory. The state takes, on each device:"]
    for name in GROUPS:
        size = bytes_per_device(getattr(state, name))
        if size:
            lines.append(f"  {name:<10} {size / 2**20:10.1f} MiB")
    lines.append(
        "The rest is activations and temporaries. What would help, cheapest first: a smaller batch.microbatch (the"
        " update stays the same), model.remat=full, precision.compute=bfloat16, mesh.fsdp=-1 with mesh.data=1 (shards"
        " parameters and optimizer), optimizer.kind=adafactor."
    )
    return "\n".join(lines)
