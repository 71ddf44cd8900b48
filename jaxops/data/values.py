"""One rule for what a cell of an id or a category says, wherever it is read: events, side files, vocabularies, predict.

Integers of every width and whole floats are integers, everything else is exact text, and what stands for "missing" is
null. Which spellings of one integer are one id is decided over all values of a column, in ids.py.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64

from jaxops.core.failures import UserError

MISSING = ("", "nan", "NaN", "NAN", "null", "NULL", "Null", "None", "<NA>", "NaT", "\\N", "__HIVE_DEFAULT_PARTITION__")
"""The words that stand for no value in pandas, SQL and Hive. Other words (`none`, `NA` for Namibia) are values."""
EXACT = 2.0**53
"""Floats from here on do not tell neighbouring integers apart."""

At = Callable[[int], str]
"""Names the place of an element of a column, which is counted from 0: `a.csv: row 3, column 'user'`."""


def rows_of(what: str) -> At:
    """Names the elements of a column by their row, counted from 1."""
    return lambda index: f"{what}: row {index + 1}"


def decoded(values: pa.Array | pa.ChunkedArray, at: At) -> pa.Array:
    """Returns one array without dictionaries; every type of text and bytes is `string`.

    Raises:
      UserError: bytes that are no UTF-8, with the first such row.
    """
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    if isinstance(values.type, pa.BaseExtensionType):
        values = values.storage
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    if pa.types.is_string(kind):
        return values
    if not (binary or pa.types.is_binary_view(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return values
    if pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        values = pc.cast(values, pa.binary())
    try:
        return pc.cast(values, pa.string())
    except pa.ArrowInvalid:
        pass
    for index, value in enumerate(values.to_pylist()):
        try:
            bytes(value or b"").decode()
        except UnicodeDecodeError:
            raise UserError(f"{at(index)} is {value[:40]!r}, which is no UTF-8 text") from None
    raise UserError(f"{at(0)}: a column of {kind} that cannot be read as text")


def is_missing(text: pa.Array) -> pa.Array:
    """Returns true for null and for the words of `MISSING`, with blanks around them or not."""
    return pc.is_in(pc.utf8_trim_whitespace(text), pa.array([*MISSING, None], pa.string()))


def plain(values: pa.Array | pa.ChunkedArray, at: At | str = "column", *, ids: bool = False) -> pa.Array:
    """Returns the column as int64 or text, null where it says that there is no value.

    `ids` are stricter than categories: fractions, truth values and dates name nobody.

    Raises:
      UserError: nested values; bytes that are no UTF-8; of `ids`, a type that no id has or a number that is not whole.
    """
    at = rows_of(at) if isinstance(at, str) else at
    values = decoded(values, at)
    kind = values.type
    if pa.types.is_null(kind):
        return values.cast(pa.string())
    if pa.types.is_string(kind):
        missing = is_missing(values)
        if missing.true_count == values.null_count:
            return values
        return pc.if_else(missing, pa.scalar(None, pa.string()), values)
    if pa.types.is_uint64(kind):
        return _or_text(values)
    if pa.types.is_integer(kind):
        return pc.cast(values, pa.int64())
    if pa.types.is_floating(kind):
        return _of_floats(pc.cast(values, pa.float64()), at, ids)
    if pa.types.is_decimal(kind):
        return _of_decimals(values, at, ids)
    if pa.types.is_nested(kind):
        raise UserError(f"{at(0)}: the column holds {kind}; expected one number or text a row")
    if ids:
        raise UserError(f"{at(0)}: the id column holds {kind}; expected integers or text")
    return pc.cast(values, pa.string())


def _or_text(values: pa.Array) -> pa.Array:
    """Returns integers as int64, or all of them as text where one does not fit, as they would be read from CSV."""
    try:
        return pc.cast(values, pa.int64())
    except pa.ArrowInvalid:
        return pc.cast(values, pa.string())


def _of_floats(values: pa.Array, at: At, ids: bool) -> pa.Array:
    nothing = np.asarray(pc.is_null(values, nan_is_null=True))
    numbers = np.where(nothing, 0.0, values.to_numpy(zero_copy_only=False))
    whole = (np.abs(numbers) < EXACT) & (np.trunc(numbers) == numbers)
    integers = pa.array(np.where(whole, numbers, 0).astype(np.int64), mask=nothing)
    if whole.all():
        return integers
    if ids:
        index = int(np.flatnonzero(~whole)[0])
        raise UserError(
            f"{at(index)} is {float(numbers[index])!r}, which is no id: floats are ids where they are whole"
            " and below 2**53;"
            " write the ids as integers or text"
        )
    text = pc.if_else(pa.array(whole), pc.cast(integers, pa.string()), pc.cast(values, pa.string()))
    return pc.if_else(pa.array(nothing), pa.scalar(None, pa.string()), text)


def _of_decimals(values: pa.Array, at: At, ids: bool) -> pa.Array:
    text = pc.cast(values, pa.string())
    text = pc.replace_substring_regex(text, r"\.0*$", "")
    fraction = pc.fill_null(pc.invert(pc.match_substring_regex(text, r"^-?[0-9]+$")), False)
    if fraction.true_count == 0:
        try:
            return pc.cast(text, pa.int64())
        except pa.ArrowInvalid:
            return text
    if ids:
        index = pc.index(fraction, True).as_py()
        raise UserError(f"{at(index)} is {text[index].as_py()}, which is no id: decimals are ids where they are whole")
    return text


def converted(column: pa.Array, convert: Callable[[pa.Array], Any], at: At, expected: str) -> Any:
    """Returns `convert(column)`; when that fails, bisects for the first value that it cannot take.

    Args:
      column: the values.
      convert: raises ArrowInvalid at a wrong value.
      at: names the place of a value.
      expected: what a value should be, for the error.

    Raises:
      UserError: it fails, with the row and the value.
    """
    try:
        return convert(column)
    except pa.ArrowInvalid:
        good, bad = 0, len(column)
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                convert(column.slice(good, middle - good))
                good = middle
            except pa.ArrowInvalid:
                bad = middle
        raise UserError(f"{at(good)} is {column[good].as_py()!r}, expected {expected}") from None


def floats(column: pa.Array, at: At, expected: str = "a number") -> Float64[np.ndarray, " rows"]:
    """Returns float64, NaN for null; truth values, decimals and text that reads as numbers (or as true and false) too.

    Raises:
      UserError: what is no number, with its row.
    """
    column = decoded(column, at)
    kind = column.type
    if pa.types.is_string(kind):
        column = pc.if_else(is_missing(column), pa.scalar(None, pa.string()), pc.utf8_trim_whitespace(column))
        truths = pc.utf8_lower(column)
        known = pc.is_in(truths, pa.array(["true", "false", None]))
        if column.null_count < len(column) and pc.all(known).as_py():
            column = pc.equal(truths, "true")
    elif pa.types.is_null(kind):
        column = pc.cast(column, pa.float64())
    elif not (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_boolean(kind)
    ):
        raise UserError(f"{at(0)}: the column holds {kind}, expected numbers")
    if pa.types.is_boolean(column.type):
        column = pc.cast(column, pa.int8())
    cast = lambda c: pc.cast(c, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return np.array(converted(column, cast, at, expected), np.float64)
