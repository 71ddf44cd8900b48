"""A rough estimate of the temporaries of a program, read off its jaxpr before anything is compiled.

Counted are the arrays that loops stack up for the backward pass (one for each layer), and three times the largest other
array: what XLA needs at once of the chain around it. It says whether something is far off, and no more. Tested in
tests/plan/test_estimate.py.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

AT_ONCE = 3
"""How many arrays of the size of the largest are alive at a time."""
_FUSED = frozenset({"broadcast_in_dim", "reshape", "transpose", "squeeze", "iota", "convert_element_type", "copy"})
"""Operations that XLA fuses into their users."""


@dataclasses.dataclass(frozen=True)
class Shards:
    """How arrays of a program are assumed to be divided.

    Attributes:
      shapes: by shape of a parameter, the number of devices that it is divided over.
      rows: the numbers of examples that a dimension may be.
      batch: the number of devices that a dimension of examples is divided over.
    """

    shapes: Mapping[tuple[int, ...], int]
    rows: frozenset[int]
    batch: int

    def bytes(self, aval: Any) -> int:
        """Returns the bytes of an array of examples on a device; 0 for what is none, such as a gradient."""
        shape, dtype = tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", None)
        if dtype is None or jax.dtypes.issubdtype(dtype, jax.dtypes.extended) or shape in self.shapes:
            return 0
        return math.prod(shape) * dtype.itemsize // self.batch if self.rows & {*shape} else 0


def temporaries(closed: ClosedJaxpr, shards: Shards) -> int:
    """Returns about how many bytes of arrays of examples a program has on a device, beside its arguments."""
    kept, largest = _walk(closed.jaxpr, shards)
    return kept + AT_ONCE * largest


def _walk(jaxpr: Jaxpr, shards: Shards) -> tuple[int, int]:
    """Returns the bytes that loops stack up, and those of the largest other array."""
    kept = largest = 0
    for eqn in jaxpr.eqns:
        inside = [_walk(body, shards) for body in _bodies(eqn)]
        largest = max([largest, *(one for _, one in inside)])
        kept += max((one for one, _ in inside), default=0)
        if eqn.primitive.name == "scan":
            (body,) = _bodies(eqn)
            for var, each in zip(eqn.outvars, body.outvars, strict=True):
                if _rank(var) > _rank(each):  # stacked, and not carried on
                    kept += shards.bytes(var.aval)
        elif not inside and eqn.primitive.name not in _FUSED:
            largest = max([largest, *(shards.bytes(var.aval) for var in eqn.outvars)])
    return kept, largest


def _rank(var: Any) -> int:
    return len(getattr(var.aval, "shape", ()))


def _bodies(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item
