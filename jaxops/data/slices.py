"""Masks of the slices that a config names: users and items that are new to training, values of a column."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from jaxops.core.failures import UserError, nearest
from jaxops.data.values import plain

SLICE = "slice/"
"""The prefix of the batch entries that say which examples belong to a slice."""
MOST = 20
"""The most values of a column that becomes slices."""


def by_value(name: str, values: pa.Array) -> dict[str, Bool[np.ndarray, " rows"]]:
    """Returns the rows that hold each value (`gender=F`, `gender=M`); a row of null is in none.

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
    """Returns the slices `cold_KIND` and `warm_KIND`, by their names in a config."""
    return {f"{how}_{kind}": {f"{how}_{kind}": mask} for how, mask in (("cold", cold), ("warm", ~cold))}


def chosen(
    names: Sequence[str], ready: Mapping[str, Mapping[str, np.ndarray]], columns: Iterable[str],
    of: Callable[[str], Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Returns the masks that the names ask for.

    Args:
      names: slices or columns.
      ready: masks of slices that are known already.
      columns: columns that may become slices.
      of: makes the masks of a column.

    Raises:
      UserError: a name is neither a slice nor a column.
    """
    columns = list(columns)
    found: dict[str, np.ndarray] = {}
    for name in names:
        if name not in ready and name not in columns:
            known = [*ready, *columns]
            raise UserError(f"evaluate.slices: no {name!r}{nearest(name, known)} (there are: {', '.join(known)})")
        found |= ready[name] if name in ready else of(name)
    return found
