"""Derives from a frozen dataclass's annotations what its YAML may hold: a schema is plain dataclasses."""

import dataclasses
import datetime
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import TypeAdapter

from jaxops.config.bypath import ByPath, Factory
from jaxops.config.errors import one_of, show
from jaxops.config.shapes import Anything, Call, Checked, Choice, Entries, Items, Leaf, Record, Shape, Word
from jaxops.config.types import Spelled

_STRICT = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
_NAMES = _STRICT | {Path: "a path", datetime.date: "a date such as 2026-11-15"}


def shape_of(annotation: Any, factory: Factory | None = None) -> Shape:
    """Returns the shape of an annotation.

    Raises:
      TypeError: the schema itself is wrong: YAML cannot fill the annotation.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        factory = next((m for m in arguments[1:] if isinstance(m, Factory)), factory)
        limits = tuple(m for m in arguments[1:] if not isinstance(m, Factory | str))
        inner = shape_of(arguments[0], factory)
        if not limits:
            return inner
        if isinstance(inner, Choice):
            raise TypeError(f"{annotation}: constrain the members of a union, not the union")
        if isinstance(inner, Leaf):
            return dataclasses.replace(inner, adapter=TypeAdapter(Annotated[(inner.base, *limits)]))
        return Checked(inner, TypeAdapter(Annotated[(Any, *limits)]))
    if annotation is Any:
        return Anything()
    if origin in (Union, types.UnionType):
        return _choice(arguments, factory)
    if origin in (tuple, list):
        if origin is tuple and arguments[-1] is not Ellipsis:
            return Items(tuple, None, tuple(shape_of(argument, factory) for argument in arguments))
        return Items(origin, shape_of(arguments[0], factory))
    if origin in (dict, Mapping):
        key = shape_of(arguments[0])
        if not isinstance(key, Leaf):
            raise TypeError(f"{annotation}: keys are strings or numbers")
        return Entries(key, shape_of(arguments[1], factory))
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return _dataclass(annotation, factory)
    if annotation in (tuple, list, dict, set) or origin in (set, frozenset):
        raise TypeError(f"{annotation}: say of what, as tuple[int, ...] or dict[str, int]")
    return _leaf(annotation, arguments if origin is Literal else ())


def record_of(schema: type) -> Record:
    """Returns the shape of a top-level configuration.

    Raises:
      TypeError: the schema is not a frozen dataclass.
    """
    return _record(schema)


@functools.cache
def _record(cls: type) -> Record:
    if not (dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise TypeError(f"a configuration is made of frozen dataclasses, {cls!r} is none")
    return Record(cls, shape_of)


def _leaf(annotation: Any, options: tuple[Any, ...]) -> Leaf:
    if annotation is None:
        annotation = type(None)
    expected = _NAMES.get(annotation) or getattr(annotation, "__name__", str(annotation)).lower()
    if options:
        expected = one_of([show(option) for option in options])
    return Leaf(annotation, TypeAdapter(annotation), expected, annotation in _STRICT, options)


def _dataclass(cls: type, factory: Factory | None) -> Shape:
    if cls is ByPath:
        return Choice({}, {"fn": Call(factory or Factory())}, None, ())
    if isinstance(cls, Spelled):
        return Word(cls)
    record = _record(cls)
    return Choice(dict.fromkeys(record.kinds, record), {}, None, ()) if record.kinds else record


def _choice(members: tuple[Any, ...], factory: Factory | None) -> Choice:
    tagged: dict[str, Record] = {}
    keyed: dict[str, Record | Call] = {}
    bare: list[Record] = []
    others: list[Shape] = []
    for shape in (shape_of(member, factory) for member in members):
        if isinstance(shape, Choice):
            if twice := tagged.keys() & shape.tagged.keys():
                raise TypeError(f"two members of a union have the kind {', '.join(sorted(twice))}")
            tagged |= shape.tagged
            keyed |= shape.keyed
            bare += [shape.only] if shape.only else []
            others += shape.others
        elif isinstance(shape, Record):
            bare.append(shape)
        else:
            others.append(shape)
    if len(bare) == 1 and not tagged:
        return Choice({}, keyed, bare[0], tuple(others))
    for record in bare:
        first = next(iter(record.fields))
        if first in keyed:
            raise TypeError(f"{record.cls.__name__}: another member of the union begins with {first!r} too")
        keyed[first] = record
    return Choice(tagged, keyed, None, tuple(others))


def children(shape: Shape) -> Iterator[tuple[str, Shape]]:
    """Yields (key, shape) for each shape directly beneath; the key is empty where it adds nothing to a dotted path."""
    if isinstance(shape, Record):
        yield from ((name, field.shape) for name, field in shape.fields.items())
    elif isinstance(shape, Choice):
        members = [
            *shape.tagged.values(),
            *shape.keyed.values(),
            *([shape.only] if shape.only else []),
            *shape.others,
        ]
        yield from (("", member) for member in members)
    elif isinstance(shape, Items):
        yield from (("*", item) for item in (shape.fixed or (shape.item,)) if item is not None)
    elif isinstance(shape, Entries):
        yield "*", shape.value
    elif isinstance(shape, Checked):
        yield "", shape.inner


def paths_to(root: Shape, key: str) -> list[str]:
    """Returns the dotted paths of all fields called `key`, to report where a misplaced one belongs."""
    found: dict[str, None] = {}
    waiting: list[tuple[Shape, str, tuple[type, ...]]] = [(root, "", ())]
    while waiting:
        shape, path, inside = waiting.pop(0)
        if isinstance(shape, Record):
            if shape.cls in inside:
                continue
            inside = (*inside, shape.cls)
        for name, child in children(shape):
            below = f"{path}.{name}".strip(".") if name else path
            if name == key:
                found[below] = None
            waiting.append((child, below, inside))
    return list(found)
