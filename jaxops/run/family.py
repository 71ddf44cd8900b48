"""Families by name or import path. A family is a value that puts a task together and reads a finished run back.

`task: rec` is `jaxops.families.rec.family:FAMILY`. `task: mypkg.vision:FAMILY` is a user's own family with the same
rights. Importing this module loads no family.
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
from jaxops.core.failures import EXIT_OK, UserError, nearest
from jaxops.run.config import RunConfig
from jaxops.run.saved_run import SavedRun
from jaxops.run.task import Task

HOME = "jaxops.families"


@dataclasses.dataclass(frozen=True)
class Given:
    """Factories that Python hands in to replace those that the config names with `{fn: ...}`.

    Attributes:
      objective: it is called with the model and returns the objective.
      model: it is called with a description of the data and returns the model.
      data: it is called without arguments and returns the source.
    """

    objective: Callable[..., Any] | None = None
    model: Callable[..., Any] | None = None
    data: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a command that takes none."""


class Served(Protocol):
    """A trained model that was read from its run folder."""

    saved: SavedRun

    def predict(
        self, source: Any, options: Any = None, *, say: Callable[[str], None] = ..., **keywords: Any
    ) -> pa.Table:
        """Returns the model's predictions for a source, with the ids of the source.

        Args:
          source: a path, an Arrow table or a data frame.
          options: the family's `predict` dataclass; None takes the defaults.
          say: it is called with each line that a person should read.
          keywords: fields of the options, given one by one.

        Raises:
          UserError: the source does not fit.
        """
        ...

    def evaluate(self, parts: tuple[str, ...] = ...) -> dict[str, float]:
        """Returns metrics on the run's own data, as `part/metric`.

        Raises:
          UserError: the data cannot be opened, or have changed.
        """
        ...

    def export(self, path: Path, options: Any = None, **keywords: Any) -> str:
        """Writes the model in another format and returns one line for people that says what was written.

        Raises:
          UserError: the model has no such format.
        """
        ...


class Conversation(Protocol):
    """A conversation with a model that writes text."""

    def answer(self, said: str, show: Callable[[str], None]) -> str:
        """Returns the answer; `show` is called with its pieces as they are written.

        Raises:
          UserError: there is no answer to what was said.
        """
        ...

    def reset(self) -> None:
        """Forgets what was said."""
        ...


class Writing(Served, Protocol):
    """A trained model that writes text: its family names the options in `Family.generate`."""

    def generate(
        self, prompts: Any, options: Any = None, *, say: Callable[[str], None] = ..., **keywords: Any
    ) -> pa.Table:
        """Returns completions, with the columns of the prompts and a column `completion`.

        Args:
          prompts: a path, an Arrow table, a data frame or a list.
          options: the family's `generate` dataclass; None takes the defaults.
          say: it is called with each line that a person should read.
          keywords: fields of the options, given one by one.

        Raises:
          UserError: a prompt does not fit.
        """
        ...

    def chat(self, options: Any = None, **keywords: Any) -> Conversation:
        """Returns a conversation with the model."""
        ...


@dataclasses.dataclass(frozen=True)
class Shown:
    """The result of a command that only reads: `json` for programs, `rows` of cells for people, the exit status."""

    json: Any
    rows: Sequence[Sequence[str]]
    status: int = EXIT_OK


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      config: its config, which inherits RunConfig.
      build: opens the data and puts a task together.
      load: reads the model of a run.
      data: what `jaxops data ACTION CONFIG` does, by action: each takes the config.
      predict: the options of `Served.predict`, a frozen dataclass; `export` those of `Served.export`.
      generate: the options of `Writing.generate` and `Writing.chat`; None where the models write no text.
      outline: puts the task of a config together over stand-ins for data and weights, which it writes into a folder;
        only shapes and programs of that task count. None takes the task itself, with its data.
      writes: dotted paths of the config that name places which opening the data writes to; what a run folder of
        somebody else says there is left out.
    """

    config: type[RunConfig]
    build: Callable[[Loaded[Any], Given], Task]
    load: Callable[[SavedRun], Served]
    data: Mapping[str, Callable[[Any], Shown]] = dataclasses.field(default_factory=dict)
    predict: type = NoOptions
    export: type = NoOptions
    generate: type | None = None
    writes: tuple[str, ...] = ()
    outline: Callable[[Loaded[Any], Given, Path], Task] | None = None


def family_of(task: str, guard: Guard | None = None) -> Family:
    """Returns the family that `task:` names. Before the family of a run folder is imported, `guard` is asked.

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
    """Returns the names of the families that come with jaxops: the folders of `jaxops/families`."""
    package = importlib.import_module(HOME)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


class _Schemas(Mapping[str, type]):
    """The config class of each family by the value of `task:`. A family is imported when it is looked up."""

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
    """Returns SCHEMAS for the config of a run folder, where `guard` is asked before a family is imported."""
    return _Schemas(guard)
