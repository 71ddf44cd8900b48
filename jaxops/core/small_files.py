"""Reads a file that should be small and ordinary: a pipe, a device or one without end stops nobody.

Tested in tests/report/test_hostile_folders.py.
"""

import errno
import os
import stat
from typing import BinaryIO

MOST = 64 << 20
"""Bytes that are read of a small file of a run folder, where nothing else is said."""


def read_bytes(path: str | os.PathLike[str], most: int = MOST) -> bytes:
    """Reads the bytes of an ordinary file of this size at most.

    Raises:
      OSError: it is missing, is no ordinary file, is larger, or cannot be read.
    """
    with _ordinary(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1) if size <= most else b""
        if size > most or len(data) > most:  # files of /proc have no size and no end
            raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes", os.fspath(path))
        return data


def read_end(path: str | os.PathLike[str], most: int) -> bytes:
    """Reads the last bytes, this many at most, of an ordinary file of any size.

    Raises:
      OSError: it is missing, is no ordinary file, or cannot be read.
    """
    with _ordinary(path) as file:
        file.seek(max(os.fstat(file.fileno()).st_size - most, 0))
        return file.read(most)


def _ordinary(path: str | os.PathLike[str]) -> BinaryIO:
    # Without waiting: opening a pipe would wait for somebody to write to it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        raise OSError(errno.EINVAL, "it is no ordinary file (a pipe or a device)", os.fspath(path))
    return open(descriptor, "rb")


def read_text(path: str | os.PathLike[str], most: int = MOST) -> str:
    """Reads an ordinary file of this size at most as UTF-8 text.

    Raises:
      OSError: the errors of `read_bytes`.
      UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path, most).decode("utf-8")
