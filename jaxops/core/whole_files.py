"""Writes files that are whole or absent, and explains why one could not be written."""

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxops.core.failures import RunFailed


def replace_file(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a whole file atomically: a reader, or a crash, finds either the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the file system inside the context into a RunFailed with advice.

    Raises:
      RunFailed: `path` could not be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunFailed(
            f"cannot write to {path}: {reason}; the run stops rather than lose its records. "
            "Mend that, then run the same command again: it resumes"
        ) from error
