"""Streams each file format as record batches that hold the wanted columns, with nothing converted yet.

Text is read as strings, and JSON with types that its first lines fix, so the end of a block never changes a
type.
"""

import functools
import io
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from jaxops.core.failures import UserError, nearest
from jaxops.data.dialect import dialect_of, names_of, not_utf8, open_text
from jaxops.data.files import DataFile

ROWS = 1 << 18
"""The most rows of a batch."""
BLOCK = 1 << 23
"""Bytes of text that are parsed at once."""
MOST = 1 << 28
"""Bytes that a batch of a Parquet file may take when its dictionaries are written out."""
LONGEST = 1 << 24
"""Bytes that one text of a dictionary may have."""


def batches(
    file: DataFile, wanted: Sequence[str], header: Sequence[str] | None, numbers: Collection[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yields the file's rows in order, as batches that have the `wanted` columns by name.

    Columns that are not in the file come from its hive partition.

    Args:
      file: the file.
      wanted: names of columns.
      header: names of all columns of text without a header line.
      numbers: columns that JSON may begin with an integer and go on with a fraction (default: all wanted but the first
        two). All other integers stay integers, so that ids keep every digit.

    Raises:
      UserError: a missing or double column, a file that is not of its format (with the line where it breaks).
    """
    if file.size == 0 and file.format != "parquet":
        return
    floats = frozenset(wanted[2:] if numbers is None else numbers)
    readers: dict[str, Callable[..., Iterator[pa.RecordBatch]]]
    readers = {"jsonl": functools.partial(_jsonl, floats=floats), "parquet": _parquet}
    for batch in readers.get(file.format, _text)(file, wanted, header):
        for name in dict.fromkeys(wanted):
            if name not in batch.schema.names:
                batch = batch.append_column(name, pa.array([file.partition[name]] * len(batch), pa.string()))
        for start in range(0, len(batch), ROWS):
            yield batch.slice(start, ROWS)


def columns(file: DataFile, header: Sequence[str] | None = None) -> list[str]:
    """Returns the columns that `batches` can give, those of the hive partition last.

    Raises:
      UserError: a file that is not of its format.
    """
    names: list[str] = []
    if file.format == "parquet":
        with _open_parquet(file) as parquet:
            names = parquet.schema_arrow.names
    elif file.size and file.format == "jsonl":
        names = list(_json_types(file, (), ()))
    elif file.size:
        names = list(header) if header is not None else names_of(file, dialect_of(file))
    return list(dict.fromkeys([*names, *file.partition]))


def _text(file: DataFile, wanted: Sequence[str], header: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    """Reads CSV and TSV as strings alone, so no value's type depends on where a block happens to end."""
    dialect = dialect_of(file, wanted, header)
    names = list(header) if header is not None else names_of(file, dialect)
    if not names:
        return
    inside = _check_columns(file, wanted, names)
    convert = pacsv.ConvertOptions(
        include_columns=inside,
        column_types=dict.fromkeys(inside, pa.string()),
        strings_can_be_null=True,
        null_values=[""],
    )
    parse = pacsv.ParseOptions(
        delimiter=dialect.delimiter,
        quote_char='"' if dialect.quoted else False,
        newlines_in_values=dialect.quoted,
    )
    # One thread, so that a broken row is told by its number.
    read = pacsv.ReadOptions(use_threads=False, block_size=BLOCK, column_names=header)
    try:
        with open_text(file, dialect) as stream, pacsv.open_csv(stream, read, parse, convert) as reader:
            yield from reader
    except pa.ArrowInvalid as error:
        told = not_utf8(file) if "UTF8" in str(error) else ""
        raise UserError(told or f"{file.name}: cannot be read as {file.format}: {error}") from error


def _jsonl(
    file: DataFile, wanted: Sequence[str], header: Sequence[str] | None, floats: Collection[str]
) -> Iterator[pa.RecordBatch]:
    types = _json_types(file, wanted, floats)
    if not types:
        return
    inside = _check_columns(file, wanted, list(types))
    schema = pa.schema([(name, types[name]) for name in inside])
    parse = pajson.ParseOptions(explicit_schema=schema, newlines_in_values=False, unexpected_field_behavior="ignore")
    try:
        with (
            file.stream() as stream,
            pajson.open_json(stream, pajson.ReadOptions(block_size=BLOCK), parse) as reader,
        ):
            yield from reader
    except pa.ArrowInvalid as error:
        raise UserError(_broken_line(file, schema) or f"{file.name}: not JSON lines: {error}") from error


def _json_types(file: DataFile, wanted: Sequence[str], floats: Collection[str]) -> dict[str, pa.DataType]:
    """Returns the type of each wanted column by the first line that has a value for it, and null for other columns.

    Reads until all wanted columns have a type, up to a bound; with nothing wanted, up to the bound.
    """
    types: dict[str, pa.DataType] = {}
    with file.stream() as stream, io.TextIOWrapper(stream, encoding="utf-8", errors="replace") as text:
        for number, line in enumerate(itertools.islice(text, 1000), 1):
            if not line.strip():
                continue
            for name, value in _json_object(file, number, line).items():
                known = types.setdefault(name, pa.null())
                if name in wanted and known == pa.null() and value is not None:
                    types[name] = _json_type(value, name in floats)
                    if types[name] == pa.null():
                        shown = json.dumps(value)[:80]
                        raise UserError(
                            f"{file.name}:{number}: column {name!r} is {shown}, expected a number or a string"
                        )
            if wanted and all(types.get(name, pa.null()) != pa.null() for name in wanted):
                break
    return types


def _json_type(value: Any, number: bool) -> pa.DataType:
    """Returns the type of a value; in a column of `number` an integer may be followed by a fraction."""
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int) and not number:
        return pa.int64()
    if isinstance(value, int | float):
        return pa.float64()
    return pa.string() if isinstance(value, str) else pa.null()


def _json_object(file: DataFile, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{file.name}:{number}: not JSON: {error}; the line is {line.strip()[:80]!r}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file.name}:{number}: expected a JSON object a line, got {line.strip()[:80]!r}")
    return value


def _broken_line(file: DataFile, schema: pa.Schema) -> str:
    """Reads again slowly and describes the line that the fast reader could not take, with its number."""
    expected: dict[pa.DataType, Any] = {
        pa.string(): str,
        pa.int64(): int,
        pa.float64(): (int, float),
        pa.bool_(): bool,
    }
    with file.stream() as stream, io.TextIOWrapper(stream, encoding="utf-8", errors="replace") as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                row = _json_object(file, number, line)
            except UserError as error:
                return str(error)
            for field in schema:
                value = row.get(field.name)
                right = isinstance(value, expected.get(field.type, object)) and (
                    isinstance(value, bool) <= (field.type == pa.bool_())
                )
                if value is not None and not right:
                    return (
                        f"{file.name}:{number}: column {field.name!r} is {json.dumps(value)[:80]} here and "
                        f"{field.type} before; a column has one type"
                    )
    return ""


def _parquet(file: DataFile, wanted: Sequence[str], header: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    with _open_parquet(file) as parquet:
        inside = _check_columns(file, wanted, parquet.schema_arrow.names)
        for batch in parquet.iter_batches(batch_size=_rows_at_once(file, parquet, inside), columns=inside):
            batch.validate(full=True)  # text that is no UTF-8, or offsets of a damaged file, would crash later
            yield batch


def _rows_at_once(file: DataFile, parquet: pq.ParquetFile, inside: Sequence[str]) -> int:
    """Returns how many rows of a Parquet file may be read at once.

    A dictionary holds each text once, however often it occurs: a file of a megabyte may stand for a terabyte. The
    longest entry bounds what a row takes.

    Raises:
      UserError: one text alone is too large.
    """
    rows = ROWS
    for group in range(parquet.metadata.num_row_groups):
        described = parquet.metadata.row_group(group)
        chunks = [described.column(at) for at in range(described.num_columns)]
        texts = [
            chunk.path_in_schema
            for chunk in chunks
            if chunk.path_in_schema in inside and chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page
        ]
        longest = _longest_entries(file, parquet, group, texts) if texts else {}
        for name, size in longest.items():
            if size > LONGEST:
                raise UserError(
                    f"{file.name}: column {name!r} has a text of {size:,} bytes; at most {LONGEST:,} are read"
                )
        rows = min(rows, max(1, MOST // max(1, sum(longest.values()))))
    return rows


def _longest_entries(file: DataFile, parquet: pq.ParquetFile, group: int, names: Sequence[str]) -> dict[str, int]:
    """Returns the bytes of the longest text in the dictionary of each of these columns in a row group."""
    options: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 16}  # the chunks are not read to their ends
    with pq.ParquetFile(file.random(), metadata=parquet.metadata, read_dictionary=list(names), **options) as again:
        for batch in again.iter_batches(batch_size=1, row_groups=[group], columns=list(names)):
            batch.validate(full=True)
            read = {name: batch[name].dictionary for name in names if pa.types.is_dictionary(batch[name].type)}
            texts = {name: entries for name, entries in read.items() if _is_text(entries.type)}
            # A dictionary comes whole with the first row.
            return {name: pc.max(pc.binary_length(entries)).as_py() or 0 for name, entries in texts.items()}
    return {}


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)


def _open_parquet(file: DataFile) -> pq.ParquetFile:
    try:
        opened = pq.ParquetFile(file.random())
        opened.schema_arrow.names  # noqa: B018 - a damaged file may have names that are no text
        return opened
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file.name}: not a Parquet file ({error})") from error


def _check_columns(file: DataFile, wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the wanted columns that are in the file (the others are in its partition)."""
    for name in dict.fromkeys(wanted):
        if names.count(name) > 1:
            raise UserError(f"{file.name}: column {name!r} is there {names.count(name)} times")
        if name not in names and name not in file.partition:
            known = [*names, *file.partition]
            raise UserError(
                f"{file.name}: no column {name!r}{nearest(name, known)} (columns: {', '.join(known)}); "
                "say which is which with `columns: {user: ..., item: ..., time: ...}`; no time: `time: null`"
            )
    return [name for name in dict.fromkeys(wanted) if name in names]
