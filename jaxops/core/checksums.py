"""CRC-32 of files, several at a time, and of files that are still being written while the disk is the one to wait for.

A checksum taken early counts only while the file is the one that was read: `Early` notes inode, size and time of
change before it reads, and who asks later is answered only where all three still hold. Held by
tests/core/test_checksums.py.
"""

import contextlib
import os
import pathlib
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, BinaryIO, Self

from etils import epath

_THREADS = 4
_CHUNK = 1 << 22
_WORTH_IT = 1 << 20
"""Bytes below which a file is read when all is written: there is nothing to win."""

_Stamp = tuple[int, int, int, int]


def of_file(path: epath.Path | pathlib.Path) -> int:
    """Reads it all.

    Raises:
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return _of(file)


def side_by_side(ask: Callable[[Any], Any], about: Iterable[Any]) -> list[Any]:
    """`ask` of each, in the order given, a few at a time (zlib lets go of Python's lock); raises as `ask`."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(ask, about))


class Early:
    """While the context lasts, a thread reads what is written below the folders that `find` names.

    A file is read once it was the same at two looks, `quiet` seconds apart, so that a change after that has a later
    time of change, however coarse the clock of the file system. For files that this machine writes: a network file
    system may tell of another's changes late.
    """

    def __init__(self, find: Callable[[], Iterable[pathlib.Path]], quiet: float = 0.03) -> None:
        self._find, self._quiet = find, quiet
        self._known: dict[_Stamp, int] = {}
        self._seen: set[_Stamp] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="checksums", daemon=True)

    def known(self, path: str | os.PathLike[str]) -> int | None:
        """The CRC-32 of this file, wherever it was moved to, if it was read and has not changed since."""
        return self._known.get(_stamp(path))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(self._quiet):
            with contextlib.suppress(OSError):  # what is not known here is read at the end
                self._look()

    def _look(self) -> None:
        seen, self._seen = self._seen, set()
        for top in self._find():
            for path in top.rglob("*"):
                if self._stop.is_set():
                    return
                with contextlib.suppress(OSError):  # moved or deleted under our eyes
                    self._read(path, seen)

    def _read(self, path: pathlib.Path, seen: set[_Stamp]) -> None:
        if not path.is_file():
            return
        with path.open("rb") as file:
            stamp = _stamp(file.fileno())
            self._seen.add(stamp)
            if stamp in seen and stamp not in self._known and stamp[2] >= _WORTH_IT:
                self._known[stamp] = _of(file)


def _of(file: BinaryIO) -> int:
    crc = 0
    while block := file.read(_CHUNK):
        crc = zlib.crc32(block, crc)
    return crc


def _stamp(file: str | os.PathLike[str] | int) -> _Stamp:
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
