"""The lines of `metrics.jsonl` and `samples.jsonl`: written at once, cut at the step that a run resumes from, and read.

Every write either reaches the file or raises `RunFailed`. Tested in tests/core/test_writers.py.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxops.core.failures import RunFailed, UserError
from jaxops.core.secret_text import without_secrets
from jaxops.core.small_files import read_bytes
from jaxops.core.whole_files import replace_file, writing

VERSION = 1
"""Of a line of `metrics.jsonl`."""


MOST_BYTES = 512 << 20
"""Of a `metrics.jsonl` that is read: some two million lines."""


RESERVED = frozenset({"v", "step", "time", "event", "text"})
"""Names that the format of a line keeps for itself."""


class JsonlWriter:
    """A writer of one JSON object per line; each is handed to the operating system before `write` returns.

    A line is `{"v": 1, "step": ..., "time": <unix seconds>, name: number, ...}`, or for an event `{...,
    "event": ..., "text": ...}`; NaN and infinities become null. Opening cuts off a line torn by a kill; with
    `resume_step` the lines of later steps are removed too, atomically, and of that step itself the lines whose names
    begin with one of `again`, which the run is about to write once more.

    Raises:
      RunFailed: the file cannot be written (disk full, permissions), or (by `write` and `flush`) it is gone.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, resume_step: int | None = None, again: tuple[str, ...] = ()
    ) -> None:
        self.path = Path(path)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                _keep_until(self.path, math.inf if resume_step is None else resume_step, again)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (kept open until close)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars (anything that `float` takes) under their names.

        Raises:
          RunFailed: the line could not be written whole.
          ValueError: a name is reserved by the format (`step`, `time`, `v`, `event`, `text`).
        """
        taken = RESERVED & values.keys()
        if taken:
            raise ValueError(f"metric names kept for the format itself: {sorted(taken)}")
        self._append(step, {name: _finite(float(value)) for name, value in values.items()})

    def record(self, step: int, fields: Mapping[str, Any]) -> None:
        """Records plain values of any kind (text, lists) under their names."""
        self._append(step, fields)

    def event(self, step: int, event: str, text: str) -> None:
        """Records that something happened: `resumed`, `skipped`, `recompiled`, ..."""
        self._append(step, {"event": event, "text": without_secrets(text)})

    def flush(self) -> None:
        """Checks that the file is still in its place; there is nothing to flush, as every line is written at once.

        Raises:
          RunFailed: the file was deleted or moved.
        """
        try:
            there, ours = os.stat(self.path), os.fstat(self._file.fileno())
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            raise RunFailed(
                f"{self.path} was deleted, moved or replaced while the run was writing it: what is logged and saved"
                " from here on would not be found again, so the run stops. What lies in"
                f" {self.path.parent} by now is what there is to resume from"
            )

    def close(self) -> None:
        self._file.close()

    def _append(self, step: int, fields: Mapping[str, Any]) -> None:
        line = {"v": VERSION, "step": int(step), "time": round(time.time(), 3), **fields}
        data = memoryview((json.dumps(line, allow_nan=False) + "\n").encode())
        with writing(self.path):
            while data:
                data = data[self._file.write(data) :]
        self.flush()


class SamplesWriter:
    """A writer that appends the text of a model in an evaluation to `samples.jsonl`, one JSON object per sample.

    The file is made by the first sample. On resume the samples of steps after `resume_step` are cut off, and of that
    step those with an entry whose name begins with one of `again`.

    Raises:
      RunFailed: the file cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, resume_step: int | None = None, again: tuple[str, ...] = ()
    ) -> None:
        self._path = Path(path)
        self._lines = JsonlWriter(path, resume_step=resume_step, again=again) if self._path.exists() else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Ignores scalars, which other writers record."""

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Records samples of a step, each a mapping of JSON values.

        Raises:
          RunFailed: a line could not be written whole.
          ValueError: a name is reserved by the format.
        """
        for sample in samples:
            if taken := RESERVED & sample.keys():
                raise ValueError(f"names of a sample kept for the format itself: {sorted(taken)}")
            if self._lines is None:
                self._lines = JsonlWriter(self._path)
            self._lines.record(step, sample)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the lines of a `metrics.jsonl` in order, null as NaN; returns an empty list if there is no file.

    Lines that are not a JSON object with a step (such as the last one, torn by a kill) are left out.

    Raises:
      UserError: a line of a newer format than this version of jaxops knows.
      OSError: it is no ordinary file, is larger than MOST_BYTES, or cannot be read.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = []
    for number, raw in enumerate(read_bytes(path, MOST_BYTES).split(b"\n"), start=1):
        line = _parse(raw)
        if line is None:
            continue
        if line["v"] > VERSION:
            raise UserError(
                f"{path}:{number}: format {line['v']}, but this version of jaxops reads up to {VERSION}: "
                "read it with the newer jaxops that wrote it"
            )
        lines.append({name: math.nan if value is None else value for name, value in line.items()})
    return lines


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _parse(raw: bytes) -> dict[str, Any] | None:
    """Returns the JSON object of one line, or None if the line is not an object with version and step."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    numbered = isinstance(line, dict) and all(isinstance(line.get(name), int) for name in ("v", "step"))
    return line if numbered else None


def _keep_until(path: Path, step: float, again: tuple[str, ...] = ()) -> None:
    """Rewrites the file without torn lines and without those of steps after `step`; untouched if it has none.

    Of `step` itself the lines go that have an entry, or record an event, whose name begins with one of `again`.
    """

    def stays(line: Mapping[str, Any]) -> bool:
        if line["step"] != step or not again:
            return bool(line["step"] <= step)
        return not any(name.startswith(again) for name in (*line, str(line.get("event", ""))))

    old = path.read_bytes()
    lines = (raw for raw in old.split(b"\n") if (line := _parse(raw)) is not None and stays(line))
    new = b"".join(raw + b"\n" for raw in lines)
    if new != old:
        replace_file(path, [new])
