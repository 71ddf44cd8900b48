"""The one table of accelerators: what a type such as `v5p-128` is, and how Google's tools name it.

Names lie: `v5p-128` counts TensorCores and is 64 chips, `v5e-64` counts chips, `tpu7x-64` counts cores and is 32 chips
of two jax devices each. So chips, cores, jax devices and hosts are four columns. The sources of every row are named in
tests/launch/test_accelerators.py, which compares the table with libtpu where it is installed.

This module imports no jax.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal

from jaxops.core.failures import UserError, nearest

Backend = Literal["mig", "queued-resources", "local"]
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One generation of accelerators, with facts for each chip.

    Attributes:
      name: its name in types and topologies.
      cores: TensorCores of a chip.
      devices: jax devices of a chip.
      counts_cores: whether the number in a type counts cores; else it counts chips.
      hbm: bytes of memory that a program may use, as libtpu's compiler has them; less than the data sheet's.
      flops: peak dense bfloat16 FLOP/s.
      hbm_bandwidth: bytes a second from memory.
      ici_bandwidth: bytes a second to all neighbours together, both directions added.
      dcn_bandwidth: bytes a second of a chip's share of the data centre's network; None where it is not published.
      slices: topology by number of chips.
      kind: jax's name of the device, `device_kind`.
      machine: Compute Engine's machine type, by chips of a host.
      gke: the value of the node selector `cloud.google.com/gke-tpu-accelerator`.
      backend: the way to reach machines of this sort.
    """

    name: str
    cores: int
    devices: int
    counts_cores: bool
    hbm: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float | None
    slices: Mapping[int, str]
    kind: str
    machine: Mapping[int, str]
    gke: str
    backend: Backend


def _cubes(*shapes: str) -> dict[int, str]:
    """Returns topologies by their number of chips."""
    return {_size(shape): shape for shape in shapes}


def _size(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


_FLAT = _cubes("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = _cubes("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")

CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            cores=2,
            devices=1,
            counts_cores=True,
            hbm=30.75 * GIB,
            flops=275e12,
            hbm_bandwidth=1228e9,
            ici_bandwidth=600e9,
            dcn_bandwidth=None,
            slices=_DEEP,
            kind="TPU v4",
            machine={4: "ct4p-hightpu-4t"},
            gke="tpu-v4-podslice",
            backend="queued-resources",
        ),
        Chip(
            name="v5e",
            cores=1,
            devices=1,
            counts_cores=False,
            hbm=15.75 * GIB,
            flops=197e12,
            hbm_bandwidth=819e9,
            ici_bandwidth=400e9,
            dcn_bandwidth=6.4e12 / 8 / 256,
            slices=_FLAT,
            kind="TPU v5 lite",
            machine={1: "ct5lp-hightpu-1t", 4: "ct5lp-hightpu-4t", 8: "ct5lp-hightpu-8t"},
            gke="tpu-v5-lite-podslice",
            backend="queued-resources",
        ),
        Chip(
            name="v5p",
            cores=2,
            devices=1,
            counts_cores=True,
            hbm=95.74 * GIB,
            flops=459e12,
            hbm_bandwidth=2765e9,
            ici_bandwidth=1200e9,
            dcn_bandwidth=50e9 / 8,
            slices=_DEEP,
            kind="TPU v5",
            machine={4: "ct5p-hightpu-4t"},
            gke="tpu-v5p-slice",
            backend="mig",
        ),
        Chip(
            name="v6e",
            cores=1,
            devices=1,
            counts_cores=False,
            hbm=31.25 * GIB,
            flops=918e12,
            hbm_bandwidth=1638e9,
            ici_bandwidth=800e9,
            dcn_bandwidth=100e9 / 8,
            slices=_FLAT,
            kind="TPU v6 lite",
            machine={1: "ct6e-standard-1t", 4: "ct6e-standard-4t", 8: "ct6e-standard-8t"},
            gke="tpu-v6e-slice",
            backend="mig",
        ),
        Chip(
            name="tpu7x",
            cores=2,
            devices=2,
            counts_cores=True,
            hbm=2 * 94.75 * GIB,
            flops=2307e12,
            hbm_bandwidth=7380e9,
            ici_bandwidth=1200e9,
            dcn_bandwidth=100e9 / 8,
            slices=_DEEP,
            kind="TPU7x",
            machine={4: "tpu7x-standard-4t"},
            gke="tpu7x",
            backend="mig",
        ),
    )
}
_ALIASES = {"v5litepod": "v5e", "v6": "v6e", "v7x": "tpu7x", "tpu-v4": "v4", "tpu-v5p": "v5p", "tpu-v6e": "v6e"}
CPU = "cpu"


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A slice of chips, or several alike, as a user names it.

    Attributes:
      type: its name, such as `v5p-128` or `2xv6e-256`.
      chip: the generation; None is virtual devices of a CPU.
      slices: number of slices.
      topology: how the chips of a slice are connected; `1` for a CPU.
      each: number of chips of a slice.

    Example:
      print(find_accelerator("v5p-128"))  # v5p-128 = 64 chips on 16 hosts
    """

    type: str
    chip: Chip | None
    slices: int
    topology: str
    each: int

    @property
    def chips(self) -> int:
        """The number of chips of all slices."""
        return self.slices * self.each

    @property
    def cores(self) -> int:
        """The number of TensorCores."""
        return self.chips * (self.chip.cores if self.chip else 1)

    @property
    def devices(self) -> int:
        """The number of devices that jax sees."""
        return self.chips * (self.chip.devices if self.chip else 1)

    @property
    def chips_of_host(self) -> int:
        """The number of chips that one host drives: all of a small slice, else four."""
        return self.each if self.chip is None or self.each in self.chip.machine else 4

    @property
    def hosts(self) -> int:
        """The number of hosts."""
        return self.chips // self.chips_of_host

    @property
    def machine(self) -> str | None:
        """Compute Engine's machine type of a host; None for a CPU."""
        return self.chip.machine[self.chips_of_host] if self.chip else None

    @property
    def backend(self) -> Backend:
        """The way to reach such machines."""
        return self.chip.backend if self.chip else "local"

    @property
    def node_selector(self) -> dict[str, str]:
        """Kubernetes' node selector on GKE; empty for a CPU."""
        if self.chip is None:
            return {}
        return {
            "cloud.google.com/gke-tpu-accelerator": self.chip.gke,
            "cloud.google.com/gke-tpu-topology": self.topology,
        }

    @property
    def topology_name(self) -> str | None:
        """The name of a slice for jax's ahead-of-time compiler; None for a CPU."""
        return f"{self.chip.name}:{self.topology}" if self.chip else None

    def per_device(self, value: float) -> float:
        """Returns a chip's value as that of one jax device, which may be half a chip."""
        return value / (self.chip.devices if self.chip else 1)

    def __str__(self) -> str:
        if self.chip is None:
            return f"{self.type} = {_count(self.devices, 'virtual CPU device')} of this machine"
        inside = []
        if self.devices != self.chips:
            inside.append(f"{self.devices} jax devices")
        if self.slices > 1:
            inside.append(f"{self.slices} slices of {self.topology}")
        text = f"{self.type} = {_count(self.chips, 'chip')} on {_count(self.hosts, 'host')}"
        return text + (f" ({', '.join(inside)})" if inside else "")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def accelerator_types() -> list[str]:
    """Returns the types of a single slice that the table has, and one of a CPU."""
    return [_type(chip, chips) for chip in CHIPS.values() for chips in chip.slices] + [f"{CPU}-8"]


def _type(chip: Chip, chips: int) -> str:
    return f"{chip.name}-{chips * (chip.cores if chip.counts_cores else 1)}"


def find_accelerator(name: str) -> Accelerator:
    """Returns the accelerator of a type: `v5e-64`, `v5p-128`, `2xv6e-256` (two slices), `cpu-8`.

    Raises:
      UserError: there is no such type; the message names the nearest right one.
    """
    found = re.fullmatch(r"(?:(\d{1,4})x)?([a-z][a-z0-9-]*?)-(\d{1,6})", name.strip().lower())
    if found is None:
        raise _unknown(name)
    slices, family, number = int(found[1] or 1), _ALIASES.get(found[2], found[2]), int(found[3])
    if slices < 1 or number < 1:
        raise _unknown(name)
    if family == CPU:
        if slices > 1:
            raise UserError(f"--on {name}: a CPU has no slices; write {CPU}-{slices * number}")
        return Accelerator(f"{CPU}-{number}", None, 1, "1", number)
    chip = CHIPS.get(family)
    if chip is None:
        raise _unknown(name)
    each = number // chip.cores if chip.counts_cores else number
    topology = chip.slices.get(each)
    if topology is None or (chip.counts_cores and number % chip.cores):
        sizes = [_type(chip, chips) for chips in chip.slices]
        closest = min(chip.slices, key=lambda chips: abs(chips - each))
        counts = f" (its number counts cores, {chip.cores} a chip)" if chip.counts_cores else ""
        raise UserError(
            f"--on {name}: {chip.name} has no slice of that size{counts}; did you mean"
            f" {_type(chip, closest)!r}? (there are: {', '.join(sizes)})"
        )
    prefix = f"{slices}x" if slices > 1 else ""
    return Accelerator(prefix + _type(chip, each), chip, slices, topology, each)


def _unknown(name: str) -> UserError:
    known = accelerator_types()
    return UserError(
        f"--on {name[:60]}: no such accelerator{nearest(name, known)} (known: {', '.join(CHIPS)} or {CPU}, a dash and a"
        " number, such as v5e-64, v5p-128, 2xv6e-256, cpu-8)"
    )
