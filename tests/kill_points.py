"""A process that kills itself right before a chosen change of the file system; what a chosen change is called.

Python tells an audit hook of each file that it opens for writing, renames, removes, each folder that it makes, and so
on. A kill right before each of them meets every state that the files of a run pass through, as far as Python writes
them: what tensorstore writes within a save is met by the kills at random moments (test_failures.py). The lines of
`metrics.jsonl` go into a file that stays open, so they are counted here too, and the kill leaves half of one.

Saves run on a thread, so the n-th change is another in each run. The n-th change of one kind is always the same.
"""

import collections
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

CHANGES = {
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.remove": 1,
    "os.mkdir": 1,
    "os.rmdir": 1,
    "os.truncate": 1,
}
"""Audit events that change the file system, and how many paths each of them names."""
FOLDERS = {"os.rename": (2, 3), "os.link": (2, 3), "os.remove": (1,), "os.mkdir": (2,), "os.rmdir": (1,)}
"""At which arguments the folders are to which those paths are relative."""
VARIES = {
    r"(cache/)\.[^/]*\.[^/]*": r"\1.building",
    r"events\.out\.tfevents.*": "events.out.tfevents.N",
    r"(\.json)\.[^/]+": r"\1.N",
    r"[0-9a-f]{16,}|\d+": "N",
}
"""What is written for the parts of a path that are of one run alone."""
UNDER, POINT, LOG = "KILL_UNDER", "KILL_POINT", "KILL_LOG"


class Point(NamedTuple):
    """The `count`-th change of a kind, from 1 on, such as the third `os.rename runs/km/summary.json`."""

    kind: str
    count: int

    def __str__(self) -> str:
        return f"{self.kind} #{self.count}"


def armed(under: Path, point: Point | None = None, log: Path | None = None) -> dict[str, str]:
    """The environment in which a process that calls `arm` kills itself at a point, or lists all points in a file."""
    chosen = {} if point is None else {POINT: json.dumps(point)}
    return {UNDER: str(under), **chosen, **({} if log is None else {LOG: str(log)})}


def read_log(log: Path) -> list[Point]:
    """All points of a run that was armed with a log, in their order."""
    return [Point(*json.loads(line)) for line in log.read_text().splitlines()]


def arm(environ: Mapping[str, str] = os.environ) -> "Counter":
    """Counts the changes of this process from now on, and kills it at the point that the environment names."""
    return Counter(environ[UNDER], environ.get(POINT), environ.get(LOG))


class Counter:
    """Counts the changes below a folder by their kind."""

    def __init__(self, under: str, point: str | None, log: str | None):
        self.under, self.counts, self.lock = f"{under}/", collections.Counter[str](), threading.Lock()
        self.point = Point(*json.loads(point)) if point else None
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes) and flags & (os.O_WRONLY | os.O_RDWR):
                self.met("open", [self.place(path)])
        elif event in CHANGES:
            folders = [args[at] for at in FOLDERS.get(event, ())] or [-1] * CHANGES[event]
            pairs = zip(args[: CHANGES[event]], folders, strict=True)
            self.met(event, [self.place(path, folder) for path, folder in pairs if not isinstance(path, int)])

    def count_lines(self) -> None:
        """Counts the lines of `metrics.jsonl` too; a kill right before one leaves half of it."""
        from jaxops.core.metrics_file import JsonlWriter

        append = JsonlWriter._append

        def counted(writer: JsonlWriter, step: int, fields: Mapping[str, Any]) -> None:
            half = json.dumps({"v": 1, "step": step, **fields}).encode()
            self.met("line", [self.place(writer.path)], lambda: writer._file.write(half[: len(half) // 2]))
            append(writer, step, fields)

        JsonlWriter._append = counted  # type: ignore[method-assign]

    def place(self, path: Any, folder: int = -1) -> str:
        """The absolute path of what an audit event names; rmtree names a file by its open folder."""
        name = os.fsdecode(path)
        return os.path.abspath(name if folder < 0 else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name))

    def met(self, event: str, places: list[str], before: Any = None) -> None:
        if not any(place.startswith(self.under) for place in places):
            return
        kind = f"{event} {' -> '.join(_general(place.removeprefix(self.under)) for place in places)}"
        with self.lock:
            self.counts[kind] += 1
            point = Point(kind, self.counts[kind])
            if self.log is not None:
                os.write(self.log, f"{json.dumps(point)}\n".encode())
            if point == self.point:
                if before is not None:
                    before()
                os.kill(os.getpid(), signal.SIGKILL)


def _general(place: str) -> str:
    """A path without what differs between two of its kind: steps, process ids, times, digests, random letters."""
    for pattern, name in VARIES.items():
        place = re.sub(pattern, name, place)
    return place
