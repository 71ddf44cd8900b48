"""Reads files as batches of events (user, item, time, weight), checked; each mistake is told with its file and row.

It streams: one batch of rows is in memory at a time. Events come in original row order (files in order, rows in
order).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, Float64, Int64

from jaxops.core.failures import UserError
from jaxops.data import formats
from jaxops.data.files import DataFile
from jaxops.data.interactions.spec import Columns
from jaxops.data.moments import compact_dates, iso, iso_seconds, unix_seconds
from jaxops.data.spec import TimeUnit
from jaxops.data.values import converted, decoded, floats, is_missing, plain

UNITS: dict[str, float] = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
FAR_FUTURE = 32_503_680_000.0
"""The year 3000 in unix seconds: a time beyond it is in another unit than the config says."""


@dataclasses.dataclass(frozen=True)
class Events:
    """A batch of events; `time` and `weight` are None where the data has no such column. Only `context` has nulls.

    `null_ids` counts the rows that were left out because they name no user or no item; `where` is the file and `rows`
    are the numbers of the rows there, from 1.
    """

    user: pa.Array
    item: pa.Array
    time: Float64[np.ndarray, " rows"] | None
    weight: Float32[np.ndarray, " rows"] | None
    null_ids: int
    where: str
    rows: Int64[np.ndarray, " rows"]
    context: tuple[pa.Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Place:
    """The origin of a batch: rows are counted from 1, after the header."""

    file: str
    first_row: int
    column: str

    def row(self, index: int) -> str:
        return f"{self.file}: row {self.first_row + index}, column {self.column!r}"


def is_text(files: Sequence[DataFile]) -> bool:
    """Returns true where the format cannot tell an integer from a string."""
    return files[0].format in ("csv", "tsv")


def read_events(files: Sequence[DataFile], columns: Columns, header: Sequence[str] | None = None) -> Iterator[Events]:
    """Yields all events of `files`, in order.

    Raises:
      UserError: a file that is not of its format, a missing column, ids that name nobody (fractions, dates), a time or
        weight that is null, not a number or no date; with the file, row and value.
    """
    numbers = [name for name in (columns.time, columns.weight) if name is not None]
    wanted = [columns.user, columns.item, *numbers, *columns.context]
    for file in files:
        try:
            yield from convert_batches(formats.batches(file, wanted, header, numbers), columns, file.name)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file.name}: cannot be read as {file.format}: {error}") from error


def convert_batches(batches: Iterator[pa.RecordBatch], columns: Columns, where: str) -> Iterator[Events]:
    """Yields record batches as checked events; `where` names them in errors, which count rows from 1.

    Raises:
      UserError: what `read_events` raises.
    """
    row = 1
    for batch in batches:
        place = lambda column, first=row: _Place(where, first, column)
        _refuse_missing(batch, batches, columns, place)
        context = tuple(plain(batch.column(name), place(name).row) for name in columns.context)
        user = plain(batch.column(columns.user), place(columns.user).row, ids=True)
        item = plain(batch.column(columns.item), place(columns.item).row, ids=True)
        rows = np.arange(row, row + len(batch))
        time, weight = None, None
        if columns.time is not None:
            time = _times(batch.column(columns.time), columns.time_unit, place(columns.time))
        if columns.weight is not None:
            weight = _weights(batch.column(columns.weight), place(columns.weight))
        known = pc.and_(pc.is_valid(user), pc.is_valid(item))
        null_ids = len(batch) - known.true_count
        if null_ids:
            keep = known.to_numpy(zero_copy_only=False)
            user, item, rows = user.filter(known), item.filter(known), rows[keep]
            time = None if time is None else time[keep]
            weight = None if weight is None else weight[keep]
            context = tuple(values.filter(known) for values in context)
        yield Events(user, item, time, weight, null_ids, where, rows, context)
        row += len(batch)


def _refuse_missing(
    batch: pa.RecordBatch,
    rest: Iterator[pa.RecordBatch],
    columns: Columns,
    place: Callable[[str], _Place],
) -> None:
    """Refuses a null or NaN time or weight, and says how many there are in the file."""
    for name in (columns.time, columns.weight):
        if name is None:
            continue
        missing = _missing(batch.column(name), place(name))
        first = pc.index(missing, True).as_py()
        if first >= 0:
            count = sum(
                pc.sum(_missing(b.column(name), place(name))).as_py() or 0 for b in itertools.chain([batch], rest)
            )
            raise UserError(
                f"{place(name).row(first)} has no value (null or NaN); {count} such row(s) in this file. "
                "Drop or fill them: an event needs its time and weight"
            )


def _missing(column: pa.Array, place: _Place) -> pa.Array:
    column = decoded(column, place.row)
    if pa.types.is_string(column.type):
        blank = pc.is_in(pc.utf8_lower(pc.utf8_trim_whitespace(column)), pa.array(["nan", "null", "none", "na"]))
        return pc.or_(is_missing(column), pc.fill_null(blank, False))
    return pc.is_null(column, nan_is_null=True)


def _numbers(column: pa.Array, place: _Place, expected: str = "a number") -> Float64[np.ndarray, " rows"]:
    values = floats(column, place.row, expected)
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise UserError(f"{place.row(int(wrong[0]))} is infinite")
    return values


def _weights(column: pa.Array, place: _Place) -> Float32[np.ndarray, " rows"]:
    """Returns weights of zero or more. An event of weight zero counts as history and is not learnt."""
    values = _numbers(column, place)
    wrong = np.flatnonzero((values < 0) | (values > np.finfo(np.float32).max))
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{place.row(row)} is {values[row]:g}; {len(wrong)} such row(s) here. A weight says how much an event"
            " counts: expected 0 or more, and a number that float32 can hold"
        )
    return values.astype(np.float32)


def _times(column: pa.Array, unit: TimeUnit, place: _Place) -> Float64[np.ndarray, " rows"]:
    """Returns unix seconds, float64 (microseconds stay apart until 2255); strings are read as the first one is."""
    column = decoded(column, place.row)
    kind = column.type
    if not len(column):
        return np.empty(0)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return unix_seconds(column)
    if pa.types.is_string(kind) and not _reads_as_number(column[0].as_py()):
        expected = "unix time or an ISO date or time (2026-11-15T08:30:00)"
        return np.asarray(converted(column, iso_seconds, place.row, expected))
    numbers = _numbers(column, place, "a unix time as in the rows before")
    dates = compact_dates(numbers)
    if unit == "date":
        wrong = np.flatnonzero(np.isnan(dates))
        if len(wrong):
            shown = column[int(wrong[0])].as_py()
            raise UserError(f"{place.row(int(wrong[0]))} is {shown!r}, expected a date as 20150401 (columns.time_unit)")
        return dates
    if not np.isnan(dates).any():
        shown = int(numbers[0])
        raise UserError(
            f"{place.row(0)} is {shown}: the date {iso(dates[0])[:10]}, or {shown:,} seconds after 1970? All rows look"
            " like dates; set `columns.time_unit: date` (of seconds take any constant off, order alone counts)"
        )
    seconds = numbers / UNITS[unit]
    far = np.flatnonzero(np.abs(seconds) >= FAR_FUTURE)
    if len(far):
        raise UserError(
            f"{place.row(int(far[0]))} is {column[int(far[0])].as_py()}, which is past the year 3000 in "
            f"{unit!r}; set `columns.time_unit` (s, ms, us, ns, date)"
        )
    return seconds


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
