"""Columns whose rows are lists (bags) beside plain ones: flattened for an id map, and padded again."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int32


def flat(values: pa.Array) -> pa.Array:
    """The values themselves, or all that the bags hold, in order of rows."""
    return values.flatten() if pa.types.is_list(values.type) else values


def joined(parts: Sequence[pa.Array]) -> pa.Array:
    """One after another; as text where they are of different types."""
    if len({part.type for part in parts}) > 1:
        parts = [part.cast(pa.string()) for part in parts]
    return pa.concat_arrays(parts) if parts else pa.array([], pa.int64())


def padded(values: pa.Array, codes: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, "rows ..."]:
    """The codes of `flat(values)` by row; bags padded with -1 to the longest."""
    if not pa.types.is_list(values.type):
        return codes
    lengths = np.asarray(values.value_lengths().fill_null(0))
    out = np.full((len(values), max(int(lengths.max(initial=0)), 1)), -1, np.int32)
    row = np.repeat(np.arange(len(values)), lengths)
    place = np.arange(len(codes)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    out[row, place] = codes
    return out
