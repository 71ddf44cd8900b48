"""The devices of an accelerator that is not here: libtpu's compiler knows them, and nothing runs on them."""

import importlib.util
import os
from typing import Any

import jax

from jaxops.core.failures import UserError
from jaxops.core.mesh import use_cpu_devices
from jaxops.launch.accelerators import Accelerator

ADVICE = "make plan-env, or pip install 'jaxops[plan]' on Linux x86"
_QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process that loads libtpu is refused
    "TPU_SKIP_MDS_QUERY": "1",  # on a Google machine that has no TPU the query hangs
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def has_compiler(accelerator: Accelerator) -> bool:
    """Returns whether programs can be compiled here for the accelerator: a CPU, or a TPU where libtpu is installed."""
    return accelerator.chip is None or importlib.util.find_spec("libtpu") is not None


def prepare(accelerator: Accelerator) -> None:
    """Chooses jax's backend for planning: a CPU, with as many virtual devices as are needed. Call it before any other.

    A chip of this machine is left alone: another program may hold it.
    """
    jax.config.update("jax_platforms", "cpu")
    if not has_compiler(accelerator) or accelerator.chip is None:
        use_cpu_devices(accelerator.devices)


def planned_devices(accelerator: Accelerator) -> list[Any]:
    """Returns the devices of the accelerator; virtual CPU devices stand in for chips where there is no libtpu.

    Raises:
      UserError: there are too few virtual devices, or libtpu refuses the topology.
    """
    if accelerator.chip is not None and has_compiler(accelerator):
        return _topology(accelerator)
    devices = [device for device in jax.devices() if device.platform == "cpu"]
    if len(devices) < accelerator.devices:
        raise UserError(
            f"{accelerator.type}: {accelerator.devices} virtual CPU devices are needed, and jax was started with"
            f" {len(devices)} (jaxops plan asks for them itself)"
        )
    return devices[: accelerator.devices]


def _topology(accelerator: Accelerator) -> list[Any]:
    from jax.experimental import topologies

    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    assert accelerator.chip is not None
    more: dict[str, Any] = {"num_slices": accelerator.slices} if accelerator.slices > 1 else {}
    if accelerator.chip.name == "v4":
        more["chip_config_name"] = "megacore"
    host = {1: (1, 1, 1), 8: (2, 4, 1)}.get(accelerator.chips_of_host)
    if host is not None:
        more["chips_per_host_bounds"] = host
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=str(accelerator.topology_name), **more)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{accelerator.type}: libtpu does not know this slice: {str(error)[:300]}") from error
    return list(found.devices)
