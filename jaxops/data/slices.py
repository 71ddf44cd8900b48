"""Which examples belong to the slices that a config names: users and items new to training, values of a column."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from jaxops.core.failures import UserError, nearest
from jaxops.data.values import plain

SLICE = "slice/"
"""What the entries of a batch begin with that say which examples belong to a slice."""
MOST = 20
"""Values of a column that becomes slices."""


def by_value(name: str, values: pa.Array) -> dict[str, Bool[np.ndarray, " rows"]]:
    """`gender=F`, `gender=M`: which rows hold each value; a row of null is in none.

    Raises:
      UserError: more than `MOST` values, or lists.
    """
    if pa.types.is_list(values.type):
        raise UserError(f"evaluate.slices: {name!r} holds lists; expected a column of one value a row")
    values = plain(values)
    distinct = sorted(pc.unique(values.drop_null()).to_pylist())
    if len(distinct) > MOST:
        raise UserError(f"evaluate.slices: {name!r} has {len(distinct):,} values; expected at most {MOST}")
    return {f"{name}={value}": np.asarray(pc.equal(values, value).fill_null(False)) for value in distinct}


def warm_and_cold(kind: str, cold: Bool[np.ndarray, " rows"]) -> dict[str, dict[str, Bool[np.ndarray, " rows"]]]:
    """The slices `cold_KIND` and `warm_KIND`, by what a config calls them."""
    return {f"{how}_{kind}": {f"{how}_{kind}": mask} for how, mask in (("cold", cold), ("warm", ~cold))}


def chosen(
    names: Sequence[str], ready: Mapping[str, Mapping[str, np.ndarray]], columns: Iterable[str],
    of: Callable[[str], Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:  # fmt: skip
    """The masks that the names ask for: those that are `ready`, or `of` a column.

    Raises:
      UserError: a name that is neither.
    """
    columns = list(columns)
    found: dict[str, np.ndarray] = {}
    for name in names:
        if name not in ready and name not in columns:
            known = [*ready, *columns]
            raise UserError(f"evaluate.slices: no {name!r}{nearest(name, known)} (there are: {', '.join(known)})")
        found |= ready[name] if name in ready else of(name)
    return found
