"""A journal of answers from the host (rewards, judges), so that a replayed iteration asks nothing twice.

Answers are kept by sample with a digest of the question, as JSON lines in parts that only grow:
`journal/SERIAL-PROCESS-NUMBER.jsonl` below a run folder. A process that opens the journal reads all existing parts and
starts parts of its own, with a serial above theirs. So a run can resume with any number of processes, and no process
ever appends to a line that was torn by a kill. Parts count in the order of their names, and lines in their order: the
last entry of a sample is valid. Tested in tests/core/test_journal.py and tests/core/test_journal_processes.py.
"""

import enum
import json
import os
import re
import threading
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import jax
import numpy as np
from jax.sharding import Mesh

from jaxops.core import distributed, store_paths, stores
from jaxops.core.answers import Answer, KeptAnswer, Key, checked_answer, entry_of, line_of, whole_key
from jaxops.core.rows import gather_rows, owned_rows
from jaxops.core.whole_files import writing

FOLDER = "journal"
_PART = re.compile(r"(\d+)-(\d+)-(\d+)\.jsonl")


class Missing(enum.Enum):
    """The type of `MISSING`, which stands for "no answer known"; None is an answer."""

    MISSING = enum.auto()


MISSING = Missing.MISSING


class _Appended:
    """A new unbuffered file for appending; it is closed with its object, even if the journal is never closed."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        self.close = weakref.finalize(self, os.close, self.descriptor)

    def append(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self.descriptor, left) :]


class Journal:
    """The answers of one run: `lookup` before asking, `record` after, `flush` before the step's first donation.

    `record` hands a line to the operating system at once, so the line survives the end of the process. `flush` makes
    all lines durable, so they survive a crash of the machine. An object store receives the lines with each `flush`, as
    a new object. The methods are thread-safe. The constructor is a barrier of all processes; the methods are not.

    Args:
      folder: the run folder, local or in an object store; the first record creates `journal/` in it.
      process: number of this process; jax's own if not given.
      fresh: delete existing answers, as a run that begins does; otherwise they are kept and used.

    Attributes:
      found: number of lookups that an entry has answered.
      asked_again: number of lookups whose entry had another digest.
      unreadable: number of lines of earlier parts that were left out, torn by a kill or damaged.

    Raises:
      UserError: a line has a newer format than this version of jaxops reads.
      RunFailed: the folder cannot be read or emptied; `record`, `flush` and `trim` raise it if they cannot write.
    """

    def __init__(self, folder: str | os.PathLike[str], *, process: int | None = None, fresh: bool = False) -> None:
        self._folder = store_paths.path(folder) / FOLDER
        self._process = jax.process_index() if process is None else process
        self._lock = threading.RLock()
        self.found = self.asked_again = self.unreadable = 0
        if fresh:
            distributed.run_on_primary("emptying the journal", lambda: self._remove(self._parts()))
        if self._process == 0 and not self._remote:
            for torn in Path(self._folder).glob(".*.tmp"):
                torn.unlink(missing_ok=True)
        self._earlier = self._parts()
        """Parts of earlier openings, which process 0 trims."""
        self._entries = self._read(self._earlier)
        self._serial = 1 + max((_numbers(name)[0] for name in self._earlier), default=0)
        self._own: list[str] = []
        self._number = 0
        self._file: _Appended | None = None
        self._pending: list[bytes] = []
        self._durable = True
        distributed.barrier(
            "opening the journal"
        )  # only now may new parts appear, since every process has listed the old ones

    def __len__(self) -> int:
        return len(self._entries)

    def lookup(self, key: Key, digest: str) -> Answer | Missing:
        """Returns the known answer for this sample and question, or MISSING."""
        with self._lock:
            entry = self._entries.get(whole_key(key))
            if entry is None:
                return MISSING
            if entry.digest != digest:
                self.asked_again += 1
                return MISSING
            self.found += 1
            return entry.answer

    def record(self, key: Key, digest: str, answer: Answer) -> Answer:
        """Stores an answer, and returns it as later lookups will (numpy numbers as Python's, tuples as lists).

        Raises:
          UserError: the answer is not finite, or not a number, None or dict of JSON.
        """
        key = whole_key(key)
        answer = checked_answer(key, answer)
        with self._lock:
            self._append(line_of(key, KeptAnswer(digest, answer)))
            self._entries[key] = KeptAnswer(digest, answer)
            self._durable = False
        return answer

    def flush(self) -> None:
        """Returns when all recorded answers are durable."""
        with self._lock, writing(self._folder):
            if self._durable:
                return
            if self._remote:
                self._write(self._new_part(), b"".join(self._pending))
                self._pending.clear()
            elif self._file is not None:
                os.fsync(self._file.descriptor)
                _sync_folder(Path(self._folder))
                _sync_folder(Path(self._folder).parent)
            self._durable = True

    def trim(self, oldest_retained_step: int) -> None:
        """Deletes the answers of steps before the oldest retained checkpoint, which no replay can reach any more.

        Each process trims its own parts. Process 0 also trims the parts of earlier openings, which become one part. A
        kill in between can leave an entry twice, but never loses one.
        """
        with self._lock:
            self.flush()
            self._let_go()
            self._own = self._trimmed(self._own, oldest_retained_step)
            if self._process == 0:
                self._earlier = self._trimmed(self._earlier, oldest_retained_step)
            self._entries = {key: entry for key, entry in self._entries.items() if key.step >= oldest_retained_step}

    def close(self) -> None:
        """Flushes, and closes the file."""
        with self._lock:
            self.flush()
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _let_go(self) -> None:
        self._file, file = None, self._file
        if file is not None:
            file.close()

    @property
    def _remote(self) -> bool:
        return stores.is_url(self._folder)

    def _parts(self) -> list[str]:
        """Returns the names of all parts, in the order in which they count."""
        with writing(self._folder):
            if not self._folder.is_dir():
                return []
            return sorted((p.name for p in self._folder.iterdir() if _PART.fullmatch(p.name)), key=_numbers)

    def _read(self, parts: Iterable[str]) -> dict[Key, KeptAnswer]:
        """Returns the last entry of each sample in these parts."""
        entries: dict[Key, KeptAnswer] = {}
        for name in parts:
            with writing(self._folder / name):
                *lines, torn = (self._folder / name).read_bytes().split(b"\n")
            self.unreadable += bool(torn)
            for number, line in enumerate(lines, 1):
                if (parsed := entry_of(line, f"{self._folder / name}:{number}")) is None:
                    self.unreadable += 1
                else:
                    entries.pop(parsed[0], None)
                    entries[parsed[0]] = parsed[1]
        return entries

    def _new_part(self) -> str:
        name = f"{self._serial:06}-{self._process:05}-{self._number:06}.jsonl"
        self._number += 1
        self._own.append(name)
        return name

    def _append(self, line: bytes) -> None:
        if self._remote:
            self._pending.append(line)
            return
        with writing(self._folder):
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = _Appended(Path(self._folder) / self._new_part())
            self._file.append(line)

    def _trimmed(self, parts: list[str], oldest: int) -> list[str]:
        """Removes the entries of steps before `oldest`, and returns the parts that remain: one at most.

        A single part without such entries stays as it is.
        """
        if not parts:
            return []
        seen = self.unreadable
        entries = self._read(parts)
        self.unreadable = seen  # their unreadable lines were counted at the opening
        kept = {key: entry for key, entry in entries.items() if key.step >= oldest}
        if len(kept) == len(entries) and len(parts) == 1:
            return parts
        *others, last = parts
        with writing(self._folder):
            if kept:
                self._write(last, b"".join(line_of(key, entry) for key, entry in kept.items()))
            self._remove(others if kept else parts)
        return [last] if kept else []

    def _write(self, name: str, data: bytes) -> None:
        """Writes a part atomically, replacing an older one."""
        if self._remote:
            (self._folder / name).write_bytes(data)
            return
        temporary = Path(self._folder) / f".{name}.tmp"
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._folder / name)
        _sync_folder(Path(self._folder))

    def _remove(self, parts: Iterable[str]) -> None:
        with writing(self._folder):
            for name in parts:
                (self._folder / name).unlink()


def exchange(mesh: Mesh, size: int, answers: Sequence[Answer]) -> list[Answer]:
    """Gathers the answers of all processes, and returns them for all `size` rows in global order on every process.

    Every process must call it, with the answers for its `owned_rows(mesh, size)` in that order. It is exact: numbers
    are sent as the journal stores them.

    Raises:
      ValueError: the number of answers is not that of the rows that this process owns.
      UserError: a value is not an answer.
      RunFailed: a process failed, or did not come within JAXOPS_BARRIER_SECONDS.
    """
    owned = sum(stop - start for start, stop in owned_rows(mesh, size))
    if len(answers) != owned:
        raise ValueError(f"exchange: {len(answers)} answers for the {owned} rows that this process owns")
    texts = [json.dumps(checked_answer("exchange", answer)).encode() for answer in answers]
    lengths = gather_rows(mesh, size, np.array([len(text) for text in texts], np.int64), "exchange of answers")
    width = 1 << max(int(lengths.max(initial=1)) - 1, 15).bit_length()  # few widths, as each is compiled once
    padded = np.array([text.ljust(width) for text in texts], f"S{width}").view(np.uint8).reshape(-1, width)
    return [json.loads(row.tobytes()) for row in gather_rows(mesh, size, padded, "exchange of answers")]


def _numbers(name: str) -> tuple[int, int, int]:
    serial, process, number = map(int, name.removesuffix(".jsonl").split("-"))
    return serial, process, number


def _sync_folder(folder: Path) -> None:
    """Makes the directory entries of new files durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
