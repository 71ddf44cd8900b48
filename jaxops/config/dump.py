"""A configuration as plain values and as YAML: equal configurations give equal bytes."""

import dataclasses
import datetime
import enum
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from jaxops.config.bypath import ByPath, spelled
from jaxops.config.secrets import Secret
from jaxops.config.shapes import ABSENT
from jaxops.config.types import Spelled
from jaxops.config.yaml_text import Dumper


def plain_of(value: Any) -> Any:
    """Converts a value to nested dicts, lists and scalars as YAML holds them: `global` for `global_`, lists for tuples.

    Raises:
      TypeError: YAML cannot express a value.
    """
    if value is None or type(value) in (bool, int, float, str):  # most are, and the questions below cost more
        return value
    match value:
        case ByPath():
            return {"fn": value.fn} | {spelled(key): plain_of(entry) for key, entry in value.kwargs.items()}
        case Secret():
            return str(value)
        case Spelled():
            return value.to_config()
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = (field for field in dataclasses.fields(value) if field.init)
            return {spelled(field.name): plain_of(getattr(value, field.name)) for field in fields}
        case enum.Enum():
            return plain_of(value.value)
        case Mapping():
            return {str(key): plain_of(entry) for key, entry in value.items()}
        case list() | tuple():
            return [plain_of(entry) for entry in value]
        case os.PathLike():
            return os.fspath(value)
        case datetime.date() | datetime.time():
            return value.isoformat()
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"{type(value).__name__} cannot be written to YAML: {value!r}")


def _list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    flat = not any(isinstance(value, dict | list) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flat)


Dumper.add_representer(list, _list)


def dump_yaml(resolved: Mapping[str, Any]) -> str:
    """Writes plain values as YAML text: keys in their order, block style, lists of scalars on one line."""
    return yaml.dump(
        dict(resolved),
        Dumper=Dumper,
        sort_keys=False,
        default_flow_style=False,
        allow_unicode=True,
        width=110,
    )


def digest(resolved: Mapping[str, Any]) -> str:
    """Returns the SHA-256 (hex) of plain values; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()


def flatten_config(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted path and the value of every leaf; lists of scalars and empty mappings and lists are leaves."""
    if isinstance(value, Mapping) and value:
        entries: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, list) and any(isinstance(entry, Mapping | list) for entry in value):
        entries = iter(enumerate(value))
    else:
        yield path, value
        return
    for key, entry in entries:
        yield from flatten_config(entry, f"{path}.{key}" if path else str(key))


def diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns where two configurations differ, as (dotted path, value in a, value in b); a value may be ABSENT."""
    left, right = dict(flatten_config(a)), dict(flatten_config(b))
    paths = [*left, *(path for path in right if path not in left)]
    pairs = ((path, left.get(path, ABSENT), right.get(path, ABSENT)) for path in paths)
    return [(path, x, y) for path, x, y in pairs if type(x) is not type(y) or x != y]
