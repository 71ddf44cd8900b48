"""Writers for programs that show a run: TensorBoard, and Weights & Biases. They take scalars, samples and pictures.

Tested in tests/core/test_writers.py.
"""

import json
import os
import re
import socket
import struct
import tempfile
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxops.core.failures import UserError
from jaxops.core.metrics_file import RESERVED
from jaxops.core.whole_files import replace_file, writing


class TensorBoardWriter:
    """A writer to a TensorBoard events file in `folder`; a resume hides the events after `resume_step`.

    With `replay`, the lines of `metrics.jsonl` at that very step, what TensorBoard has of the step is hidden too and
    those lines, and the samples of the step, take its place: whatever a kill has lost of it, the two agree. Written
    from the caller's thread: tensorboardX's own writer thread dies of a full disk and then blocks the run.

    Args:
      folder: where the file goes; one for each part of a run.
      resume_step: the step that the run goes on from.
      replay: lines of `metrics.jsonl` at `resume_step`.
      replay_samples: lines of `samples.jsonl` at `resume_step`.
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
        replay_samples: Sequence[Mapping[str, Any]] = (),
        names: Iterable[str] = (),
    ) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import text

        self.folder = Path(folder)
        self._text = text
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
                values = {name: value for name, value in line.items() if name not in RESERVED}
                self._scalars(int(line["step"]), values, wall_time=float(line.get("time", time.time())))
            for line in replay_samples:
                self._samples(int(line["step"]), [line], wall_time=float(line.get("time", time.time())))
            self._file.flush()
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with writing(self.folder):
            self._scalars(step, values)
            if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Records samples of a model's text under `samples/PART/NUMBER`, each as a text in TensorBoard's sense."""
        with writing(self.folder):
            self._samples(step, samples)

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Records a picture under its name."""
        width, height = struct.unpack(">II", png[16:24])  # of the header that every PNG begins with
        image = self._summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
        with writing(self.folder):
            self._put(step=step, summary=self._summary(value=[self._summary.Value(tag=name, image=image)]))

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

    def _samples(self, step: int, samples: Sequence[Mapping[str, Any]], **fields: Any) -> None:
        for part, group in _by_part(samples).items():
            for number, sample in enumerate(group):
                tag = f"samples/{part}/{number}" if part else f"samples/{number}"
                self._put(step=step, summary=self._text(tag, _markdown(sample)), **fields)

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
        self._wandb = wandb
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

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Records samples of a model's text as a table `samples/PART`, one row for each."""
        for part, group in _by_part(samples).items():
            columns = list(dict.fromkeys(name for sample in group for name in sample))
            rows = [[_cell(sample.get(name)) for name in columns] for sample in group]
            table = self._wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
            self._run.log({f"samples/{part}" if part else "samples": table}, step=int(step))

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Records a picture under its name."""
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            file.write(png)
            file.flush()
            self._run.log({name: self._wandb.Image(file.name)}, step=int(step))

    def close(self) -> None:
        self._run.finish()


def _by_part(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the samples of each part (`valid`, `test`), without what the format of a line keeps for itself."""
    found: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        plain = {name: value for name, value in sample.items() if name not in RESERVED}
        found.setdefault(str(plain.pop("part", "")), []).append(plain)
    return found


def _markdown(sample: Mapping[str, Any]) -> str:
    """Returns a sample as Markdown: each entry is an indented block, in which nothing that a model wrote is markup."""
    blocks = []
    for name, value in sample.items():
        lines = str(_cell(value)).splitlines() or [""]
        blocks.append(f"**{name}**\n\n" + "\n".join(f"    {line}" for line in lines))
    return "\n\n".join(blocks)


def _cell(value: Any) -> Any:
    """Returns a value that a cell of a table takes; lists and mappings become JSON."""
    if value is None or isinstance(value, str | int | float):
        return value
    return json.dumps(value, ensure_ascii=False)


def _events_name(there: Iterable[str]) -> str:
    """The name of a new TensorBoard file, which sorts after those that are there.

    TensorBoard reads the files of a folder in the order of their names, which begin with the second they were made at:
    one that is made after a clock was set back must not come before what it hides.
    """
    found = [int(match[1]) for name in there if (match := _EVENTS.match(name))]
    second = max([int(time.time()), *(before + 1 for before in found)])
    return f"events.out.tfevents.{second:010}.{socket.gethostname()}.{time.time_ns()}"


_EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\.")


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
