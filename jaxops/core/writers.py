"""Metric writers: `metrics.jsonl`, TensorBoard, W&B, or any object with `write(step, values)`.

The records of a resumed run equal those of an uninterrupted one: records after the step that it resumes from are
dropped first. Every write either reaches the file or raises `RunFailed`; nothing fails silently on a thread.
"""

import json
import math
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxops.core.failures import RunFailed, UserError
from jaxops.core.secret_text import without_secrets
from jaxops.core.small_files import read_bytes

VERSION = 1
"""Of a line of `metrics.jsonl`."""
MOST_BYTES = 512 << 20
"""Of a `metrics.jsonl` that is read: some two million lines."""
_RESERVED = frozenset({"v", "step", "time", "event", "text"})


@runtime_checkable
class Writer(Protocol):
    """Receives scalars at a step. `close()`, `flush()` and `event(step, event, text)` are called where they exist."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars of a step by name."""
        ...


class Writers:
    """A group of writers that is used as one."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = list(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hands scalars to every writer."""
        for writer in self._writers:
            writer.write(step, values)

    def event(self, step: int, event: str, text: str) -> None:
        """Hands an event to every writer that takes events."""
        for method in self._optional("event"):
            method(step, event, text)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Hands samples of a model's text to every writer that takes samples."""
        for method in self._optional("samples"):
            method(step, samples)

    def flush(self) -> None:
        """Hands to the operating system what every writer still holds. It is called before a checkpoint is saved."""
        for method in self._optional("flush"):
            method()

    def close(self) -> None:
        """Closes every writer, then raises the first error."""
        errors = []
        for method in self._optional("close"):
            try:
                method()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _optional(self, name: str) -> Iterator[Any]:
        return (method for writer in self._writers if callable(method := getattr(writer, name, None)))


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
        taken = _RESERVED & values.keys()
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
            if taken := _RESERVED & sample.keys():
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


class TensorBoardWriter:
    """A writer of scalars to a TensorBoard events file in `folder`; a resume hides the events after `resume_step`.

    With `replay`, the lines of `metrics.jsonl` at that very step, what TensorBoard has of the step is hidden too and
    those lines take its place: whatever a kill has lost of it, the two agree. Written from the caller's thread:
    tensorboardX's own writer thread dies of a full disk and then blocks the run.

    Args:
      folder: where the file goes; one for each part of a run.
      resume_step: the step that the run goes on from.
      replay: lines of `metrics.jsonl` at `resume_step`.
      names: of the files of the run that lie elsewhere (an object store), so that this one comes after them.

    Raises:
      RunFailed: the file cannot be written.
    """

    FLUSH_SECONDS = 10.0

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        replay: Sequence[Mapping[str, Any]] | None = None,
        names: Iterable[str] = (),
    ) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import RecordWriter

        self.folder = Path(folder)
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            there = [*names, *(path.name for path in self.folder.glob("events.out.tfevents.*"))]
            self._file = RecordWriter(str(self.folder / _events_name(there)))
            self._put(file_version="brain.Event:2")
            if resume_step is not None:
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._put(step=resume_step + (replay is None), session_log=start)
            for line in replay or ():
                values = {name: value for name, value in line.items() if name not in _RESERVED}
                self._scalars(int(line["step"]), values, wall_time=float(line.get("time", time.time())))
            self._file.flush()
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with writing(self.folder):
            self._scalars(step, values)
            if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()

    def flush(self) -> None:
        """Hands to the operating system the events that are still in memory."""
        with writing(self.folder):
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        with writing(self.folder):
            self._file.close()

    def _scalars(self, step: int, values: Mapping[str, float], **fields: Any) -> None:
        value = self._summary.Value
        scalars = [value(tag=name, simple_value=float(number)) for name, number in values.items()]
        self._put(step=step, summary=self._summary(value=scalars), **fields)

    def _put(self, **fields: Any) -> None:
        self._file.write(self._event(**{"wall_time": time.time(), **fields}).SerializeToString())


class WandbWriter:
    """A writer to Weights & Biases; a resumed run continues the same W&B run, whose id is in `run_dir/wandb.json`.

    W&B keeps the first value of a step, so it ignores the values that a resumed run repeats. Without a network set
    WANDB_MODE=offline and upload later with `wandb sync`.

    Args:
      run_dir: the run folder.
      project: name of the W&B project.
      name: name of the run in W&B; the name of the run folder if not given.
      entity: W&B user or team; W&B's default if not given.
      config: values to show as the run's config.

    Raises:
      UserError: wandb is not installed, or it does not start (no login, say).
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        project: str = "jaxops",
        name: str | None = None,
        entity: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("the wandb logger needs a package: pip install 'jaxops[wandb]'") from error
        run_dir = Path(run_dir)
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            run_id = _wandb_id(run_dir / "wandb.json")
        try:
            self._run = wandb.init(
                project=project,
                entity=entity,
                name=name or run_dir.name,
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                config=dict(config or {}),
            )
        except Exception as error:
            raise UserError(
                f"wandb did not start: {error}; `wandb login` signs in, WANDB_MODE=offline logs to the run folder"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({name: float(value) for name, value in values.items()}, step=int(step))

    def close(self) -> None:
        self._run.finish()


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


def _events_name(there: Iterable[str]) -> str:
    """The name of a new TensorBoard file, which sorts after those that are there.

    TensorBoard reads the files of a folder in the order of their names, which begin with the second they were made at:
    one that is made after a clock was set back must not come before what it hides.
    """
    found = [int(match[1]) for name in there if (match := _EVENTS.match(name))]
    second = max([int(time.time()), *(before + 1 for before in found)])
    return f"events.out.tfevents.{second:010}.{socket.gethostname()}.{time.time_ns()}"


_EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\.")


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


def replace_file(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a whole file atomically: a reader, or a crash, finds either the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _wandb_id(path: Path) -> str:
    """Returns the W&B run id stored at `path`, or makes a new one and stores it there."""
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and isinstance(found.get("id"), str):
            return found["id"]
    except (FileNotFoundError, ValueError):
        pass
    run_id = uuid.uuid4().hex[:12]
    replace_file(path, [json.dumps({"version": 1, "id": run_id}).encode() + b"\n"])
    return run_id


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the file system inside the context into a RunFailed with advice.

    Raises:
      RunFailed: `path` could not be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunFailed(
            f"cannot write to {path}: {reason}; the run stops rather than lose its records. "
            "Mend that, then run the same command again: it resumes"
        ) from error
