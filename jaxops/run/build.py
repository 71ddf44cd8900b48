"""The way from files to a task: `load_config` reads and checks, `build_task` opens the data and builds the task."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxops.config.bypath import Guard
from jaxops.config.errors import ConfigError, Problem
from jaxops.config.files import find_config, shipped_configs
from jaxops.config.load import Loaded, from_dict, load
from jaxops.config.overrides import Overrides
from jaxops.core.failures import UserError
from jaxops.run.config import common_sections
from jaxops.run.family import SCHEMAS, Given, family_of, guarded_schemas
from jaxops.run.task import Task
from jaxops.run.trust import trust_of

Scalar = bool | int | float | str | None


def load_config(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], overrides: Overrides = ()
) -> Loaded[Any]:
    """Reads a config into its family's frozen dataclass: files merged left to right, then overrides.

    Overrides are strings `a.b=value`, the value in YAML, or a mapping whose values are Python's: numpy's scalars, paths
    and whole sections too. As everywhere, `${env:NAME}` and `${secret:NAME}` in a string are read.

    Example:
      loaded = jaxops.load_config("configs/rec/my_interactions.yaml", ["data.path=plays.parquet", "run.epochs=2"])
      print(loaded.config.run.epochs)  # 2
      jaxops.load_config("configs/rec/my_interactions.yaml", {"optimizer.lr": 1e-4, "data.path": "plays.parquet"})

    Raises:
      ConfigError: everything that is wrong at once, each with its dotted path, origin and the nearest right name.
    """
    try:
        return _ordered(load(SCHEMAS, paths, overrides, by="task"))
    except ConfigError as error:
        if isinstance(paths, str | os.PathLike) and (told := _told_base(paths, error)) is not None:
            raise told from None
        raise


def _told_base(path: str | os.PathLike[str], error: ConfigError) -> ConfigError | None:
    """The error of a shipped config that lacks something because it is what others start from; None for any other."""
    if "://" in os.fspath(path):
        return None
    shipped, found = shipped_configs().resolve(), find_config(path).resolve()
    if not found.is_relative_to(shipped):
        return None
    name = found.relative_to(shipped).with_suffix("").as_posix()
    base = re.compile(rf"^base: *\[?.*\b{re.escape(found.stem)}(\.yaml)?\b", re.MULTILINE)
    users = [other for other in sorted(found.parent.glob("*.yaml")) if base.search(other.read_text(encoding="utf-8"))]
    if not users:
        return None
    try:
        load(SCHEMAS, path, by="task")
        lacks: set[str] = set()
    except ConfigError as alone:
        lacks = {problem.path for problem in alone.problems}
    if not lacks & {problem.path for problem in error.problems}:
        return None  # what is wrong is what was put over it
    # One that trains here as it is, where there is one, is the better example than one that needs 64 chips.
    example = (
        min(users, key=lambda one: (not one.stem.endswith("tiny"), one.name))
        .relative_to(shipped)
        .with_suffix("")
        .as_posix()
    )
    message = (
        f"{name} is a base, not a run: alone it is wrong in what is named below. Write `base: {name}` into a config of"
        f" your own and mend that there, as {example} does"
    )
    return ConfigError([Problem("", os.fspath(path), None, message), *error.problems])


def config_from_dict(
    values: Mapping[str, Any],
    overrides: Overrides = (),
    *,
    source: str = "given",
    check_imports: bool = True,
    guard: Guard | None = None,
) -> Loaded[Any]:
    """Reads a config from plain values (a run folder's, a sweep's point).

    Args:
      values: nested plain values.
      overrides: as in `load_config`.
      source: names the values in errors.
      check_imports: look at what the config names by import path; a family's own module is imported in any case.
      guard: of the resolved config of a run folder: decides what may be imported; nothing is read from the
        environment again.

    Raises:
      ConfigError: the config is wrong, as in `load_config`.
    """
    schemas = SCHEMAS if guard is None else guarded_schemas(guard)
    return _ordered(from_dict(schemas, values, overrides, source=source, check_imports=check_imports, guard=guard))


def completed(resolved: dict[str, Any], task: str = "") -> dict[str, Any]:
    """Returns the resolved config of an older run, with defaults for the fields that are newer than the run.

    A family by import path is imported only if it is `task`, that of the config at hand.
    """
    try:
        return config_from_dict(resolved, guard=trust_of(resolved, "the run", (task,) if task else ())).resolved
    except UserError:
        return resolved


def _ordered(loaded: Loaded[Any]) -> Loaded[Any]:
    """Returns the same config with the family's own sections before the common ones."""
    common = [name for name in common_sections() if name in loaded.resolved]
    names = ["task", *(name for name in loaded.resolved if name not in ("task", *common)), *common]
    return dataclasses.replace(loaded, resolved={name: loaded.resolved[name] for name in names})


def build_task(
    loaded: Loaded[Any],
    *,
    objective: Callable[..., Any] | None = None,
    model: Callable[..., Any] | None = None,
    data: Callable[..., Any] | None = None,
) -> Task:
    """Builds the task of a config. A factory given here replaces what the config says.

    Example:
      loaded = jaxops.load_config("configs/rec/my_interactions.yaml", ["data.path=plays.parquet"])
      task = jaxops.build_task(loaded)
      print(task.steps, list(task.metrics))

    Args:
      loaded: a config of `load_config`.
      objective: a factory of the objective, called with the model.
      model: a factory of the model, called with a description of the data.
      data: a factory of the source, called without arguments.

    Raises:
      UserError: the data cannot be opened or does not fit, or something is given that is no factory.
    """
    given = Given(objective, model, data)
    resolved = dict(loaded.resolved)
    for field in dataclasses.fields(Given):
        if (factory := getattr(given, field.name)) is not None:
            _require_factory(field.name, factory)
            resolved[field.name] = named_factory(factory)
    return family_of(loaded.config.task).build(dataclasses.replace(loaded, resolved=resolved), given)


def _require_factory(name: str, factory: Any) -> None:
    if callable(factory):
        return
    hint = ""
    if name == "data":
        hint = "; events of your own are a file: frame.to_parquet('events.parquet'), and data.path=events.parquet"
    raise UserError(
        f"build_task: {name} is a function that makes one, got a value of type {type(factory).__name__}{hint}"
    )


def named_factory(factory: Callable[..., Any]) -> dict[str, Any]:
    """Describes a factory given in Python as a config would: `{"fn": "module:name", ...keywords}`."""
    if isinstance(factory, functools.partial):
        values = {name: value if isinstance(value, Scalar) else repr(value) for name, value in factory.keywords.items()}
        return {**named_factory(factory.func), **values}
    named = factory if hasattr(factory, "__qualname__") else type(factory)
    return {"fn": f"{named.__module__}:{named.__qualname__}"}
