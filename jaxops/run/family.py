"""Families by name or import path: each a value that puts a task together and reads a finished run back.

`task: rec` is `jaxops.families.rec.family:FAMILY`; `task: mypkg.vision:FAMILY` is a user's own, which is as good.
Importing this module loads no family.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from jaxops.config.bypath import ByPath, Guard
from jaxops.config.load import Loaded
from jaxops.core.failures import UserError, nearest
from jaxops.run.config import RunConfig
from jaxops.run.saved_run import SavedRun
from jaxops.run.task import Task

HOME = "jaxops.families"


@dataclasses.dataclass(frozen=True)
class Given:
    """What Python hands in instead of the config: factories as the config's `{fn: ...}` would name them.

    Attributes:
      objective: called with the model, returns the objective.
      model: called with a description of the data, returns the model.
      data: called without arguments, returns the source.
    """

    objective: Callable[..., Any] | None = None
    model: Callable[..., Any] | None = None
    data: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a command that takes none."""


class Served(Protocol):
    """A trained model out of its run folder."""

    saved: SavedRun

    def predict(
        self, source: Any, options: Any = None, *, say: Callable[[str], None] = ..., **keywords: Any
    ) -> pa.Table:
        """The model's answer to a source, with the ids that the source has; `say` gets what a person should know.

        Raises:
          UserError: the source does not fit.
        """
        ...

    def evaluate(self, parts: tuple[str, ...] = ...) -> dict[str, float]:
        """Metrics on the run's own data, as `part/metric`.

        Raises:
          UserError: the data cannot be opened, or have changed.
        """
        ...

    def export(self, path: Path, options: Any = None, **keywords: Any) -> str:
        """Writes the model in another form; what was written, for people.

        Raises:
          UserError: there is nothing of this form.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Shown:
    """The outcome of a command that looks: `json` for programs, `rows` of cells for people."""

    json: Any
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      config: its config, which inherits RunConfig.
      build: opens the data and puts a task together.
      load: reads the model of a run.
      data: what `jaxops data ACTION CONFIG` does, by action: each takes the config.
      predict: the options of `Served.predict`, a frozen dataclass; `export` those of `Served.export`.
      writes: dotted paths of the config that name places which opening the data writes to; what a run folder of
        somebody else says there is left out.
    """

    config: type[RunConfig]
    build: Callable[[Loaded[Any], Given], Task]
    load: Callable[[SavedRun], Served]
    data: Mapping[str, Callable[[Any], Shown]] = dataclasses.field(default_factory=dict)
    predict: type = NoOptions
    export: type = NoOptions
    writes: tuple[str, ...] = ()


def family_of(task: str, guard: Guard | None = None) -> Family:
    """The family that `task:` names; `guard` is asked where a run folder says so.

    Raises:
      UserError: no such family or import path, what is there is no Family, or the guard does not have it imported.
    """
    if ":" in task:
        found = ByPath(task, guard=guard).resolve()
    elif task in shipped():
        found = importlib.import_module(f"{HOME}.{task}.family").FAMILY
    else:
        raise UserError(f"no family {task!r}{nearest(task, shipped())} (known: {', '.join(shipped())})")
    if not isinstance(found, Family):
        raise UserError(f"task {task}: expected a jaxops Family, got {type(found).__name__}")
    return found


def shipped() -> list[str]:
    """The names of the families that jaxops has: the folders of `jaxops/families`."""
    package = importlib.import_module(HOME)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


class _Schemas(Mapping[str, type]):
    """The config of each family by what `task:` says; a family is imported when it is asked for."""

    def __init__(self, guard: Guard | None = None) -> None:
        self._guard = guard

    def __getitem__(self, task: str) -> type:
        return family_of(task, self._guard).config

    def __iter__(self) -> Iterator[str]:
        return iter(shipped())

    def __len__(self) -> int:
        return len(shipped())

    def __contains__(self, task: object) -> bool:
        return isinstance(task, str) and (":" in task or task in shipped())


SCHEMAS: Mapping[str, type] = _Schemas()
"""The schema of each `task`, for the config machinery."""


def guarded_schemas(guard: Guard) -> Mapping[str, type]:
    """As SCHEMAS, for the config of a run folder: the guard is asked before a family is imported."""
    return _Schemas(guard)
