"""The journal of a search: what was asked, reported, pruned and told, one event after the other, never changed.

It is the truth of the search, and Optuna's study is rebuilt from it. So a controller that is killed at any moment has
lost nothing that another one needs. One process leads a search: it holds the journal's lock as long as it lives.
Tested in tests/sweep/test_search_crashes.py.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TextIO

from jaxops.core import stores
from jaxops.core.failures import RunFailed
from jaxops.core.small_files import read_bytes
from jaxops.core.whole_files import writing
from jaxops.sweep.search.events import SearchEvent, parse_event

FILE = "search.jsonl"
WAIT = 1.0
"""Seconds between two tries to lead."""
_MOST_BYTES = 256 << 20


class TrialJournal(Protocol):
    """Where the events of one search are kept."""

    where: str

    def lead(self) -> bool:
        """Makes this process the one that writes; False where another live process is that."""
        ...

    def read(self) -> list[SearchEvent]:
        """Returns all events, in their order."""
        ...

    def append(self, event: SearchEvent, *, durable: bool = True) -> None:
        """Adds an event; it has reached the disk, where it is to be `durable`, before this returns."""
        ...

    def close(self) -> None:
        """Lets another process lead."""
        ...


class FileJournal:
    """A journal in a file of the sweep's folder, which must have begun before this process leads.

    Args:
      folder: the sweep's.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.where = folder / FILE, str(folder / FILE)
        self._lock_path = folder / ".sweep" / "lead"
        self._lock: TextIO | None = None
        self._file: int | None = None

    def lead(self) -> bool:
        """Takes the lock, which ends with this process, and cuts off a line that a kill has torn.

        Raises:
          RunFailed: the folder cannot be written.
        """
        with writing(self.path):
            lock = open(self._lock_path, "a+")  # noqa: SIM115 (open as long as this process leads)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                return False
            self._lock = lock
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            whole = self.path.read_bytes().rfind(b"\n") + 1
            os.ftruncate(self._file, whole)
            os.lseek(self._file, whole, os.SEEK_SET)
            os.fsync(self._file)
            _sync(self.path.parent)
        return True

    def read(self) -> list[SearchEvent]:
        """Returns all whole lines.

        Raises:
          UserError: a line is broken, or of a newer version.
        """
        if not self.path.exists():
            return []
        *lines, _torn = read_bytes(self.path, _MOST_BYTES).split(b"\n")
        return [parse_event(line, f"{self.path}:{number}") for number, line in enumerate(lines, start=1)]

    def append(self, event: SearchEvent, *, durable: bool = True) -> None:
        """Adds an event.

        Raises:
          RunFailed: it cannot be written, or this process does not lead.
        """
        if self._file is None:
            raise RunFailed(f"{self.path}: another process leads this search; nothing more is written")
        with writing(self.path):
            left = memoryview((event.line() + "\n").encode())
            while left:
                left = left[os.write(self._file, left) :]
            if durable:
                os.fsync(self._file)

    def close(self) -> None:
        """Gives up the lock."""
        if self._file is not None:
            os.close(self._file)
        if self._lock is not None:
            self._lock.close()
        self._file = self._lock = None


def journal_of(folder: Path, storage: str | None) -> TrialJournal:
    """Returns the journal of the search in a folder.

    Args:
      folder: the sweep's folder.
      storage: the URL of a database or of a folder in an object store; None for a file in the folder.

    Raises:
      UserError: the URL is none of them, or what it needs is not installed or does not answer.
    """
    if storage is None:
        return FileJournal(folder)
    if storage.partition("://")[0] in stores.EXTRAS:
        from jaxops.sweep.search.stored import StoreJournal

        return StoreJournal(storage, folder.name)
    from jaxops.sweep.search.postgres import PostgresJournal

    return PostgresJournal(storage, folder.name)


@contextlib.contextmanager
def leading(journal: TrialJournal, say: Callable[[str], None]) -> Iterator[TrialJournal]:
    """A context in which this process leads a search; it waits as long as another process does.

    Raises:
      RunFailed: the journal cannot be written.
    """
    told = False
    while not journal.lead():
        if not told:
            say(f"another process leads this search ({journal.where}); waiting until it ends, to go on then")
        told = True
        time.sleep(WAIT)
    try:
        yield journal
    finally:
        journal.close()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
