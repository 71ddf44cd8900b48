"""Plans of one config beside each other: which of several layouts is best, and how large a microbatch may be."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from jaxops.core.failures import UserError
from jaxops.plan.plan import Plan

Planner = Callable[[Sequence[str]], Plan]
"""Plans the config with some more overrides."""


@dataclasses.dataclass(frozen=True)
class LayoutPlan:
    """One of several layouts.

    Attributes:
      overrides: what makes it, `("mesh.fsdp=64", "mesh.tensor=4")`.
      plan: its plan; None where the config does not go with it.
      problem: why it cannot be; None where it fits, as far as is known.
    """

    overrides: tuple[str, ...]
    plan: Plan | None
    problem: str | None

    @property
    def rank(self) -> tuple[int, float, int]:
        """The key of the order: plans that fit, then too large ones, then impossible ones; by time, then memory."""
        if self.plan is None:
            return 2, float("inf"), 0
        bound = self.plan.roofline
        seconds = bound.seconds if bound is not None and self.problem is None else float("inf")
        return int(self.problem is not None), seconds, max(map(self.plan.peak, self.plan.programs), default=0)


def read_layout(text: str) -> tuple[str, ...]:
    """Returns the overrides of a layout; a name without a section has that of the name before it.

    Raises:
      UserError: something in it is no `NAME=VALUE`, or the first name has no section.

    Example:
      read_layout("mesh.fsdp=64,tensor=4")  # ("mesh.fsdp=64", "mesh.tensor=4")
    """
    section, found = "", []
    for part in re.split(r",(?=\s*[\w.\-]+=)", text):
        name, equals, value = part.strip().partition("=")
        if not (name and equals and value) or ("." not in name and "{" not in value and not section):
            raise UserError(f"--compare: expected layouts like mesh.fsdp=64,tensor=4, got {text!r}")
        if "." in name:
            section = name.rpartition(".")[0] + "."
        elif "{" not in value:
            name = section + name
        found.append(f"{name}={value}")
    return tuple(found)


def compare(planned: Planner, layouts: Sequence[Sequence[str]]) -> list[LayoutPlan]:
    """Plans a config in each of several layouts and returns them, the best first.

    Args:
      planned: plans the config with the overrides of a layout.
      layouts: the overrides of each.
    """
    found = []
    for overrides in layouts:
        try:
            one = planned(overrides)
        except UserError as error:
            found.append(LayoutPlan(tuple(overrides), None, str(error)))
        else:
            found.append(LayoutPlan(tuple(overrides), one, one.problem))
    return sorted(found, key=lambda layout: layout.rank)


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """The largest microbatch with which an update fits.

    Attributes:
      size: its examples; None where not even the smallest fits.
      peak: bytes on a device with it, or with the smallest where none fits.
      next: the next larger size, which does not fit; None where the whole update fits at once.
      needs: bytes on a device that the next larger one would take; None where the compiler gave no number.
    """

    size: int | None
    peak: int | None
    next: int | None
    needs: int | None


def largest_microbatch(planned: Planner, sizes: Sequence[int]) -> Microbatch:
    """Finds the largest microbatch that fits by bisection: it compiles the update four times for a dozen sizes.

    Args:
      planned: plans the update with `batch.microbatch=SIZE`.
      sizes: the sizes that are possible, ascending; a larger one is taken to need no less memory.
    """
    tried: dict[int, tuple[bool, int | None]] = {}
    low, high = -1, len(sizes)  # the largest that is known to fit, the smallest that is known not to
    while high - low > 1:
        at = (low + high) // 2 if tried else high - 1  # often all of it fits
        one = planned([f"batch.microbatch={sizes[at]}"])
        word = one.update.compiled
        refused = word is not None and word.problem is not None
        tried[at] = one.problem is None, None if refused else one.peak(one.update)
        low, high = (at, high) if tried[at][0] else (low, at)
    size = sizes[low] if low >= 0 else None
    above = high if high < len(sizes) else None
    return Microbatch(
        size,
        tried[max(low, 0)][1],
        None if above is None else sizes[above],
        None if above is None else tried[above][1],
    )
