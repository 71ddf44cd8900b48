"""Columns of numbers and times, checked: what is no number is told, never averaged in."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, Float64

from jaxops.core.failures import UserError
from jaxops.data.moments import iso_seconds, unix_seconds


def numbers(values: pa.Array, what: str) -> Float64[np.ndarray, " rows"]:
    """float64, NaN where there is none.

    Raises:
      UserError: text that is no number; an infinite one, which would make every statistic of the column NaN.
    """
    if pa.types.is_string(values.type):
        values = pc.utf8_trim_whitespace(values)
        values = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
    try:
        found = np.array(pc.cast(values, pa.float64()).fill_null(float("nan")))
    except pa.ArrowInvalid as error:
        raise UserError(f"{what}: expected numbers: {error}") from None
    _refuse(np.isinf(found), what, "infinite; expected a finite number or none")
    return found


def weights(values: pa.Array, what: str) -> Float32[np.ndarray, " rows"]:
    """float32, 0 or more.

    Raises:
      UserError: a weight that is missing, negative, infinite or no number.
    """
    found = numbers(values, what)
    _refuse(np.isnan(found), what, "null; an example needs its weight")
    _refuse(found < 0, what, "negative")
    return found.astype(np.float32)


def times(values: pa.Array, what: str) -> Float64[np.ndarray, " rows"]:
    """Of timestamps, dates and ISO 8601 text unix seconds; numbers as they are.

    Raises:
      UserError: a time that is missing (it would sort last, into the test part) or cannot be read.
    """
    _refuse(np.asarray(values.is_null()), what, "null; a split by time needs a time of every example")
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        return unix_seconds(values)
    if pa.types.is_string(values.type) and len(values) and not _reads_as_number(values[0].as_py()):
        try:
            return iso_seconds(values)
        except pa.ArrowInvalid as error:
            raise UserError(f"{what}: expected unix times or ISO dates: {error}") from None
    found = numbers(values, what)
    _refuse(np.isnan(found), what, "null; a split by time needs a time of every example")
    return found


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
