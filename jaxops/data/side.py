"""Columns as they are in a file, and side files joined to users or items by their original ids."""

from collections.abc import Collection, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxops.core.failures import UserError
from jaxops.data import formats
from jaxops.data.files import expand, summary
from jaxops.data.idmaps import plain
from jaxops.data.ids import Ids
from jaxops.data.spec import Format, SideFile


def read_columns(
    path: str | Sequence[str],
    wanted: Sequence[str],
    format: Format = "auto",
    header: Sequence[str] | None = None,
    numbers: Collection[str] = (),
) -> pa.Table:
    """These columns of the files, in order; text where the format cannot tell. `numbers` as in `formats.batches`.

    Raises:
      UserError: what `files.expand` and reading raise; no rows.
    """
    files = expand(path, format)
    parts: list[pa.RecordBatch] = []
    for file in files:
        try:
            found = formats.batches(file, list(wanted), header, numbers)
            parts += [batch.select(list(wanted)) for batch in found]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file.name}: cannot be read as {file.format}: {error}") from error
    if not any(len(part) for part in parts):
        raise UserError(f"no rows in {summary(files)}")
    return pa.concat_tables([pa.Table.from_batches([part]) for part in parts], promote_options="permissive")


def whole(table: pa.Table, name: str) -> pa.Array:
    """A column in one piece, of the type that it has."""
    values = table[name].combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    return values


def column(table: pa.Table, name: str, separator: str | None = None) -> pa.Array:
    """A column in one piece; with `separator` a bag, a list a row (null and empty text: an empty one).

    Raises:
      UserError: lists where there is no bag.
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
    text = plain(values)
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text)
    return pc.split_pattern(text, separator)


def read_side(config: SideFile, ids: Ids, what: str) -> dict[str, pa.Array]:
    """The file's columns by row of `ids` (its first row is 0 here); null, or an empty bag, where the file has none.

    Raises:
      UserError: what `read_columns` raises; a key that is there twice.
    """
    table = read_columns(config.path, [config.key, *config.columns, *config.bags], config.format, config.header)
    keys = column(table, config.key)
    known = keys.drop_null()
    if len(pc.unique(known)) != len(known):
        counts = pc.value_counts(known)
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0].as_py()
        raise UserError(f"{what}: {config.key} {twice!r} has two rows in the file; expected one each")
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
    return out | {name: column(table, name, config.separator).take(take) for name in config.bags}
