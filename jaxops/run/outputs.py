"""Files that commands write where the user asked for them; each is written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxops.core.failures import RunFailed, UserError


def parquet_target(path: str | os.PathLike[str]) -> Path:
    """Returns the file to write: the path itself if it ends in .parquet, else part-00000.parquet in that folder.

    Raises:
      UserError: the file cannot be written.
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
    """Writes the table that `make` returns, and returns one line for people that says what was written.

    The path is checked before `make` is called, so that no work is lost. `what` names a row.

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


def counted(number: int, what: str, several: str = "") -> str:
    """`1 row`, `2,000 rows`; `several` is the plural where an s does not make it."""
    return f"{number:,} {what if number == 1 else several or what + 's'}"
