"""From files to a task: `load_config` reads and checks, `build_task` opens the data and puts the family together."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

from jaxops.config.load import Loaded, load
from jaxops.families.rec.config import SCHEMAS
from jaxops.run.task import Task

Scalar = bool | int | float | str | None


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
    from jaxops.families.rec.ranking import build_rec

    resolved = dict(loaded.resolved)
    if objective is not None:
        resolved["objective"] = _named(objective)
    return build_rec(loaded.config, resolved, objective)


def _named(objective: Callable[..., Any]) -> dict[str, Any]:
    """How a factory given in Python is written down: as the config would name it."""
    if isinstance(objective, functools.partial):
        values = {
            name: value if isinstance(value, Scalar) else repr(value) for name, value in objective.keywords.items()
        }
        return {**_named(objective.func), **values}
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    return {"fn": f"{named.__module__}:{named.__qualname__}"}
