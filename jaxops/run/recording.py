"""The writers of a run, which process 0 alone opens: they get the metrics of every window, samples and events."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from jaxops.config.types import ByPath
from jaxops.core import distributed
from jaxops.core.failures import UserError
from jaxops.core.writers import JsonlWriter, SamplesWriter, TensorBoardWriter, WandbWriter, Writer, Writers
from jaxops.run.callables import require_callable
from jaxops.run.config import RunConfig, TensorBoard, Wandb
from jaxops.run.folder.run_folder import RunFolder


def open_writers(
    config: RunConfig, resolved: Any, folder: RunFolder, own: Sequence[Writer], step: int, resumed: bool
) -> Writers:
    """Opens `metrics.jsonl`, `samples.jsonl` and the config's loggers; other processes than 0 get no writers.

    Args:
      config: the run's config.
      resolved: the same config as plain values, for loggers that record it.
      folder: the run folder.
      own: the user's loggers, made by `own_loggers`.
      step: the step that the run begins at; records of later steps are cut off.
      resumed: true where the run has records already.
    """
    if not distributed.is_primary():
        return Writers([])
    resume = step if resumed else None
    samples = SamplesWriter(folder.path / "samples.jsonl", resume_step=step)
    writers: list[Any] = [JsonlWriter(folder.metrics, resume_step=step), samples, *own]
    try:
        for logger in config.run.loggers:
            if isinstance(logger, TensorBoard):
                writers.append(TensorBoardWriter(folder.path, resume_step=resume))
            elif isinstance(logger, Wandb):
                project, entity, name = logger.project, logger.entity, config.run.name
                writers.append(WandbWriter(folder.path, project=project, entity=entity, name=name, config=resolved))
    except BaseException:
        Writers(writers).close()
        raise
    return Writers(writers)


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
