"""Validates a merged tree: the result is an instance of its schema, or all errors at once."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxops.config.bypath import ByPath, Factory, Guard, python_name, spelled
from jaxops.config.dump import plain_of
from jaxops.config.errors import Problem, Refused, one_of, show, unknown
from jaxops.config.node import BROKEN, Node, join_path, plain_node
from jaxops.config.part import Part
from jaxops.config.schema import paths_to
from jaxops.config.shapes import (
    ABSENT,
    Anything,
    Call,
    Checked,
    Choice,
    Entries,
    Items,
    Leaf,
    Record,
    Shape,
    Word,
)
from jaxops.config.types import CrossChecked
from jaxops.config.yaml_text import scalar_of
from jaxops.core.failures import UserError, nearest

_OVERRIDE = "override '"


class Validator:
    """Reads nodes by shape; afterwards `problems` holds the errors and `origins` the origin of each value."""

    def __init__(self, root: Record, *, check_imports: bool = True, guard: Guard | None = None):
        self.root, self.check_imports, self.guard = root, check_imports, guard
        self.problems: list[Problem] = []
        self.origins: dict[str, str] = {}

    def read(self, shape: Shape, node: Node, path: str = "", default: Any = ABSENT) -> Any:
        """Returns the value of `node`, or BROKEN; a partial mapping is filled from the field's `default`.

        Args:
          shape: shape of the value.
          node: the value as it was read.
          path: dotted path of the value.
          default: default of the field.
        """
        self.origins[path] = node.origin
        if node.value is BROKEN:
            return BROKEN
        match shape:
            case Anything():
                return self._anything(node, path)
            case Leaf() | Word():
                return self._leaf(shape, node, path)
            case Record():
                return self._record(shape, node, path, default)
            case Choice():
                return self._choice(shape, node, path, default)
            case Items():
                return self._items(shape, node, path)
            case Entries():
                return self._entries(shape, node, path)
            case Checked():
                value = self.read(shape.inner, node, path, default)
                return value if value is BROKEN else self._try(shape.take, value, node, path)
            case Call():
                return self._call(shape.factory, node, path, join_path(path, "fn"))

    def _wrong(self, path: str, node: Node, message: str) -> Any:
        self.problems.append(Problem(path, node.origin, plain_node(node), message))
        return BROKEN

    def _expected(self, shape: Shape, node: Node, path: str) -> Any:
        beneath = "; there is nothing beneath it to set" if node.implied else ""
        return self._wrong(path, node, f"expected {shape.expected}, got {show(node)}{beneath}")

    def _try(self, take: Callable[[Any], Any], given: Any, node: Node, path: str) -> Any:
        try:
            return take(given)
        except Refused as refused:
            return self._wrong(path, node, str(refused))

    def _anything(self, node: Node, path: str) -> Any:
        """Returns plain values unchanged, or BROKEN where an environment variable inside is."""
        self.origins[path] = node.origin
        if isinstance(node.value, dict):
            entries = {key: self._anything(entry, join_path(path, key)) for key, entry in node.value.items()}
            return BROKEN if any(entry is BROKEN for entry in entries.values()) else entries
        if isinstance(node.value, list):
            listed = [self._anything(entry, join_path(path, i)) for i, entry in enumerate(node.value)]
            return BROKEN if any(entry is BROKEN for entry in listed) else listed
        return node.value

    def _leaf(self, shape: Leaf | Word, node: Node, path: str) -> Any:
        if isinstance(node.value, dict | list):
            return self._expected(shape, node, path)
        return self._try(shape.take, node, node, path)

    def _record(self, shape: Record, node: Node, path: str, default: Any) -> Any:
        if not isinstance(node.value, dict):
            return self._expected(shape, node, path)
        values: dict[str, Any] = {}
        strangers = [key for key in node.value if key not in shape.fields]
        for key in strangers:
            here = join_path(path, key)
            elsewhere = [found for found in paths_to(self.root, key) if "*" not in found]
            what = f"unknown key: another sort of {path} has it, not this one" if here in elsewhere else "unknown key"
            message = unknown(what, key, shape.fields, [found for found in elsewhere if found != here])
            if issubclass(shape.cls, Part) and key in shape.cls.lacks:
                message = f"there is no such key: {shape.cls.lacks[key]}"
            self._wrong(here, node.value[key], message)
        for key, field in shape.fields.items():
            below = join_path(path, key)
            fallback = field.default(default if type(default) is shape.cls else ABSENT)
            if key in node.value:
                values[field.name] = self.read(field.shape, node.value[key], below, fallback)
            elif fallback is not ABSENT:
                values[field.name] = fallback
                self.origins[below] = "default"
            else:
                missing = f"missing; expected {field.shape.expected}"
                values[field.name] = self._wrong(below, Node(None, node.origin), missing)
        if strangers or any(value is BROKEN for value in values.values()):
            return BROKEN
        return self._construct(shape.cls, values, node, path)

    def _construct(self, cls: type, values: Mapping[str, Any], node: Node, path: str) -> Any:
        try:
            instance = cls(**values)
        except (ValueError, UserError) as error:
            return self._wrong(path, node, str(error))
        if isinstance(instance, CrossChecked):
            self._cross_checks(instance, path)
        return instance

    def _with_overrides(self, origin: str, path: str, message: str) -> str:
        """The origin of a contradiction, with the overrides of other values below `path` that the message names.

        `must divide dim 65` is said of `heads`, which a file wrote, and it is the override of `dim` that did it.
        """
        if origin.startswith(_OVERRIDE):
            return origin
        found = dict.fromkeys(
            given
            for below, given in self.origins.items()
            if given.startswith(_OVERRIDE)
            and (not path or below.startswith(f"{path}."))
            and re.search(rf"(?<![\w-]){re.escape(below.rpartition('.')[2])}(?![\w-])", message)
        )
        return f"{', '.join([origin, *found])}" if found else origin

    def _cross_checks(self, instance: CrossChecked, path: str) -> None:
        known = len(self.problems)
        try:
            for relative, message in instance.problems():
                where = _spelled_path(join_path(path, relative) if relative else path)
                origin = self._with_overrides(origin_of(where, self.origins), path, message)
                self.problems.append(Problem(where, origin, _at(plain_of(instance), relative), message))
        except UserError as error:
            self.problems.append(Problem(path, origin_of(path, self.origins), None, str(error)))
        except Exception:
            # This check may rely on a value that an inner check has just refused; otherwise the fault is its own.
            if not known:
                raise

    def _choice(self, shape: Choice, node: Node, path: str, default: Any) -> Any:
        long = shape.spelled_out(node)
        if isinstance(long.value, dict):
            # A value written as a word is reported at its own path, not at a key that nobody wrote.
            return self._member(shape, long, path, default, written=long is node)
        if isinstance(node.value, list):
            lists = [other for other in shape.others if _holds_list(other)]
            return self.read(lists[0], node, path) if lists else self._expected(shape, node, path)
        return self._scalar(shape, node, path)

    def _member(self, shape: Choice, node: Node, path: str, default: Any, written: bool) -> Any:
        member: Shape | None = shape.member(node.value, default)
        if member is None and not (shape.tagged or shape.keyed):
            member = next((other for other in shape.others if _holds_mapping(other)), None)
            if member is None:
                return self._expected(shape, node, path)
        if isinstance(member, Call):
            return self._call(member.factory, node, path, join_path(path, "fn") if written else path)
        if member is not None:
            return self.read(member, node, path, default)
        if "kind" in node.value and shape.tagged:
            kind = node.value["kind"]
            if kind.value is BROKEN:
                return BROKEN
            message = unknown(f"unknown kind {show(kind)}", str(plain_node(kind)), shape.tagged)
            if "fn" in shape.keyed:
                message += ", or {fn: 'package.module:name'} for one of your own"
            return self._wrong(join_path(path, "kind") if written else path, kind, message)
        wanted = [f"'kind' ({', '.join(shape.tagged)})"] if shape.tagged else []
        wanted += [repr(key) for key in shape.keyed]
        words = [*(["kind"] if shape.tagged else []), *shape.keyed]
        hint = next((nearest(key, words) for key in node.value if nearest(key, words)), "")
        return self._wrong(path, node, f"expected a mapping with {one_of(wanted)}, got {show(node)}{hint}")

    def _scalar(self, shape: Choice, node: Node, path: str) -> Any:
        """Returns the value of the first member that takes it unconverted, else of the first that takes it at all."""
        taken, refused = [], []
        for other in shape.others:
            inner = other.inner if isinstance(other, Checked) else other
            try:
                if isinstance(inner, Leaf | Word):
                    value = inner.take(node)
                    taken.append(other.take(value) if isinstance(other, Checked) else value)
                elif isinstance(inner, Anything):
                    taken.append(node.value)
            except Refused as error:
                refused.append(error)
        if taken:
            return next((value for value in taken if type(value) is type(node.value)), taken[0])
        limits = [error for error in refused if not error.of_type]
        if limits:
            return self._wrong(path, node, str(limits[0]))
        return self._wrong(path, node, f"expected {shape.expected}, got {show(node)}{shape.near(node.value)}")

    def _items(self, shape: Items, node: Node, path: str) -> Any:
        if not isinstance(node.value, list) or (shape.fixed and len(node.value) != len(shape.fixed)):
            return self._expected(shape, node, path)
        kinds = shape.fixed or (shape.item,) * len(node.value)
        values = [
            self.read(item, entry, join_path(path, i))
            for i, (item, entry) in enumerate(zip(kinds, node.value, strict=True))
            if item is not None
        ]
        return BROKEN if any(value is BROKEN for value in values) else shape.make(values)

    def _entries(self, shape: Entries, node: Node, path: str) -> Any:
        if not isinstance(node.value, dict):
            return self._expected(shape, node, path)
        values = {}
        for key, entry in node.value.items():
            word = key if shape.key.base is str else scalar_of(key)
            named = self._try(shape.key.take, Node(word, entry.origin), entry, join_path(path, key))
            values[named] = self.read(shape.value, entry, join_path(path, key))
        broken = BROKEN in values or any(value is BROKEN for value in values.values())
        return BROKEN if broken else values

    def _call(self, factory: Factory, node: Node, path: str, fn_path: str) -> Any:
        entries = {key: self._anything(entry, join_path(path, key)) for key, entry in node.value.items()}
        fn = entries.pop("fn")
        if fn is BROKEN or any(value is BROKEN for value in entries.values()):
            return BROKEN
        if not isinstance(fn, str):
            expected = f"expected {Call(factory).expected}, got {show(fn)}"
            return self._wrong(fn_path, node.value["fn"], expected)
        found = ByPath(fn, {python_name(key): value for key, value in entries.items()}, self.guard)
        if self.check_imports:
            for key, message in found.complaints(factory):
                written = next(entry for entry in node.value if spelled(entry) == key)  # `lambda_` stands for `lambda`
                self._wrong(fn_path if key == "fn" else join_path(path, written), node.value[written], message)
        return found


def origin_of(path: str, origins: Mapping[str, str]) -> str:
    """Returns where the value at `path`, or the nearest value around it, was written."""
    while path not in origins and path:
        path = path.rpartition(".")[0]
    return origins.get(path, "")


def _holds_list(shape: Shape) -> bool:
    return isinstance(shape.inner if isinstance(shape, Checked) else shape, Items | Anything)


def _holds_mapping(shape: Shape) -> bool:
    return isinstance(shape.inner if isinstance(shape, Checked) else shape, Entries | Anything)


def _spelled_path(path: str) -> str:
    return ".".join(spelled(name) for name in path.split("."))


def _at(value: Any, path: str) -> Any:
    for key in _spelled_path(path).split(".") if path else ():
        if isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value
