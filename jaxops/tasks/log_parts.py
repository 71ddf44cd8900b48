"""Append-only logs as numbered objects, since an object store cannot append: `metrics.jsonl.000000`, `.000001`, ...

Joined in order the parts are the log. Each ends with a whole line or record (every part of a TensorBoard log is one
that TensorBoard reads); only the last is ever written again, until it is large. Where a resume has dropped lines,
the parts after the first that changed go before that is written: at any moment they join to what some moment's log
was. Held by tests/tasks/test_mirror.py.
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
class Part:
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
    return f"{log}.{number:06}"


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Log -> the names of its parts in order, out of any names; what follows a gap is left out."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        match = _NUMBERED.fullmatch(name)
        if match and is_log(match[1]) and int(match[2]) == len(found.setdefault(match[1], [])):
            found[match[1]].append(name)
    return {log: parts for log, parts in found.items() if parts}


def known(pieces: Iterable[bytes]) -> list[Part]:
    """The parts that these contents are."""
    parts: list[Part] = []
    for piece in pieces:
        parts.append(Part(parts[-1].end if parts else 0, len(piece), zlib.crc32(piece)))
    return parts


class LogParts:
    """One log and its parts in the store.

    Args:
      put: writes a part by its number.
      drop: deletes a part by its number.
      parts: what the store holds already.
    """

    def __init__(
        self, file: Path, put: Callable[[int, bytes], None], drop: Callable[[int], None], parts: Iterable[Part] = ()
    ) -> None:
        self.file, self._put, self._drop = file, put, drop
        self.parts = list(parts)
        self._inode = -1
        self._pushed = -1

    def push(self) -> bool:
        """Brings the store to what the file holds in whole lines; whether there was anything to do.

        Raises:
          OSError: the file cannot be read, or what `put` and `drop` raise; the next call goes on from there.
        """
        about = self.file.stat()
        if about.st_ino == self._inode and about.st_size == self._pushed:
            return False
        data = self.file.read_bytes() if about.st_ino != self._inode or about.st_size < self._pushed else None
        if data is not None:
            self._withdraw(data)
        tail = self.parts[-1] if self.parts and self.parts[-1].size <= PART_BYTES else None
        start = tail.start if tail else self.parts[-1].end if self.parts else 0
        number = len(self.parts) - (tail is not None)
        for piece in pieces(self.file.name, self._rest(start) if data is None else data[start:]):
            part = Part(start, len(piece), zlib.crc32(piece))
            if number >= len(self.parts) or self.parts[number] != part:
                self._put(number, piece)
                self.parts[number:] = [part]
            start, number = part.end, number + 1
        self._inode, self._pushed = about.st_ino, about.st_size
        return True

    def _rest(self, start: int) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(start)
            return file.read()

    def _withdraw(self, data: bytes) -> None:
        """Deletes, the last one first, the parts after the first that the file no longer holds as it is."""
        good = 0
        for part in self.parts:
            if part.end > len(data) or zlib.crc32(data[part.start : part.end]) != part.crc32:
                break
            good += 1
        start = self.parts[good].start if good < len(self.parts) else 0
        rewritten = good < len(self.parts) and bool(pieces(self.file.name, data[start:]))
        while len(self.parts) > good + rewritten:
            self._drop(len(self.parts) - 1)
            self.parts.pop()
        if rewritten:
            self.parts[good] = Part(start, 0, 0)  # to be written over, next


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
