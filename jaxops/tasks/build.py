"""From files to a task: `load_config` reads and checks, `build_task` opens the data and puts the family together."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from jaxops.config.load import Loaded, load
from jaxops.tasks.config import SCHEMAS
from jaxops.tasks.task import Task


def load_config(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], overrides: Sequence[str] = ()
) -> Loaded[Any]:
    """Reads a config (files merged left to right, then `a.b=value` overrides) into its family's frozen dataclass.

    Raises:
      ConfigError: everything that is wrong at once, each with its dotted path, origin and the nearest right name.
    """
    return load(SCHEMAS, paths, overrides, by="task")


def build_task(loaded: Loaded[Any], *, objective: Callable[[Any], Any] | None = None) -> Task:
    """The task of a config; `objective`, a factory called with the model, replaces the config's.

    Raises:
      UserError: the data cannot be opened or does not fit.
    """
    from jaxops.tasks.rec import build_rec

    resolved = dict(loaded.resolved)
    if objective is not None:
        named = objective if hasattr(objective, "__qualname__") else getattr(objective, "func", type(objective))
        resolved["objective"] = {"fn": f"{named.__module__}:{named.__qualname__}"}
    return build_rec(loaded.config, resolved, objective)
