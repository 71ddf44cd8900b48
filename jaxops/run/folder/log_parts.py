"""Append-only logs as numbered objects, since an object store cannot append: `metrics.jsonl.000000`, `.000001`, ...

The parts in order, joined, are the log. Each ends with a whole line or record, so that TensorBoard reads every part of
its log. Only the last part is written again, until it is large. Where a resume has dropped lines, the parts that hold
them are deleted first, from the last one backwards. So at any moment the joined parts are a beginning of the old log or
of the new one. Tested in tests/run/folder/test_mirror.py.
"""

import dataclasses
import re
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

PART_BYTES = 1 << 20
"""A part that is larger than this is never written again."""
_NUMBERED = re.compile(r"(.+)\.(\d{6})$")


@dataclasses.dataclass(frozen=True)
class LogPart:
    """One part of a log in the store: the bytes from `start` on, `size` of them, with their CRC-32."""

    start: int
    size: int
    crc32: int

    @property
    def end(self) -> int:
        """The offset in the log at which the part ends."""
        return self.start + self.size


def is_log(name: str) -> bool:
    """Returns whether a file of this name is only appended to: JSON lines and TensorBoard events."""
    return name.endswith(".jsonl") or "tfevents" in name


def part_name(log: str, number: int) -> str:
    """Returns the name of a part, such as `metrics.jsonl.000002`."""
    return f"{log}.{number:06}"


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Finds the parts of logs among any names and returns them in order, by log; parts after a gap are left out."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        match = _NUMBERED.fullmatch(name)
        if match and is_log(match[1]) and int(match[2]) == len(found.setdefault(match[1], [])):
            found[match[1]].append(name)
    return {log: parts for log, parts in found.items() if parts}


def known(pieces: Iterable[bytes]) -> list[LogPart]:
    """Describes the contents of consecutive parts."""
    parts: list[LogPart] = []
    for piece in pieces:
        parts.append(LogPart(parts[-1].end if parts else 0, len(piece), zlib.crc32(piece)))
    return parts


class LogParts:
    """One log and its parts in the store.

    Args:
      file: the local log.
      put: writes a part, given its number and contents.
      drop: deletes a part, given its number.
      parts: the parts that the store holds already.
    """

    def __init__(
        self, file: Path, put: Callable[[int, bytes], None], drop: Callable[[int], None], parts: Iterable[LogPart] = ()
    ) -> None:
        self.file, self._put, self._drop = file, put, drop
        self.parts = list(parts)
        self._state = (-1, -1, -1)

    def push(self) -> bool:
        """Brings the store up to the whole lines of the file; returns whether the file has changed since the last call.

        Raises:
          OSError: the file cannot be read, or `put` or `drop` has raised it; the next call continues from there.
        """
        about = self.file.stat()
        state = (about.st_ino, about.st_mtime_ns, about.st_size)
        if state == self._state:
            return False
        same = about.st_ino == self._state[0] and about.st_size >= self._state[2]
        last = self.parts[-1] if self.parts else LogPart(0, 0, 0)
        start, data = last.start, self._from(last.start)
        if not same or zlib.crc32(data[: last.size]) != last.crc32:  # a new file may have the inode of a deleted one
            start, data = 0, self._from(0)
            self._withdraw(data)
        kept = self.parts[:-1] if self.parts and self.parts[-1].size <= PART_BYTES else self.parts
        number, at = len(kept), kept[-1].end if kept else 0
        for piece in pieces(self.file.name, data[at - start :]):
            part = LogPart(at, len(piece), zlib.crc32(piece))
            if number >= len(self.parts) or self.parts[number] != part:
                self._put(number, piece)
                self.parts[number:] = [part]
            number, at = number + 1, part.end
        self._state = state
        return True

    def _from(self, start: int) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(start)
            return file.read()

    def _withdraw(self, data: bytes) -> None:
        """Deletes all parts from the first one that differs from the file, the last one first."""
        good = 0
        for part in self.parts:
            if part.end > len(data) or zlib.crc32(data[part.start : part.end]) != part.crc32:
                break
            good += 1
        while len(self.parts) > good:
            self._drop(len(self.parts) - 1)
            self.parts.pop()


def pieces(name: str, data: bytes) -> list[bytes]:
    """Splits data into parts of whole lines (or TensorBoard records), each just over PART_BYTES; drops a torn end."""
    found, start = [], 0
    end_of = _line_end if name.endswith(".jsonl") else _record_end
    at = 0
    while (end := end_of(data, at)) > 0:
        at = end
        if at - start > PART_BYTES:
            found.append(data[start:at])
            start = at
    if at > start:
        found.append(data[start:at])
    return found


def _line_end(data: bytes, at: int) -> int:
    """Returns the end of the line that begins at `at`; 0 where the line is not complete."""
    return data.find(b"\n", at) + 1


def _record_end(data: bytes, at: int) -> int:
    """Returns the end of the TFRecord (length, its CRC, data, its CRC) that begins at `at`; 0 where it is torn."""
    if at + 12 > len(data):
        return 0
    end = at + 16 + struct.unpack_from("<Q", data, at)[0]
    return end if end <= len(data) else 0
