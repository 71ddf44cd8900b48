"""Moments in time: unix seconds in float64 for programs, ISO 8601 in UTC for people."""

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64

from jaxops.core.failures import UserError
from jaxops.data.spec import Moment

DAY = 86_400.0


def moment(value: Moment) -> float:
    """Returns the unix seconds of an ISO date or time, or of a number of seconds.

    Raises:
      UserError: it is neither.
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
    """Formats unix seconds as `1998-04-22T23:10:38Z`."""
    start = datetime.datetime(1970, 1, 1)
    shown = start + datetime.timedelta(seconds=min(max(seconds, -6e10), 2.5e11))
    return shown.isoformat() + "Z"


def unix_seconds(column: pa.Array) -> Float64[np.ndarray, " rows"]:
    """Returns timestamps or dates, UTC where they are naive, as unix seconds (to the microsecond)."""
    micros = pc.cast(column, pa.timestamp("us", getattr(column.type, "tz", None)), safe=False)
    return pc.cast(micros, pa.int64()).to_numpy(zero_copy_only=False) / 1e6


def compact_dates(numbers: Float64[np.ndarray, " rows"]) -> Float64[np.ndarray, " rows"]:
    """Returns the unix seconds of dates of 1900 to 2100 that are written as 20150401; NaN where a number is none."""
    whole = np.nan_to_num(numbers, nan=0.0, posinf=0.0, neginf=0.0)
    days = np.where((whole >= 1.9e7) & (whole < 2.11e7) & (np.trunc(whole) == whole), whole, 0).astype(np.int64)
    year, month, day = days // 10000, days // 100 % 100, days % 100
    likely = (days > 0) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
    start = ((np.where(likely, year, 1970) - 1970) * 12 + np.where(likely, month, 1) - 1).astype("datetime64[M]")
    date = start.astype("datetime64[D]") + (np.where(likely, day, 1) - 1)
    right = likely & (date.astype("datetime64[M]") == start)
    return np.where(right, date.astype(np.int64) * 86400.0, np.nan)


def iso_seconds(column: pa.Array) -> Float64[np.ndarray, " rows"]:
    """Returns ISO 8601 strings as unix seconds, UTC unless they carry an offset; as pandas and BigQuery write them too.

    Digits beyond the microsecond are cut off.

    Raises:
      pyarrow.ArrowInvalid: one of them is no date or time.
    """
    column = pc.utf8_trim_whitespace(column)
    column = pc.replace_substring_regex(column, r"\s*(UTC|utc|GMT|z)$", "Z")
    column = pc.replace_substring_regex(column, r"\s+([+-][0-9]{2}(:?[0-9]{2})?)$", r"\1")
    column = pc.replace_substring_regex(column, r"(:[0-9]{2}\.[0-9]{6})[0-9]+", r"\1")
    zoned = pc.match_substring_regex(column, r"[0-9]{2}:[0-9]{2}.*(Z|[+-][0-9]{2}(:?[0-9]{2})?)$")
    with_zone = pc.cast(pc.if_else(zoned, column, "1970-01-01T00:00:00Z"), pa.timestamp("us", "UTC"))
    without = pc.cast(pc.if_else(zoned, "1970-01-01", column), pa.timestamp("us"))
    return unix_seconds(with_zone) + unix_seconds(without)


class Granularity:
    """Tells whether times are dates alone, in a time zone of any offset, from batches of unix seconds."""

    def __init__(self) -> None:
        self._clock: set[float] = set()

    def add(self, time: Float64[np.ndarray, " rows"]) -> None:
        """Takes the next batch."""
        if len(self._clock) <= 2:
            self._clock |= set(np.unique(time % DAY)[:3].tolist())

    @property
    def dates_alone(self) -> bool:
        """True where all times have the same time of day (or two that are an hour apart, as summer time makes them)."""
        clock = sorted(self._clock)
        return len(clock) < 2 or (len(clock) == 2 and clock[1] - clock[0] in (3600.0, DAY - 3600.0))
