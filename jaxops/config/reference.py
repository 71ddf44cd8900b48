"""What every field of a config is: its type, default and meaning, read out of the dataclasses and their docstrings.

`jaxops config --help FIELD` and the configuration reference of the documentation are made of it.
Tested in tests/config/test_config_reference.py.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from jaxops.config.dump import plain_of
from jaxops.config.schema import children, record_of
from jaxops.config.shapes import ABSENT, Call, Choice, Record, Shape
from jaxops.config.yaml_text import Dumper

_WIDEST_DEFAULT = 60
"""The letters of a default that is shown whole; the fields of a longer one have entries of their own."""


@dataclasses.dataclass(frozen=True)
class FieldReference:
    """One field.

    Attributes:
      path: its dotted path; `*` stands for a name or number that the user chooses.
      expected: what a value must be, in words.
      default: the default in YAML; empty where a value must be given.
      text: its meaning, from the `Attributes:` of the dataclass; empty where that says it in its first sentences.
    """

    path: str
    expected: str
    default: str
    text: str


@dataclasses.dataclass(frozen=True)
class SectionReference:
    """A dataclass at one place of a config.

    Attributes:
      path: the place; empty for the config itself.
      kind: the `kind` that chooses the dataclass, empty where there is nothing to choose.
      source: the import path of the dataclass.
      text: its docstring without the attributes.
      fields: its fields.
    """

    path: str
    kind: str
    source: str
    text: str
    fields: tuple[FieldReference, ...]


def sections(schema: type) -> Iterator[SectionReference]:
    """Yields the sections of a config, each before those inside it; a dataclass inside itself is not followed."""
    yield from _sections(record_of(schema), "", (), ABSENT)


def find_fields(found: Sequence[SectionReference], path: str) -> list[tuple[SectionReference, FieldReference]]:
    """Returns the fields at a dotted path, one for each kind of the section that has it.

    What the user chooses may stand in the path or be left out: `tables.item.dim`, `tables.*.dim` or `tables.dim`.
    """
    return [(section, field) for section in found for field in section.fields if _is_at(field.path, path)]


def find_sections(found: Sequence[SectionReference], path: str) -> list[SectionReference]:
    """Returns the sections at a dotted path, one for each kind; a path that names a field names no section by `*`."""
    fields = {_without_stars(field.path) for section in found for field in section.fields}
    exact = [section for section in found if section.path and _without_stars(section.path) == path]
    return exact or [s for s in found if s.path and _is_at(s.path, path) and path not in fields]


def values_at(tree: Any, path: str) -> Iterator[Any]:
    """Yields the values at a dotted path of a YAML tree, where `*` takes every entry."""
    name, _, rest = path.partition(".")
    if not path:
        yield tree
    elif name == "*":
        entries = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ()
        for entry in entries:
            yield from values_at(entry, rest)
    elif isinstance(tree, Mapping) and name in tree:
        yield from values_at(tree[name], rest)


def _without_stars(path: str) -> str:
    return path.replace(".*", "")


def _is_at(known: str, path: str) -> bool:
    pattern = r"\.".join("[^.]+" if name == "*" else re.escape(name) for name in known.split("."))
    return path == _without_stars(known) or re.fullmatch(pattern, path) is not None


def _sections(shape: Shape, path: str, inside: tuple[type, ...], default: Any) -> Iterator[SectionReference]:
    if not isinstance(shape, Record):
        for name, child in children(shape):
            yield from _sections(child, f"{path}.{name}".strip("."), inside, ABSENT if name else default)
        return
    if shape.cls in inside:
        return
    text, attributes = _documented(shape.cls)
    instance = default if type(default) is shape.cls else ABSENT
    fields = []
    for name, field in shape.fields.items():
        value = field.default(instance)
        written = "" if value is ABSENT else _written(value)
        below = f"{path}.{name}".strip(".")
        fields.append(FieldReference(below, _expected(field.shape), written, attributes.get(field.name, "")))
    kind = "" if not shape.kinds else " or ".join(shape.kinds)
    yield SectionReference(path, kind, f"{shape.cls.__module__}:{shape.cls.__qualname__}", text, tuple(fields))
    for name, field in shape.fields.items():
        yield from _sections(field.shape, f"{path}.{name}".strip("."), (*inside, shape.cls), field.default(instance))


def _written(value: Any) -> str:
    plain = plain_of(value)
    text = yaml.dump(plain, Dumper=Dumper, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    text = text.removesuffix("...\n").strip()
    if len(text) <= _WIDEST_DEFAULT or not isinstance(plain, Mapping):
        return text
    return f"{{kind: {plain['kind']}, ...}}" if "kind" in plain else "{...}"


def _expected(shape: Shape) -> str:
    """Returns what a value must be; the list of a union's import path is kept short."""
    if isinstance(shape, Choice) and isinstance(shape.keyed.get("fn"), Call) and not shape.tagged:
        return "an import path 'package.module:name', or {fn: ..., NAME: VALUE}"
    return shape.expected


def _documented(cls: type) -> tuple[str, dict[str, str]]:
    """Returns a class's docstring without its attributes, and the text of each attribute."""
    if cls.__doc__ is None or cls.__doc__.startswith(f"{cls.__name__}("):  # what dataclass writes itself
        return "", {}
    text, _, rest = inspect.cleandoc(cls.__doc__).partition("\nAttributes:\n")
    listed: list[str] = []
    after: list[str] = []
    for line in rest.splitlines():
        (after if after or (line and not line.startswith(" ")) else listed).append(line)
    attributes: dict[str, str] = {}
    name = ""
    for line in listed:
        if match := re.match(r"  (\w+): (.*)", line):
            name = match[1]
            attributes[name] = match[2]
        elif name and line.strip():
            attributes[name] += f" {line.strip()}"
    for base in cls.__mro__[1:-1]:
        if dataclasses.is_dataclass(base):
            attributes = {**_documented(base)[1], **attributes}
    return "\n".join([text.strip(), *after]).strip(), attributes
