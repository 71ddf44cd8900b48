"""Where metrics go: `metrics.jsonl`, TensorBoard, W&B, or anything with `write(step, values)`.

A resumed run's records equal an uninterrupted one's: what was written after the step that it resumes from is
dropped first. Every write either reaches the file or raises `RunFailed`; nothing fails in silence on a
thread.
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
from jaxops.core.secret_text import without_secrets
from jaxops.core.small_files import read_bytes

VERSION = 1
"""Of a line of `metrics.jsonl`."""
MOST_BYTES = 512 << 20
"""Of a `metrics.jsonl` that is read: some two million lines."""
_RESERVED = frozenset({"v", "step", "time", "event", "text"})


@runtime_checkable
class Writer(Protocol):
    """Receives scalars at a step. `close()` and `event(step, event, text)` are called where they exist."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = list(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def event(self, step: int, event: str, text: str) -> None:
        for method in self._optional("event"):
            method(step, event, text)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Hands what a model wrote to every writer that takes it."""
        for method in self._optional("samples"):
            method(step, samples)

    def close(self) -> None:
        """Closes every one, then raises the first error met."""
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
    """Appends one JSON object a line, each on its way to the disk before `write` returns.

    A line is `{"v": 1, "step": ..., "time": <unix seconds>, name: number, ...}`, or for an event `{...,
    "event": ..., "text": ...}`; NaN and infinities become null. Opening cuts off a line torn by a kill; with
    `resume_step` the lines of later steps are removed too, atomically.

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
          ValueError: a name that the format keeps for itself (`step`, `time`, `v`, `event`, `text`).
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

    def close(self) -> None:
        self._file.close()

    def _append(self, step: int, fields: Mapping[str, Any]) -> None:
        line = {"v": VERSION, "step": int(step), "time": round(time.time(), 3), **fields}
        data = memoryview((json.dumps(line, allow_nan=False) + "\n").encode())
        with writing(self.path):
            while data:
                data = data[self._file.write(data) :]


class SamplesWriter:
    """Appends what a model wrote in an evaluation to `samples.jsonl`, one JSON object a sample.

    The file is made by the first sample. On resume the samples of steps after `resume_step` are cut off.

    Raises:
      RunFailed: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self._path = Path(path)
        self._lines = JsonlWriter(path, resume_step=resume_step) if self._path.exists() else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars go elsewhere."""

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Records samples of a step: mappings of plain values.

        Raises:
          RunFailed: a line could not be written whole.
          ValueError: a name that the format keeps for itself.
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
    """The lines of a `metrics.jsonl` in order, null back as NaN; empty where there is no file.

    Lines that are no JSON object with a step (the last one, torn by a kill) are left out.

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
    """Appends scalars to a TensorBoard events file in `folder`; a resume hides what came after `resume_step`.

    Written from the caller's thread: tensorboardX's own writer thread dies of a full disk and then blocks the
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
            # The library names files by the second: the suffix keeps a quick resume from overwriting.
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
    """Logs to Weights & Biases; a resumed run continues the same W&B run, whose id is in
    `run_dir/wandb.json`.

    W&B keeps the first value of a step, so what a resumed run repeats is ignored there. Without a network set
    WANDB_MODE=offline and send it later by `wandb sync`.

    Raises:
      UserError: wandb is not installed, or it refuses to start (not logged in, say).
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
    """The JSON object of one line, or None for what is none (or has no version and step)."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    numbered = isinstance(line, dict) and all(isinstance(line.get(name), int) for name in ("v", "step"))
    return line if numbered else None


def _keep_until(path: Path, step: float) -> None:
    """Rewrites the file without torn lines and without those of steps after `step`; untouched if it has
    none."""
    old = path.read_bytes()
    lines = (raw for raw in old.split(b"\n") if (line := _parse(raw)) is not None and line["step"] <= step)
    new = b"".join(raw + b"\n" for raw in lines)
    if new != old:
        replace_file(path, [new])


def replace_file(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a whole file so that a reader (or a crash) sees the old one or the new one, never a piece."""
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
    """The id kept at `path`, or a new one that is kept there from now on."""
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
    """Turns an error of the file system into a message.

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
