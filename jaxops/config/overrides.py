"""Overrides from Python, as strings or as a mapping whose values are Python's own and are not read as YAML."""

import dataclasses
import datetime
import enum
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxops.config.dump import plain_of
from jaxops.config.errors import ConfigError, Problem
from jaxops.config.merge import beneath, parse_overrides
from jaxops.config.node import BROKEN, Node, join_path
from jaxops.config.secrets import Secret
from jaxops.config.yaml_text import MAX_DEPTH, STRANGE

Overrides = Sequence[str] | Mapping[str, Any]
"""`["optimizer.lr=1e-4"]`, the values in YAML, or `{"optimizer.lr": 1e-4, "model": {"dim": 64}}`; later ones win."""

_EXPECTED = "expected None, a bool, a number, a string, a path, a list, a mapping or a section of a config"


def override_trees(overrides: Overrides) -> list[Node]:
    """Returns a tree for each override.

    Raises:
      ConfigError: an override is not written as one, or a value is none that a configuration holds; all are reported
        at once.
    """
    if isinstance(overrides, Mapping):
        return _trees_of_mapping(overrides)
    texts = [overrides] if isinstance(overrides, str) else list(overrides)
    message = "an override in a list is a string 'dotted.path=VALUE'; several with Python values are one mapping"
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ConfigError([Problem("", f"override {text!r:.60}", None, message) for text in wrong])
    return parse_overrides(texts)


def _trees_of_mapping(overrides: Mapping[str, Any]) -> list[Node]:
    trees, problems = list[Node](), list[Problem]()
    for path, value in overrides.items():
        names = path.split(".") if isinstance(path, str) else [""]
        if not all(names) or any("=" in name for name in names):
            message = "the key of an override is a dotted path such as 'optimizer.lr'"
            problems.append(Problem("", f"override {path!r}", None, message))
        else:
            trees.append(beneath(names, _node(value, path, problems)))
    if problems:
        raise ConfigError(problems)
    return trees


def _node(value: Any, path: str, problems: list[Problem], depth: int = 0) -> Node:
    """Returns the node of a Python value; what no configuration holds is added to `problems`."""
    origin = f"override '{path}'"

    def wrong(message: str) -> Node:
        problems.append(Problem(path, origin, None, message))
        return Node(BROKEN, origin)

    if depth > MAX_DEPTH:
        return wrong(f"nested more than {MAX_DEPTH} deep")
    whole = dataclasses.is_dataclass(value) and not isinstance(value, type | Secret)
    if whole:
        try:
            value = plain_of(value)
        except TypeError as error:
            return wrong(str(error))
    if isinstance(value, Mapping):
        entries = {}
        for key, entry in value.items():
            if not isinstance(key, str | int) or isinstance(key, bool):
                return wrong(f"a key of a mapping must be a string, got {key!r:.60}")
            entries[str(key)] = _node(entry, join_path(path, key), problems, depth + 1)
        return Node(entries, origin, whole=whole)
    value = _listed(value)
    if isinstance(value, list):
        listed = [_node(entry, join_path(path, place), problems, depth + 1) for place, entry in enumerate(value)]
        return Node(listed, origin)
    scalar = _scalar(value)
    if scalar is BROKEN:
        return wrong(f"{_EXPECTED}, got {_named(value)}")
    if isinstance(scalar, str) and (strange := STRANGE.search(scalar)):
        return wrong(f"a character that no configuration needs: {strange[0]!a}")
    return Node(scalar, origin)


def _listed(value: Any) -> Any:
    """Returns a list for what is one in all but type: tuples, ranges, arrays of one dimension or more."""
    if isinstance(value, list | tuple | range):
        return list(value)
    return list(value.__array__()) if _dimensions(value) else value


def _dimensions(value: Any) -> int | None:
    """The number of dimensions of an array or numpy scalar, without importing numpy; None for anything else."""
    if isinstance(value, type) or not (hasattr(value, "dtype") and hasattr(value, "__array__")):
        return None
    dimensions = getattr(value, "ndim", None)
    return dimensions if isinstance(dimensions, int) else None


def _scalar(value: Any) -> Any:
    """Returns None, a bool, an int, a float or a string of exactly these types; BROKEN where there is none."""
    if _dimensions(value) == 0:
        value = _of_numpy(value.__array__()[()])
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    match value:
        case None | bool():
            return value
        case int():
            return int(value)
        case float():
            return float(value)
        case str() | Secret():
            return str(value)
        case datetime.date() | datetime.time():
            return value.isoformat()
    return BROKEN


def _of_numpy(scalar: Any) -> Any:
    """Returns the Python value of a numpy scalar; of a short float the decimal number that a person wrote.

    `float32(1e-4)` is 1e-4, not 9.999999747378752e-05: the shortest number that rounds to it.
    """
    value = scalar.item() if hasattr(scalar, "item") else scalar
    if isinstance(value, float) and scalar.dtype.itemsize < 8:
        shorter = (float(f"{value:.{digits}g}") for digits in range(1, 10))
        return next((number for number in shorter if type(scalar)(number) == scalar), value)
    return value


def _named(value: Any) -> str:
    if callable(value) and hasattr(value, "__qualname__"):
        path = f"{value.__module__}:{value.__qualname__}"
        return f"{value.__qualname__} itself; write its import path, '{path}'"
    text = f"{value!r:.60}"
    return f"{text} of the type {type(value).__name__}"
