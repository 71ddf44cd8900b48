"""Loads a configuration: files, their bases and overrides become a frozen instance, or one error with all problems.

loaded = load(RunConfig, "my.yaml", ["optimizer.lr=3e-4"])
loaded.config.optimizer.lr
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

from jaxops.config.bypath import Guard
from jaxops.config.dump import flatten_config, plain_of
from jaxops.config.environment import expand_variables
from jaxops.config.errors import ConfigError, Problem, show, unknown
from jaxops.config.files import ConfigPath, read_files
from jaxops.config.merge import Replaced, merge_all
from jaxops.config.node import BROKEN, Node, node_of, plain_node
from jaxops.config.overrides import Overrides, override_trees
from jaxops.config.schema import record_of
from jaxops.config.short import short_repr
from jaxops.config.validate import Validator, origin_of
from jaxops.core.failures import UserError

T = TypeVar("T")
Variants = Mapping[str, type]
"""Schemas by the value of one top-level key: {"rec": RecConfig, "reward": RewardConfig}."""


@dataclasses.dataclass(frozen=True)
class Loaded(Generic[T]):
    """A valid configuration, whose `repr` shows what differs from the defaults.

    Attributes:
      config: the instance of the schema.
      resolved: the same as plain values with every default, which `dump_yaml`, `diff` and `digest` take.
      origins: where each dotted path came from: "my.yaml:12", "override 'a.b=3'" or "default".
      notes: what a person should know of it: which value took the place of which.
    """

    config: T
    resolved: dict[str, Any]
    origins: dict[str, str]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        notes = f", notes={self.notes!r}" if self.notes else ""
        return f"Loaded({short_repr(self.config)}{notes})"


@overload
def load(
    schema: type[T],
    paths: ConfigPath | Sequence[ConfigPath],
    overrides: Overrides = (),
    *,
    by: str = "task",
    check_imports: bool = True,
) -> Loaded[T]:
    """Reads with one schema; `config` is an instance of it.

    Args: see the implementation below.
    """


@overload
def load(
    schema: Variants,
    paths: ConfigPath | Sequence[ConfigPath],
    overrides: Overrides = (),
    *,
    by: str = "task",
    check_imports: bool = True,
) -> Loaded[Any]:
    """Reads with several schemas; `config` is an instance of the one that the files choose.

    Args: see the implementation below.
    """


def load(
    schema: type[Any] | Variants,
    paths: ConfigPath | Sequence[ConfigPath],
    overrides: Overrides = (),
    *,
    by: str = "task",
    check_imports: bool = True,
) -> Loaded[Any]:
    """Reads files (merged left to right, each over its `base:`), then overrides, and validates the result.

    Args:
      schema: a frozen dataclass, or several by the value of the top-level key `by`.
      paths: files by name or path (see `find_config`), or one of them.
      overrides: `dotted.path=VALUE`, the value in YAML, or a mapping of dotted paths to Python values; later ones win.
      by: the key that chooses among several schemas.
      check_imports: True imports what each `fn:` names and checks its signature. False reads the configuration of a run
        whose code is not here.

    Raises:
      ConfigError: the configuration is wrong; each problem has its dotted path and origin.
      UserError: there is no such file.
    """
    named = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    return load_trees(schema, read_files(named), override_trees(overrides), by=by, check_imports=check_imports)


@overload
def from_dict(
    schema: type[T],
    values: Mapping[str, Any],
    overrides: Overrides = (),
    *,
    source: str = "given",
    by: str = "task",
    check_imports: bool = True,
    guard: Guard | None = None,
) -> Loaded[T]:
    """Reads with one schema; `config` is an instance of it.

    Args: see the implementation below.
    """


@overload
def from_dict(
    schema: Variants,
    values: Mapping[str, Any],
    overrides: Overrides = (),
    *,
    source: str = "given",
    by: str = "task",
    check_imports: bool = True,
    guard: Guard | None = None,
) -> Loaded[Any]:
    """Reads with several schemas; `config` is an instance of the one that `values` chooses.

    Args: see the implementation below.
    """


def from_dict(
    schema: type[Any] | Variants,
    values: Mapping[str, Any],
    overrides: Overrides = (),
    *,
    source: str = "given",
    by: str = "task",
    check_imports: bool = True,
    guard: Guard | None = None,
) -> Loaded[Any]:
    """Validates plain values (a checkpoint's, a sweep point's) and overrides as `load` does.

    Args:
      schema: a frozen dataclass, or several by the value of the top-level key `by`.
      values: nested mappings, lists and scalars.
      overrides: `dotted.path=VALUE`, the value in YAML, or a mapping of dotted paths to Python values; later ones win.
      source: the origin of `values` in errors.
      by: the key that chooses among several schemas.
      check_imports: True imports what each `fn:` names and checks its signature.

    Args:
      schema: as `load`.
      values: nested plain values.
      overrides: as `load`.
      source: their name.
      by: as `load`.
      check_imports: as `load`.
      guard: of values that were resolved when they were written, such as a run's: nothing in them is read from the
        environment again, and the guard decides what may be imported.

    Raises:
      ConfigError: the configuration is wrong; each problem has its dotted path and origin.
    """
    given, imports = override_trees(overrides), check_imports and guard is None
    return load_trees(schema, [node_of(values, source)], given, by=by, check_imports=imports, guard=guard)


def load_trees(
    schema: type[Any] | Variants,
    trees: Sequence[Node],
    given: Sequence[Node] = (),
    *,
    by: str = "task",
    check_imports: bool = True,
    guard: Guard | None = None,
) -> Loaded[Any]:
    """Validates trees that were read already, as `load` does: a sweep reads its base once for all of its points.

    Args:
      schema: as `load`.
      trees: those of files, merged left to right.
      given: those of overrides, as `override_trees` makes them.
      by: as `load`.
      check_imports: as `load`.
      guard: as `from_dict`.

    Raises:
      ConfigError: the configuration is wrong; each problem has its dotted path and origin.
    """
    tag, resolved_once = None, guard is not None
    if isinstance(schema, Mapping):
        tag = _tag(schema, [*trees, *given], by, resolved_once)
        try:
            schema = schema[tag.value]
        except UserError as error:
            raise ConfigError([Problem(by, tag.origin, tag.value, str(error))]) from None
    root = record_of(schema)
    problems: list[Problem] = []
    merged = merge_all(root, trees, given, problems)
    notes = tuple(str(note) for note in problems if isinstance(note, Replaced))
    problems = [problem for problem in problems if not isinstance(problem, Replaced)]
    if tag is not None and by not in root.fields:
        merged = Node({key: entry for key, entry in merged.value.items() if key != by}, merged.origin)
    merged = expand_variables(merged, "", problems, resolved=resolved_once)
    validator = Validator(root, check_imports=check_imports, guard=guard)
    config = validator.read(root, merged)
    problems += validator.problems
    if problems:
        raise ConfigError(problems)
    resolved = plain_of(config)
    if tag is not None and by not in resolved:
        resolved = {by: tag.value} | resolved
        validator.origins[by] = tag.origin
    return Loaded(config, resolved, _origins(resolved, validator.origins), notes)


def _tag(variants: Variants, trees: Sequence[Node], by: str, resolved: bool) -> Node:
    """Returns the node that names the schema of all the trees: that of the last tree that names one."""
    said = [tree.value[by] for tree in trees if by in tree.value]
    if not said:
        origin = next((tree.origin for tree in reversed(trees) if not tree.implied), "")
        raise ConfigError([Problem(by, origin, None, f"missing (known: {', '.join(variants)})")])
    problems: list[Problem] = []
    last = expand_variables(said[-1], by, problems, resolved=resolved)
    if last.value is BROKEN:
        raise ConfigError(problems)
    if not isinstance(last.value, str) or last.value not in variants:
        message = unknown(f"unknown {by} {show(last)}", str(plain_node(last)), variants)
        raise ConfigError([Problem(by, last.origin, plain_node(last), message)])
    for other in said:
        if plain_node(expand_variables(other, by, [], resolved=resolved)) != last.value:
            message = f"{show(last)} here, but {show(other)} at {other.origin}, which it is merged over"
            raise ConfigError([Problem(by, last.origin, last.value, message)])
    return last


def _origins(resolved: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, str]:
    leaves = {path: origin_of(path, origins) for path, _ in flatten_config(resolved)}
    return {path: origin for path, origin in origins.items() if path} | leaves


def explain(loaded: Loaded[Any]) -> list[tuple[str, Any, str]]:
    """Returns (dotted path, value, origin) of every leaf, in the order of the schema, as `jaxops config` prints it."""
    return [(path, value, loaded.origins[path]) for path, value in flatten_config(loaded.resolved)]
