"""Metric writers: `metrics.jsonl`, TensorBoard, W&B, or any object with `write(step, values)`.

The records of a resumed run equal those of an uninterrupted one: records after the step that it resumes from are
dropped first. Every write either reaches the file or raises `RunFailed`; nothing fails silently on a thread.
"""

import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxops.core.failures import RunFailed, UserError

VERSION = 1
"""The format version of a line of `metrics.jsonl`."""
_RESERVED = frozenset({"v", "step", "time", "event", "text"})


@runtime_checkable
class Writer(Protocol):
    """The protocol of a writer of scalars. `close()`, `event` and `samples` are called where they exist."""

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
    "event": ..., "text": ...}`; NaN and infinities become null. The constructor removes a line torn by a kill and,
    with `resume_step`, the lines of later steps, atomically.

    Raises:
      RunFailed: the file cannot be written (disk full, permissions).
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                _keep_until(self.path, math.inf if resume_step is None else resume_step)
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
        """Records an event such as `resumed`, `skipped` or `recompiled`."""
        self._append(step, {"event": event, "text": text})

    def close(self) -> None:
        self._file.close()

    def _append(self, step: int, fields: Mapping[str, Any]) -> None:
        line = {"v": VERSION, "step": int(step), "time": round(time.time(), 3), **fields}
        data = memoryview((json.dumps(line, allow_nan=False) + "\n").encode())
        with writing(self.path):
            while data:
                data = data[self._file.write(data) :]


class SamplesWriter:
    """A writer that appends the text of a model in an evaluation to `samples.jsonl`, one JSON object per sample.

    The first sample creates the file. On resume the samples of steps after `resume_step` are removed.

    Raises:
      RunFailed: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self._path = Path(path)
        self._lines = JsonlWriter(path, resume_step=resume_step) if self._path.exists() else None

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
      UserError: a line has a newer format than this version of jaxops reads.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
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

    It writes on the caller's thread: tensorboardX's own writer thread dies when the disk is full and then blocks the
    run.

    Raises:
      RunFailed: the file cannot be written.
    """

    FLUSH_SECONDS = 10.0

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self.folder = Path(folder)
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # The library names files by the second, so the suffix keeps a quick resume from overwriting a file.
            self._file = EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")
            if resume_step is not None:
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._put(step=resume_step + 1, session_log=start)
            self._file.flush()
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        value = self._summary.Value
        scalars = [value(tag=name, simple_value=float(number)) for name, number in values.items()]
        with writing(self.folder):
            self._put(step=step, summary=self._summary(value=scalars))
            if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        with writing(self.folder):
            self._file.close()

    def _put(self, **fields: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), **fields))


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
    except ValueError:
        return None
    numbered = isinstance(line, dict) and all(isinstance(line.get(name), int) for name in ("v", "step"))
    return line if numbered else None


def _keep_until(path: Path, step: float) -> None:
    """Rewrites the file without torn lines and lines of steps after `step`; without any it stays untouched."""
    old = path.read_bytes()
    lines = (raw for raw in old.split(b"\n") if (line := _parse(raw)) is not None and line["step"] <= step)
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
