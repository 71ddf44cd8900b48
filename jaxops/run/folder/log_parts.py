"""Append-only logs as numbered objects, since an object store cannot append: `metrics.jsonl.000000`, `.000001`, ...

Joined in order the parts are the log. Each ends with a whole line or record (every part of a TensorBoard log is one
that TensorBoard reads); only the last is ever written again, until it is large. Where a resume has dropped lines, the
parts that hold them go first, the last one before the others: at any moment what is there joins to the beginning of
the old log or of the new. Held by tests/run/folder/test_mirror.py.
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
    """What the store holds of a log: bytes from `start` on, `size` of them, with their CRC-32."""

    start: int
    size: int
    crc32: int

    @property
    def end(self) -> int:
        return self.start + self.size


def is_log(name: str) -> bool:
    """Whether a file only grows: JSON lines and TensorBoard events."""
    return name.endswith(".jsonl") or "tfevents" in name


def part_name(log: str, number: int) -> str:
    """`metrics.jsonl.000002`."""
    return f"{log}.{number:06}"


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Log -> the names of its parts in order, out of any names; what follows a gap is left out."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        match = _NUMBERED.fullmatch(name)
        if match and is_log(match[1]) and int(match[2]) == len(found.setdefault(match[1], [])):
            found[match[1]].append(name)
    return {log: parts for log, parts in found.items() if parts}


def known(pieces: Iterable[bytes]) -> list[LogPart]:
    """The parts that these contents are."""
    parts: list[LogPart] = []
    for piece in pieces:
        parts.append(LogPart(parts[-1].end if parts else 0, len(piece), zlib.crc32(piece)))
    return parts


class LogParts:
    """One log and its parts in the store.

    Args:
      put: writes a part by its number.
      drop: deletes a part by its number.
      parts: what the store holds already.
    """

    def __init__(
        self, file: Path, put: Callable[[int, bytes], None], drop: Callable[[int], None], parts: Iterable[LogPart] = ()
    ) -> None:
        self.file, self._put, self._drop = file, put, drop
        self.parts = list(parts)
        self._state = (-1, -1, -1)

    def push(self) -> bool:
        """Brings the store to what the file holds in whole lines; whether there was anything to do.

        Raises:
          OSError: the file cannot be read, or what `put` and `drop` raise; the next call goes on from there.
        """
        about = self.file.stat()
        state = (about.st_ino, about.st_mtime_ns, about.st_size)
        if state == self._state:
            return False
        same = about.st_ino == self._state[0] and about.st_size >= self._state[2]
        last = self.parts[-1] if self.parts else LogPart(0, 0, 0)
        start, data = last.start, self._from(last.start)
        if not same or zlib.crc32(data[: last.size]) != last.crc32:  # an inode may be used again
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
        """Deletes, the last one first, the parts from the first on that the file no longer holds as it is."""
        good = 0
        for part in self.parts:
            if part.end > len(data) or zlib.crc32(data[part.start : part.end]) != part.crc32:
                break
            good += 1
        while len(self.parts) > good:
            self._drop(len(self.parts) - 1)
            self.parts.pop()


def pieces(name: str, data: bytes) -> list[bytes]:
    """The data in parts of whole lines (or TensorBoard records), each just over PART_BYTES; a torn end is left out."""
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
    """Where the line that begins at `at` ends; 0 where it does not."""
    return data.find(b"\n", at) + 1


def _record_end(data: bytes, at: int) -> int:
    """As `_line_end`, of a TFRecord: length, its CRC, data, its CRC."""
    if at + 12 > len(data):
        return 0
    end = at + 16 + struct.unpack_from("<Q", data, at)[0]
    return end if end <= len(data) else 0
