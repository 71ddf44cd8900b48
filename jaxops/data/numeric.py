"""Checks columns of numbers and times: a value that is no number is told and never averaged in."""

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64

from jaxops.core.failures import UserError
from jaxops.data.moments import iso_seconds, unix_seconds
from jaxops.data.values import converted, decoded, floats, is_missing, rows_of

LARGEST = float(np.finfo(np.float32).max)


def numbers(values: pa.Array, what: str) -> Float64[np.ndarray, " rows"]:
    """Returns float64, NaN where a number is missing.

    Raises:
      UserError: text that is no number; an infinite one, or one that float32 cannot hold, which would make every
        statistic of the column infinite or NaN.
    """
    found = floats(values, rows_of(what))
    _refuse(np.isinf(found), what, "infinite; expected a finite number or none")
    _refuse(np.abs(found) > LARGEST, what, f"larger than {LARGEST:.3g}, the largest number that models compute with")
    return found


def weights(values: pa.Array, what: str) -> Float32[np.ndarray, " rows"]:
    """Returns weights as float32.

    Raises:
      UserError: a weight that is missing, negative, infinite or no number.
    """
    found = numbers(values, what)
    _refuse(np.isnan(found), what, "null; an example needs its weight")
    _refuse(found < 0, what, "negative")
    return found.astype(np.float32)


def times(values: pa.Array, what: str) -> Float64[np.ndarray, " rows"]:
    """Returns the unix seconds of timestamps, dates and ISO 8601 text; numbers stay as they are.

    Raises:
      UserError: a time that is missing (it would sort last, into the test part) or cannot be read.
    """
    at = rows_of(what)
    values = decoded(values, at)
    null = is_missing(values) if pa.types.is_string(values.type) else values.is_null(nan_is_null=True)
    _refuse(np.asarray(null), what, "null; a split by time needs a time of every example")
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        return unix_seconds(values)
    expected = "unix times or ISO dates"
    if pa.types.is_string(values.type) and len(values) and not _reads_as_number(values[0].as_py()):
        return np.asarray(converted(values, iso_seconds, at, expected))
    return floats(values, at, expected)


def _refuse(wrong: np.ndarray, what: str, why: str) -> None:
    rows = np.flatnonzero(wrong)
    if len(rows):
        raise UserError(f"{what}: row {rows[0] + 1} is {why} ({len(rows)} such row(s))")


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return not text.strip()
    return True
