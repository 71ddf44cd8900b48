"""Moments in time: unix seconds in float64 inside, ISO 8601 in UTC to people."""

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64

from jaxops.core.failures import UserError
from jaxops.data.spec import Moment


def moment(value: Moment) -> float:
    """Unix seconds of an ISO date or time, or of a number that already is.

    Raises:
      UserError: neither.
    """
    if isinstance(value, int | float):
        return float(value)
    try:
        return float(iso_seconds(pa.array([value]))[0])
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{value!r} is no ISO date or time (2026-11-15, 2026-11-15T08:30:00+01:00) and no unix time"
        ) from error


def iso(seconds: float) -> str:
    """`1998-04-22T23:10:38Z`."""
    start = datetime.datetime(1970, 1, 1)
    shown = start + datetime.timedelta(seconds=min(max(seconds, -6e10), 2.5e11))
    return shown.isoformat() + "Z"


def unix_seconds(column: pa.Array) -> Float64[np.ndarray, " rows"]:
    """Timestamps or dates, UTC where they are naive, as unix seconds (to the microsecond)."""
    micros = pc.cast(column, pa.timestamp("us", getattr(column.type, "tz", None)), safe=False)
    return pc.cast(micros, pa.int64()).to_numpy(zero_copy_only=False) / 1e6


def iso_seconds(column: pa.Array) -> Float64[np.ndarray, " rows"]:
    """ISO 8601 strings as unix seconds, UTC unless they carry an offset.

    Raises:
      pyarrow.ArrowInvalid: one of them is no date or time.
    """
    zoned = pc.match_substring_regex(column, r"[0-9]{2}:[0-9]{2}.*(Z|[+-][0-9]{2}(:?[0-9]{2})?)$")
    with_zone = pc.cast(pc.if_else(zoned, column, "1970-01-01T00:00:00Z"), pa.timestamp("us", "UTC"))
    without = pc.cast(pc.if_else(zoned, "1970-01-01", column), pa.timestamp("us"))
    return unix_seconds(with_zone) + unix_seconds(without)
