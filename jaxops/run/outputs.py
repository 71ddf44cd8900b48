"""Files that commands write where the user asked for them; each is written whole or not at all."""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from jaxops.core.failures import RunFailed, UserError
from jaxops.core.home import expand_home

FORMATS = (".parquet", ".csv", ".tsv", ".jsonl")
"""How a file that a command writes may end."""
_OTHERS = (
    ".txt",
    ".json",
    ".xlsx",
    ".xls",
    ".feather",
    ".arrow",
    ".gz",
    ".zip",
    ".zst",
    ".npy",
    ".npz",
    ".pkl",
    ".html",
)


def table_target(path: str | os.PathLike[str]) -> Path:
    """Returns the file to write: the path if it ends like one of FORMATS, else part-00000.parquet in that folder.

    Raises:
      UserError: it cannot be written, or ends like a file of another format.
    """
    target = Path(expand_home(path))
    if target.suffix.lower() in _OTHERS and not target.is_dir():
        raise UserError(
            f"{target}: nothing writes {target.suffix} files; give one of {', '.join(FORMATS)}, or a folder"
        )
    if target.suffix.lower() not in FORMATS or target.is_dir():
        if target.is_file():
            raise UserError(f"{target} is a file: give a folder, or a file that ends in {', '.join(FORMATS)}")
        target = target / "part-00000.parquet"
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{target} cannot be written: {parent} is not a folder that you may write to")
    return target


def write_table(path: str | os.PathLike[str], make: Callable[[], pa.Table], what: str) -> str:
    """Writes a table in the format of the path's ending; returns a line about it for people.

    Args:
      path: a file that ends in one of FORMATS, or a folder.
      make: makes the table; it is called once the path is known to be good.
      what: the noun for a row, such as `row`.

    Raises:
      UserError: the path cannot be written.
      RunFailed: the disk is full.
    """
    target = table_target(path)
    table = make()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.tmp")
    try:
        _WRITERS[target.suffix.lower()](table, scratch)
        os.replace(scratch, target)
    except OSError as error:
        raise RunFailed(f"{target} cannot be written: {error}; nothing of it was left") from error
    finally:
        scratch.unlink(missing_ok=True)
    return f"{counted(len(table), what)} -> {target}"


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a scratch folder beside `path`, which takes its place at the end of the context, or is removed.

    Raises:
      RunFailed: the disk is full, or the path cannot be written.
    """
    scratch = path.absolute().with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        os.replace(scratch, path)
    except OSError as error:
        raise RunFailed(f"{path} cannot be written: {error}; nothing of it was left") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_text(table: pa.Table, path: Path, delimiter: str) -> None:
    """Columns as text; a list as JSON."""
    for number, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            table = table.set_column(number, field.name, pa.array(map(json.dumps, table[field.name].to_pylist())))
    csv.write_csv(table, path, csv.WriteOptions(delimiter=delimiter))


def _write_jsonl(table: pa.Table, path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for batch in table.to_batches(max_chunksize=10_000):
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in batch.to_pylist())


_WRITERS: dict[str, Callable[[pa.Table, Path], object]] = {
    ".parquet": pq.write_table,
    ".csv": functools.partial(_write_text, delimiter=","),
    ".tsv": functools.partial(_write_text, delimiter="\t"),
    ".jsonl": _write_jsonl,
}


def counted(number: int, what: str, several: str = "") -> str:
    """Returns a number with its noun, such as `1 row` or `2,000 rows`; `several` is an irregular plural."""
    return f"{number:,} {what if number == 1 else several or what + 's'}"
