"""The writers of a run, which process 0 alone opens: they get the metrics of every window, samples and events."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxops.config.types import ByPath
from jaxops.core import distributed
from jaxops.core.failures import UserError
from jaxops.core.loggers import TensorBoardWriter, WandbWriter
from jaxops.core.metrics_file import JsonlWriter, SamplesWriter, read_metrics
from jaxops.core.writers import Writer, Writers
from jaxops.run.callables import require_callable
from jaxops.run.config import RunConfig, TensorBoard, Wandb
from jaxops.run.folder.run_folder import RunFolder

EVALUATED = ("valid/", "test/", "stopped")
"""What an evaluation and the end of a run record of a step."""
SAMPLED = ("part",)


def open_writers(
    config: RunConfig,
    resolved: Any,
    folder: RunFolder,
    own: Sequence[Writer],
    step: int,
    resumed: bool,
    evaluates_again: bool = False,
) -> Writers:
    """Opens `metrics.jsonl` and the config's loggers, cut off after `step`; none on processes that do not write.

    Args:
      config: names the loggers.
      resolved: the same as plain values, for W&B.
      folder: of the run.
      own: loggers that came by import path.
      step: what the run goes on from.
      resumed: whether there was something before.
      evaluates_again: the evaluation of `step` is still to come, so what is recorded of it goes: a run that was killed
        between its last evaluation and its summary would record it twice.
    """
    if not distributed.is_primary():
        return Writers([])
    resume = step if resumed else None
    again = EVALUATED if evaluates_again else ()
    samples = SamplesWriter(folder.path / "samples.jsonl", resume_step=step, again=SAMPLED if evaluates_again else ())
    lines = JsonlWriter(folder.metrics, resume_step=step, again=again)
    writers: list[Any] = [lines, samples, *own]
    try:
        for logger in config.run.loggers:
            if isinstance(logger, TensorBoard):
                there, wrote = None, []
                if resumed:
                    there = _lines_of(step, folder.metrics)
                    wrote = _lines_of(step, folder.path / "samples.jsonl")
                writers.append(
                    TensorBoardWriter(
                        folder.path, resume_step=resume, replay=there, replay_samples=wrote, names=folder.names()
                    )
                )
            elif isinstance(logger, Wandb):
                project, entity, name = logger.project, logger.entity, config.run.name
                writers.append(WandbWriter(folder.path, project=project, entity=entity, name=name, config=resolved))
    except BaseException:
        Writers(writers).close()
        raise
    return Writers(writers)


def _lines_of(step: int, path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a step in `metrics.jsonl` or `samples.jsonl`, without events."""
    return [line for line in read_metrics(path) if line["step"] == step and "event" not in line]


def own_loggers(configs: Sequence[TensorBoard | Wandb | ByPath]) -> list[Writer]:
    """Makes the loggers that the config names by import path, before anything is written.

    Raises:
      UserError: one has no `write(step, values)`, or wandb is asked for and not installed.
    """
    if any(isinstance(config, Wandb) for config in configs) and importlib.util.find_spec("wandb") is None:
        raise UserError("run.loggers: the wandb logger needs a package: pip install 'jaxops[wandb]'")
    loggers = []
    for config in (config for config in configs if isinstance(config, ByPath)):
        logger = config.call()
        what = f"run.loggers {config.fn}: write of what it returned ({type(logger).__name__})"
        require_callable(what, getattr(logger, "write", None), "step", "values")
        loggers.append(logger)
    return loggers


def write_window(
    writers: Writers, step: int, values: Mapping[str, Any], recompiled: Mapping[str, int], say: Callable[[str], None]
) -> None:
    """Records the values of a window of steps, and the events that belong to it.

    Args:
      writers: the writers.
      step: the last step of the window.
      values: its values; `skipped` is the number of non-finite updates that were left out.
      recompiled: how often each program was compiled again after the first steps.
      say: tells a person of it.

    Raises:
      RunFailed: the values cannot be written.
    """
    if values["skipped"]:
        writers.event(step, "skipped", f"{values['skipped']} non-finite updates left out")
    if recompiled:
        text = ", ".join(f"{name} ({n} times)" for name, n in recompiled.items())
        writers.event(step, "recompiled", f"after warm-up: {text}")
        say(f"step {step}: recompiled after warm-up: {text}; do batches change shape?")
    writers.write(step, {f"train/{name}": value for name, value in values.items() if isinstance(value, float | int)})
