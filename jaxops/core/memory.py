"""An explanation of out-of-memory errors: the bytes on a device by group, and the settings that would help."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxops.core.failures import RunFailed
from jaxops.core.sharding import named_leaves

WAYS_OUT = (
    "What would help, cheapest first: a smaller batch.microbatch (the update stays the same), model.remat=full,"
    " precision.compute=bfloat16, mesh.fsdp=-1 with mesh.data=1 (shards parameters and optimizer),"
    " optimizer.kind=adafactor."
)
GROUPS = ("params", "frozen", "tables", "opt_state", "extra")


def device_memory(mesh: Mesh) -> tuple[int | None, str]:
    """Returns the bytes that a device of the mesh may use (None where they are unknown), and a name for the device.

    Virtual devices of a CPU divide the memory of the machine evenly.
    """
    device = mesh.devices.flat[0]
    if device.platform != "cpu":
        try:
            return (device.memory_stats() or {}).get("bytes_limit"), device.device_kind
        except jax.errors.JaxRuntimeError:  # a device that is only compiled for
            return None, device.device_kind
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


def state_groups(state: Any, models: Sequence[str] = ()) -> dict[str, int]:
    """Returns the bytes that a state takes on each device, by group, the empty ones left out.

    Args:
      state: a state of arrays or abstract arrays.
      models: the beginnings of the paths of models that lie in one state (`policy/`): each is a group of its own,
        trained and frozen parameters together.
    """
    found: dict[str, int] = {}
    for name in ("params", "frozen"):
        for path, leaf in named_leaves(getattr(state, name)):
            model = next((model for model in models if path.startswith(model)), None)
            group = model.rstrip("/") if model else {"params": "parameters"}.get(name, name)
            found[group] = found.get(group, 0) + bytes_per_device(leaf)
    found |= {"optimizer": bytes_per_device(state.opt_state), "tables": bytes_per_device(state.tables)}
    found["extra"] = bytes_per_device(state.extra)
    return {name: size for name, size in found.items() if size}


def readable(size: float) -> str:
    """Returns a number of bytes for people, such as `1.4 GiB`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(int(size).bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{size / 2 ** (10 * power):.{1 if power else 0}f} {units[power]}"


def out_of_memory(state: Any) -> str:
    """Returns the message: the bytes on each device by group of the state, then the settings that would help."""
    lines = ["out of device memory. The state takes, on each device:"]
    for name in GROUPS:
        size = bytes_per_device(getattr(state, name))
        if size:
            lines.append(f"  {name:<10} {size / 2**20:10.1f} MiB")
    lines.append(f"The rest is activations and temporaries. {WAYS_OUT}")
    return "\n".join(lines)
