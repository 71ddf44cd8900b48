"""CRC-32 of files, computed in parallel, and already while other files of the same save are being written.

A checksum computed early counts only while the file is unchanged: `Early` notes device, inode, size and modification
time before it reads, and returns the checksum later only if all of them still hold. Tested in
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
"""Files with fewer bytes are not read early: there is nothing to gain."""

_Stamp = tuple[int, int, int, int]


def of_file(path: epath.Path | pathlib.Path) -> int:
    """Returns the CRC-32 of a file, reading all of it.

    Raises:
      OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return _of(file)


def side_by_side(ask: Callable[[Any], Any], about: Iterable[Any]) -> list[Any]:
    """Calls `ask` on each, a few at a time (zlib releases the GIL), and returns the results in order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(ask, about))


class Early:
    """A context in which a thread computes checksums of the files that are written below the folders of `find`.

    A file is read once it was the same at two checks, `quiet` seconds apart. So any later change has a later
    modification time, however coarse the clock of the file system. It is for files that this machine writes: a network
    file system may report changes by other machines late.
    """

    def __init__(self, find: Callable[[], Iterable[pathlib.Path]], quiet: float = 0.03) -> None:
        self._find, self._quiet = find, quiet
        self._known: dict[_Stamp, int] = {}
        self._seen: set[_Stamp] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="checksums", daemon=True)

    def known(self, path: str | os.PathLike[str]) -> int | None:
        """Returns the CRC-32 of this file, even if it was moved since; None if it was not read or has changed."""
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
            with contextlib.suppress(OSError):  # a file that fails here is read after the save instead
                self._look()

    def _look(self) -> None:
        seen, self._seen = self._seen, set()
        for top in self._find():
            for path in top.rglob("*"):
                if self._stop.is_set():
                    return
                with contextlib.suppress(OSError):  # the file was moved or deleted meanwhile
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
