"""Columns as they are in a file, and side files joined to users or items by their original ids."""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxops.core.failures import UserError, nearest
from jaxops.data import formats
from jaxops.data.bags import WEIGHT, parallel
from jaxops.data.files import DataFile, expand_paths, summary
from jaxops.data.ids import Ids
from jaxops.data.numeric import numbers as as_numbers
from jaxops.data.spec import Format, SideFile, TextFormat
from jaxops.data.values import plain


def read_columns(
    path: str | Sequence[str],
    wanted: Sequence[str],
    format: Format = "auto",
    header: Sequence[str] | None = None,
    numbers: Collection[str] = (),
    text: TextFormat = TextFormat(),
) -> pa.Table:
    """These columns of the files, in order; text where the format cannot tell.

    Args:
      path: a file, glob, folder or several of them.
      wanted: the names of the columns.
      format: the format of the files.
      header: the names of all columns where text has no header line.
      numbers: columns that are read as numbers alone, as in `formats.batches`.
      text: how CSV and TSV are written.

    Raises:
      UserError: what `files.expand` and reading raise; no rows.
    """
    files = expand_paths(path, format, text)
    parts: list[pa.RecordBatch] = []
    for file in files:
        with _told(file):
            found = formats.batches(file, list(wanted), header, numbers)
            parts += [batch.select(list(wanted)) for batch in found]
    if not any(len(part) for part in parts):
        raise UserError(f"no rows in {summary(files)}")
    return pa.concat_tables([pa.Table.from_batches([part]) for part in parts], promote_options="permissive")


@contextlib.contextmanager
def _told(file: DataFile) -> Iterator[None]:
    """An error of reading as one of the user's, with the file's name."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file.name}: cannot be read as {file.format}: {error}") from error


def columns_of(
    path: str | Sequence[str],
    format: Format = "auto",
    header: Sequence[str] | None = None,
    text: TextFormat = TextFormat(),
) -> list[str]:
    """The columns that any of the files has: reading one of them says which file lacks it.

    Raises:
      UserError: what `files.expand` raises; a file that cannot be read, or is not of its format.
    """
    found: dict[str, None] = {}
    for file in expand_paths(path, format, text):
        with _told(file):
            found |= dict.fromkeys(formats.columns(file, header))
    return list(found)


def whole(table: pa.Table, name: str) -> pa.Array:
    """A column in one piece, of the type that it has."""
    values = table[name].combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    return values


def column(table: pa.Table, name: str, separator: str | None = None) -> pa.Array:
    """A column in one piece; with `separator` a bag, a list a row (null and empty text: an empty one).

    Raises:
      UserError: lists where there is no bag, or a bag that is neither lists nor text.
    """
    values = whole(table, name)
    kind = values.type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if listed and separator is None:
        raise UserError(f"column {name!r} holds lists; a feature of several values is named in `bags`")
    if separator is None:
        return plain(values)
    if listed:
        return values if pa.types.is_list(kind) else pc.cast(values, pa.list_(kind.value_type))
    if pa.types.is_primitive(kind):
        raise UserError(f"column {name!r} holds {kind}; expected a bag: lists, or text apart by {separator!r}")
    text = plain(values)
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text)
    return pc.split_pattern(text, separator)


def bags(
    table: pa.Table, names: Sequence[str], weights: Mapping[str, str], separator: str, what: str
) -> dict[str, pa.Array]:
    """These bags and, as `NAME/weight`, the weights of those that have any; `what` is where a config says so.

    Raises:
      UserError: weights of what is no bag, or that do not go with it.
    """
    for name in weights:
        if name not in names:
            raise UserError(f"{what}.weights: {name!r} is none of {what}.bags{nearest(name, names)}")
    out = {name: column(table, name, separator) for name in names}
    for name, weight in weights.items():
        given = column(table, weight, separator)
        out[f"{name}{WEIGHT}"] = parallel(out[name], given, f"{what}.weights.{name}: column {weight!r}")
    return out


def read_side(config: SideFile, ids: Ids, what: str) -> dict[str, pa.Array]:
    """The file's columns by row of `ids` (its first row is 0 here); null, or an empty bag, where the file has none.

    Weights of a bag are `NAME/weight`; numbers are float64, NaN where there is none. A key may have several rows that
    say the same: columns of items in the file of the events are read so.

    Raises:
      UserError: what `read_columns` and `bags` raise; rows of one key that differ.
    """
    wanted = [config.key, *config.columns, *config.bags, *config.weights.values(), *config.numeric]
    alone = {*config.numeric} - {config.key, *config.columns}
    table = read_columns(config.path, list(dict.fromkeys(wanted)), config.format, config.header, alone, config.text)
    keys = column(table, config.key)
    if len(pc.unique(keys.drop_null())) != len(keys) - keys.null_count:
        table = _one_each(table, keys, f"{what}: {config.key}")
        keys = column(table, config.key)
    known = keys.drop_null()
    # A row without a key is nobody's: a value in its place could be somebody's id.
    there = np.flatnonzero(np.asarray(keys.is_valid()))
    rows = ids.rows(known.to_numpy(zero_copy_only=False))
    at = np.full(len(ids), -1, np.int64)
    found = rows >= ids.first
    at[rows[found] - ids.first] = there[found]
    if not found.any():
        raise UserError(f"{what}: no {config.key} of the file is an id of the data: is it the right column?")
    take = pa.array(at, mask=at < 0)
    out = {name: column(table, name).take(take) for name in config.columns}
    for name in config.numeric:
        values = as_numbers(column(table, name), f"{what}.numeric: {name}")
        out[name] = pa.array(np.where(at < 0, np.nan, values[at]))
    held = bags(table, config.bags, config.weights, config.separator, what)
    return out | {name: values.take(take) for name, values in held.items()}


def _one_each(table: pa.Table, keys: pa.Array, what: str) -> pa.Table:
    """The first row of each key, of which all rows say the same; none of null."""
    codes = keys.dictionary_encode().indices
    there = codes.is_valid()
    table, codes = table.filter(there), np.asarray(codes.filter(there))
    _, first = np.unique(codes, return_index=True)
    before = pa.array(first[codes])  # codes are 0, 1, ... by arrival, as `first` is
    for name in table.column_names:
        values = whole(table, name)
        if pa.types.is_floating(values.type):
            values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
        if not values.equals(values.take(before)):
            pairs = zip(values.to_pylist(), values.take(before).to_pylist(), strict=True)
            row, (later, earlier) = next((row, pair) for row, pair in enumerate(pairs) if pair[0] != pair[1])
            key = keys.filter(there)[row].as_py()
            raise UserError(
                f"{what} {key!r} has several rows that differ in {name!r}: {earlier!r} and {later!r};"
                " expected one value"
            )
    return table.take(pa.array(np.sort(first)))
