"""A journal of answers from the host (rewards, judges), so that a replayed iteration asks nothing twice.

Answers are kept by sample with a digest of the question, as JSON lines in parts that only grow:
`journal/SERIAL-PROCESS-NUMBER.jsonl` below a run folder. A process that opens the journal reads all existing parts and
starts parts of its own, with a serial above theirs. So a run can resume with any number of processes, and no process
ever appends to a line that was torn by a kill. Parts count in the order of their names, and lines in their order: the
last entry of a sample is valid. Tested in tests/core/test_journal.py and tests/core/test_journal_processes.py.
"""

import enum
import hashlib
import json
import math
import operator
import os
import re
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import Mesh

from jaxops.core import distributed, store_paths, stores
from jaxops.core.failures import UserError
from jaxops.core.rows import gather_rows, owned_rows
from jaxops.core.writers import writing

FOLDER = "journal"
VERSION = 1
"""The format version of a line; all versions up to this one are read."""
_PART = re.compile(r"(\d+)-(\d+)-(\d+)\.jsonl")

Answer = int | float | None | dict[str, Any]
"""A finite number, None, or a dict of JSON with finite numbers."""


class Key(NamedTuple):
    """The sample of a question.

    Attributes:
      step: step of the loop.
      id: example id.
      copy: number of the completion of the same prompt.
      redraw: number of the redraw.
      turn: turn of the conversation.
    """

    step: int
    id: int
    copy: int = 0
    redraw: int = 0
    turn: int = 0


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


class _Entry(NamedTuple):
    digest: str
    answer: Answer


def digest_of(asked: Any) -> str:
    """Returns the SHA-256 of a question: of bytes as they are, else of canonical JSON (arrays by their contents).

    Raises:
      TypeError: the question holds a value that is neither JSON nor an array.
    """
    if isinstance(asked, bytes):
        return hashlib.sha256(b"bytes\n" + asked).hexdigest()
    text = json.dumps(asked, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(b"json\n" + text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | jax.Array):
        array = np.ascontiguousarray(value)
        return {"dtype": str(array.dtype), "shape": array.shape, "sha256": hashlib.sha256(array.tobytes()).hexdigest()}
    raise TypeError(f"{type(value).__name__} is neither JSON nor an array: give its text, or bytes")


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
            entry = self._entries.get(_whole(key))
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
        key = _whole(key)
        answer = _checked(key, answer)
        with self._lock:
            self._append(_line(key, _Entry(digest, answer)))
            self._entries[key] = _Entry(digest, answer)
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

    def _read(self, parts: Iterable[str]) -> dict[Key, _Entry]:
        """Returns the last entry of each sample in these parts."""
        entries: dict[Key, _Entry] = {}
        for name in parts:
            with writing(self._folder / name):
                *lines, torn = (self._folder / name).read_bytes().split(b"\n")
            self.unreadable += bool(torn)
            for number, line in enumerate(lines, 1):
                if (parsed := _parse(line, f"{self._folder / name}:{number}")) is None:
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
                self._write(last, b"".join(_line(key, entry) for key, entry in kept.items()))
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
    texts = [json.dumps(_checked("exchange", answer)).encode() for answer in answers]
    lengths = gather_rows(mesh, size, np.array([len(text) for text in texts], np.int64), "exchange of answers")
    width = 1 << max(int(lengths.max(initial=1)) - 1, 15).bit_length()  # few widths, as each is compiled once
    padded = np.array([text.ljust(width) for text in texts], f"S{width}").view(np.uint8).reshape(-1, width)
    return [json.loads(row.tobytes()) for row in gather_rows(mesh, size, padded, "exchange of answers")]


def _checked(key: object, answer: Any) -> Answer:
    """Returns the answer as JSON reads it back.

    Raises:
      UserError: the answer is not finite, or not a number, None or dict of JSON.
    """
    if isinstance(answer, np.ndarray | jax.Array) and np.ndim(answer) == 0:
        answer = np.asarray(answer)[()]
    if isinstance(answer, np.generic):
        answer = answer.item()
    if not (answer is None or isinstance(answer, int | float | Mapping)):
        raise UserError(
            f"the answer for {key} is {_short(answer)} ({type(answer).__name__}):"
            " expected a finite number, a dict of JSON, or None to drop the sample"
        )
    if isinstance(answer, float) and not math.isfinite(answer):
        raise UserError(f"the answer for {key} is {answer}: an answer must be finite, or None to drop the sample")
    if not isinstance(answer, Mapping):
        return answer
    try:
        return json.loads(json.dumps(dict(answer), allow_nan=False, default=_item))
    except ValueError as error:
        raise UserError(
            f"the answer for {key} is {_short(answer)}: an answer must be finite, or None to drop the sample"
        ) from error
    except TypeError as error:
        raise UserError(f"the answer for {key} is {_short(answer)}, which JSON cannot hold: {error}") from error


def _item(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} is no number, text, list or dict")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _whole(key: Key) -> Key:
    return Key(*map(operator.index, key))


def _numbers(name: str) -> tuple[int, int, int]:
    serial, process, number = map(int, name.removesuffix(".jsonl").split("-"))
    return serial, process, number


def _line(key: Key, entry: _Entry) -> bytes:
    line = {"v": VERSION, "key": list(key), "digest": entry.digest, "answer": entry.answer}
    return json.dumps(line, allow_nan=False).encode() + b"\n"


def _parse(line: bytes, where: str) -> tuple[Key, _Entry] | None:
    """Parses one line; returns None if it is not a valid entry.

    Raises:
      UserError: the line has a newer format.
    """
    try:
        fields = json.loads(line)
        version = operator.index(fields["v"])
        if version <= VERSION:
            key, digest = _whole(Key(*fields["key"])), fields["digest"]
            return (key, _Entry(digest, _checked(key, fields["answer"]))) if isinstance(digest, str) else None
    except (ValueError, KeyError, TypeError, RecursionError, UserError):
        return None
    raise UserError(
        f"{where}: format {version}, but this version of jaxops reads up to {VERSION}:"
        " resume with the newer jaxops that wrote it"
    )


def _sync_folder(folder: Path) -> None:
    """Makes the directory entries of new files durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
