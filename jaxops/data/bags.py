"""Bags, columns that hold a list a row: flattened for an id map and padded again, as plain columns pass through."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32

from jaxops.core.failures import UserError
from jaxops.data.numeric import numbers
from jaxops.data.values import plain

WEIGHT = "/weight"
"""The suffix that turns the name of a bag into the name of its weights, in columns and in batches."""


def flat(values: pa.Array) -> pa.Array:
    """Returns the values of a plain column, or all values of a column of bags, in order of rows."""
    return values.flatten() if pa.types.is_list(values.type) else values


def joined(parts: Sequence[pa.Array]) -> pa.Array:
    """Concatenates arrays. Different types are read by the one rule of values.py, and as text where that leaves two."""
    if len({part.type for part in parts}) > 1:
        parts = [plain(part) for part in parts]
    if len({part.type for part in parts}) > 1:
        parts = [part.cast(pa.string()) for part in parts]
    return pa.concat_arrays(parts) if parts else pa.array([], pa.int64())


def parallel(bags: pa.Array, values: pa.Array, what: str) -> pa.Array:
    """Returns the weights of the values of the bags, a list of float64 a row.

    Raises:
      UserError: a row with more or fewer weights than values; one that is negative, infinite or no number.
    """
    lengths = _lengths(bags)
    found = _lengths(values)
    wrong = np.flatnonzero(found != lengths)
    if len(wrong):
        row = wrong[0]
        raise UserError(f"{what}: row {row + 1} has {found[row]} weight(s) for {lengths[row]} value(s)")
    weights = numbers(flat(values), what)
    wrong = np.flatnonzero(~(weights >= 0))
    if len(wrong):
        row = np.repeat(np.arange(len(lengths)), lengths)[wrong[0]]
        raise UserError(f"{what}: row {row + 1} has a weight that is negative or missing; expected 0 or more")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(weights))


def padded_weights(values: pa.Array) -> Float32[np.ndarray, "rows width"]:
    """Returns the weights of `parallel` by row, padded with 0 to the longest bag."""
    return _padded(values, flat(values).to_numpy(zero_copy_only=False).astype(np.float32), 0)


def padded(values: pa.Array, codes: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, "rows ..."]:
    """Returns the codes of `flat(values)` by row; bags are padded with -1 to the longest."""
    return _padded(values, codes, -1) if pa.types.is_list(values.type) else codes


def _lengths(values: pa.Array) -> np.ndarray:
    return np.asarray(values.value_lengths().fill_null(0))


def _padded(values: pa.Array, codes: np.ndarray, nothing: int) -> np.ndarray:
    lengths = _lengths(values)
    out = np.full((len(values), max(int(lengths.max(initial=0)), 1)), nothing, codes.dtype)
    row = np.repeat(np.arange(len(values)), lengths)
    place = np.arange(len(codes)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    out[row, place] = codes
    return out
