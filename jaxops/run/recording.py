"""What a run puts on record: metrics of every window and events, to the writers of the config; by process 0 alone."""

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
    """`metrics.jsonl` and the config's loggers, cut off after `step`; none on processes that do not write."""
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
    """The loggers that come by import path, made before anything is written.

    Raises:
      UserError: one has no `write(step, values)`; wandb is asked for and not installed.
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
