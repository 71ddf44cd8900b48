"""Files that commands write: whole or not at all, where the user said."""

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxops.core.failures import RunFailed, UserError


def parquet_target(path: str | os.PathLike[str]) -> Path:
    """The file to write: the path itself if it ends in .parquet, else part-00000.parquet in that folder.

    Raises:
      UserError: it cannot be written.
    """
    target = Path(path)
    if target.suffix != ".parquet" or target.is_dir():
        if target.is_file():
            raise UserError(f"{target} is a file: give a folder, or a file that ends in .parquet")
        target = target / "part-00000.parquet"
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{target} cannot be written: {parent} is not a folder that you may write to")
    return target


def write_parquet(path: str | os.PathLike[str], make: Callable[[], pa.Table], what: str) -> str:
    """Writes a table, made once it is known that it can be written; what was written, for people.

    Raises:
      UserError: the path cannot be written.
      RunFailed: the disk is full.
    """
    target = parquet_target(path)
    table = make()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.tmp")
    try:
        pq.write_table(table, scratch)
        os.replace(scratch, target)
    except OSError as error:
        raise RunFailed(f"{target} cannot be written: {error}; nothing of it was left") from error
    finally:
        scratch.unlink(missing_ok=True)
    return f"{counted(len(table), what)} -> {target}"


def counted(number: int, what: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
