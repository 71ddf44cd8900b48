"""A roofline: the least time that a step can take on an accelerator, and the share of the peak that this leaves."""

import dataclasses
from collections.abc import Sequence

from jaxops.launch.accelerators import Accelerator
from jaxops.plan.program import ProgramPlan

ASSUMPTIONS = (
    "each program takes as long as the slowest of its products at the peak rate, one reading of its arguments and one"
    " writing of its results, tables apart, at the bandwidth of memory, and its exchanges at the bandwidth between"
    " chips, with all three at the same time; temporaries, the host and dispatch take none. It is a bound: real steps"
    " are slower"
)


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least seconds of a program in one step, over all its runs.

    Attributes:
      name: the program.
      products: of its products.
      memory: of its arguments and results.
      exchange: of its collectives; 0 where it was not compiled.
    """

    name: str
    products: float
    memory: float
    exchange: float

    @property
    def seconds(self) -> float:
        """The slowest of the three."""
        return max(self.products, self.memory, self.exchange)

    @property
    def by(self) -> str:
        """The name of the one that bounds it."""
        return max(("products", "memory", "exchange"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The bound of a step.

    Attributes:
      bounds: that of each program.
      flops: FLOPs of a step over all devices, recomputation included.
      peak: FLOP/s of all devices.
    """

    bounds: Sequence[Bound]
    flops: float
    peak: float

    @property
    def seconds(self) -> float:
        """The least seconds of a step."""
        return sum(bound.seconds for bound in self.bounds)

    @property
    def mfu(self) -> float:
        """The largest share of the peak FLOP/s that a step can reach."""
        return self.flops / (self.seconds * self.peak) if self.seconds else 0.0


def roofline(programs: Sequence[ProgramPlan], accelerator: Accelerator, peak: float, devices: int) -> Roofline:
    """Returns the bound of a step.

    Args:
      programs: the programs of the step.
      accelerator: what they run on.
      peak: FLOP/s of one device.
      devices: number of devices.
    """
    chip = accelerator.chip
    assert chip is not None
    memory, ici = accelerator.per_device(chip.hbm_bandwidth), accelerator.per_device(chip.ici_bandwidth)
    dcn = accelerator.per_device(chip.dcn_bandwidth) if chip.dcn_bandwidth else None
    bounds = []
    for one in programs:
        found = one.compiled
        written = found.outputs if found is not None else one.of_state if one.gradients else 0
        # Of a table some rows alone are read and written; the bound leaves them out.
        moved = one.arguments - one.of_tables + max(written - one.of_tables, 0)
        exchanged = 0.0
        for each in found.collectives if found is not None else ():
            # An all-reduce passes over the links twice: once to add up, once to spread the sum.
            sent = each.bytes * (2 if each.kind == "all-reduce" else 1)
            exchanged += sent / (dcn if each.between_slices and dcn else ici / 2)  # ici counts both directions
        bounds.append(
            Bound(
                one.name,
                one.times * one.flops / (peak * devices),
                one.times * moved / memory,
                one.times * exchanged,
            )
        )
    flops = sum(one.times * one.flops for one in programs)
    return Roofline(bounds, flops, peak * devices)
