"""Reads columns as they are in a file, and joins side files to users or items by their original ids."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxops.core.failures import UserError, nearest
from jaxops.data import formats, notes
from jaxops.data.bags import WEIGHT, joined, parallel
from jaxops.data.files import DataFile, expand_paths, summary
from jaxops.data.ids import Ids
from jaxops.data.numeric import numbers as as_numbers
from jaxops.data.spec import Format, SideFile, TextFormat
from jaxops.data.values import is_missing, plain

FEW = 0.5
"""The share of users or items with a row in a side file below which the file is surely the wrong one."""


def read_columns(
    path: str | Sequence[str],
    wanted: Sequence[str],
    format: Format = "auto",
    header: Sequence[str] | None = None,
    numbers: Collection[str] = (),
    text: TextFormat = TextFormat(),
) -> pa.Table:
    """Returns these columns of the files, in order; text where the format cannot tell the type.

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
    return _concatenated(parts, list(wanted))


def _concatenated(parts: Sequence[pa.RecordBatch], names: Sequence[str]) -> pa.Table:
    """Returns one table; a column whose types differ between files is read by the one rule of values.py."""
    tables = [pa.Table.from_batches([part]) for part in parts]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:
        pass
    columns: dict[str, pa.ChunkedArray] = {}
    for name in names:
        found = [table[name] for table in tables]
        kinds = {values.type for values in found}
        if len(kinds) > 1 and any(pa.types.is_nested(kind) for kind in kinds):
            raise UserError(f"column {name!r} is {' and '.join(sorted(map(str, kinds)))} in different files")
        whole_column = found[0].combine_chunks() if len(kinds) == 1 and len(found) == 1 else None
        columns[name] = pa.chunked_array(
            [joined([_piece(values) for values in found])] if whole_column is None else [whole_column]
        )
    return pa.table(columns)


def _piece(values: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)


@contextlib.contextmanager
def _told(file: DataFile) -> Iterator[None]:
    """Turns an error of reading into a UserError with the file's name."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file.name}: cannot be read as {file.format}: {error}") from error


def columns_of(
    path: str | Sequence[str],
    format: Format = "auto",
    header: Sequence[str] | None = None,
    text: TextFormat = TextFormat(),
) -> list[str]:
    """Returns the columns that any of the files has. A later read of a column names the files that lack it.

    Args:
      path: files, as `files.expand` takes them.
      format: the format of the files.
      header: the names of the columns where text files have no header line.
      text: the dialect of text files.

    Raises:
      UserError: what `files.expand` raises; a file that cannot be read, or is not of its format.
    """
    found: dict[str, None] = {}
    for file in expand_paths(path, format, text):
        with _told(file):
            found |= dict.fromkeys(formats.columns(file, header))
    return list(found)


def whole(table: pa.Table, name: str) -> pa.Array:
    """Returns a column in one piece, of the type that it has."""
    values = table[name].combine_chunks()
    return _piece(values) if isinstance(values, pa.ChunkedArray) else values


def column(table: pa.Table, name: str, separator: str | None = None) -> pa.Array:
    """Returns a column in one piece; with `separator` a bag, a list a row (null and empty text: an empty list).

    Raises:
      UserError: lists where there is no bag, or a bag that is neither lists nor text; nested values.
    """
    return _listed(table, name, separator)[0] if separator is not None else _single(table, name)


def _single(table: pa.Table, name: str) -> pa.Array:
    values = whole(table, name)
    if _is_list(values.type):
        raise UserError(f"column {name!r} holds lists; a feature of several values is named in `bags`")
    return plain(values, f"column {name!r}")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _listed(table: pa.Table, name: str, separator: str, *weights: tuple[str, str]) -> tuple[pa.Array, list[pa.Array]]:
    """Returns a bag without missing values, and its weights (column, name in errors) without theirs."""
    bag = _split(table, name, separator)
    beside = [parallel(bag, _split(table, column, separator), what) for column, what in weights]
    values = bag.flatten()
    missing = is_missing(values) if pa.types.is_string(values.type) else pc.is_null(values, nan_is_null=True)
    if not missing.true_count:
        return bag, beside
    keep = pc.invert(missing)
    lengths = bag.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(bag)), lengths)[keep.to_numpy(zero_copy_only=False)]
    offsets = pa.array(np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(bag)))]).astype(np.int32))
    kept = [pa.ListArray.from_arrays(offsets, one.flatten().filter(keep)) for one in (bag, *beside)]
    return kept[0], kept[1:]


def _split(table: pa.Table, name: str, separator: str) -> pa.Array:
    values = whole(table, name)
    kind = values.type
    if _is_list(kind):
        values = values if pa.types.is_list(kind) else pc.cast(values, pa.list_(kind.value_type))
        if pa.types.is_nested(kind.value_type):
            raise UserError(f"column {name!r} holds {kind}; expected a bag: lists of numbers or text")
        return values
    if pa.types.is_primitive(kind) or pa.types.is_decimal(kind):
        raise UserError(f"column {name!r} holds {kind}; expected a bag: lists, or text apart by {separator!r}")
    text = plain(values, f"column {name!r}")
    _tell_other_separator(text, name, separator)
    lists = pc.split_pattern(text, separator)
    return pa.ListArray.from_arrays(lists.offsets, pc.utf8_trim_whitespace(lists.values), mask=lists.is_null())


def _tell_other_separator(text: pa.Array, name: str, separator: str) -> None:
    """Remarks on a bag in which no row holds the separator while most hold another one."""
    there = len(text) - text.null_count
    if not there or pc.any(pc.match_substring(text, separator)).as_py():
        return
    for other in ("|", ",", ";"):
        if (pc.sum(pc.match_substring(text, other)).as_py() or 0) * 2 > there:
            notes.tell(f"column {name!r} is a bag apart by {separator!r}, which no row holds; most hold {other!r}")
            return


def bags(
    table: pa.Table, names: Sequence[str], weights: Mapping[str, str], separator: str, what: str
) -> dict[str, pa.Array]:
    """Returns these bags and, as `NAME/weight`, the weights of those that have any.

    Args:
      table: the columns.
      names: the bags.
      weights: the column of weights, by bag.
      separator: stands between the values of text.
      what: the path of the config, for errors.

    Raises:
      UserError: weights of what is no bag, or that do not go with it.
    """
    for name in weights:
        if name not in names:
            raise UserError(f"{what}.weights: {name!r} is none of {what}.bags{nearest(name, names)}")
    out: dict[str, pa.Array] = {}
    for name in names:
        given = [(weights[name], f"{what}.weights.{name}: column {weights[name]!r}")] if name in weights else []
        out[name], beside = _listed(table, name, separator, *given)
        out |= {f"{name}{WEIGHT}": found for found in beside}
    return out


@dataclasses.dataclass(frozen=True)
class Join:
    """The counts of a join of a side file to the users or items of the data.

    Attributes:
      file: the file.
      key: its column of ids.
      ids: the number of users or items.
      matched: the number of them that have a row in the file.
      unmatched: keys of the file that no user or item of the data has.
      without_key: rows of the file that name nobody.
      empty: matched ids without a value, by column.
    """

    file: str
    key: str
    ids: int
    matched: int
    unmatched: int
    without_key: int
    empty: dict[str, int]

    def __str__(self) -> str:
        empty = ", ".join(f"{count:,} without {name}" for name, count in self.empty.items() if count)
        return (
            f"{self.matched:,} of {self.ids:,} have a row ({self.matched / max(self.ids, 1):.1%})"
            + (f", of them {empty}" if empty else "")
            + f"; {self.unmatched:,} key(s) of the file are not in the data, {self.without_key:,} row(s) have no key"
        )


def join_side(config: SideFile, ids: Ids, what: str) -> tuple[dict[str, pa.Array], Join]:
    """Returns the file's columns by row of `ids` (counted from 0), and the counts of the join.

    A missing value is null, an empty bag or NaN. The weights of a bag are `NAME/weight`, and numbers are float64. A key
    may have several rows that say the same: columns of items in the file of the events are read so. The counts are
    told, as a warning where fewer than `FEW` of the ids have a row.

    Raises:
      UserError: what `read_columns` and `bags` raise; rows of one key that differ.
    """
    wanted = [config.key, *config.columns, *config.bags, *config.weights.values(), *config.numeric]
    alone = {*config.numeric} - {config.key, *config.columns}
    table = read_columns(config.path, list(dict.fromkeys(wanted)), config.format, config.header, alone, config.text)
    keys = column(table, config.key)
    without_key = keys.null_count
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
    out |= {name: values.take(take) for name, values in held.items()}
    matched, there = int(found.sum()), pa.array(at >= 0)
    empty = {name: _empty(values.filter(there)) for name, values in out.items() if not name.endswith(WEIGHT)}
    join = Join(
        summary(expand_paths(config.path, config.format)),
        config.key,
        len(ids),
        matched,
        len(rows) - matched,
        without_key,
        {name: count for name, count in empty.items() if count},
    )
    few = matched < FEW * len(ids)
    warning = f": are the ids written alike in both, and is {config.key!r} the right column?" if few else ""
    notes.tell(f"{'WARNING: ' if few else ''}{what}: {join}{warning}")
    return out, join


def _empty(values: pa.Array) -> int:
    if pa.types.is_list(values.type):
        return int(np.count_nonzero(values.value_lengths().fill_null(0).to_numpy(zero_copy_only=False) == 0))
    return int(pc.sum(pc.is_null(values, nan_is_null=True)).as_py() or 0)


def _one_each(table: pa.Table, keys: pa.Array, what: str) -> pa.Table:
    """Returns the first row of each key, all of whose rows say the same; rows of a null key are left out."""
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
