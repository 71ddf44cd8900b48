"""The shapes that a configuration can have: each knows which values fit it, and none knows its position.

Record (a dataclass), Choice (a union: chosen by `kind`, by key, or by type), Items (tuple, list), Entries (dict), Leaf
(a scalar, validated by pydantic), Word (a `Spelled` type), Call (`ByPath`), Anything.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from jaxops.config.bypath import IMPORT_PATH, Factory, spelled
from jaxops.config.errors import Refused, one_of, show, wording
from jaxops.config.node import Node
from jaxops.config.secrets import Secret
from jaxops.core.failures import nearest

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "(absent)"})()
"""A marker for no value, where None would be a value."""


@dataclasses.dataclass(frozen=True)
class Anything:
    """Any YAML value, unchanged."""

    expected: str = "any value"


@dataclasses.dataclass(frozen=True)
class Call:
    """A `ByPath`: `fn` and the keywords of the callable that it names."""

    factory: Factory
    expected: str = "an import path 'package.module:name'"


@dataclasses.dataclass(frozen=True)
class Word:
    """A `Spelled` dataclass."""

    cls: type

    @property
    def expected(self) -> str:
        return self.cls.expected  # type: ignore[attr-defined]

    def take(self, node: Node) -> Any:
        """Returns the value.

        Raises:
          Refused: the value does not fit.
        """
        try:
            return self.cls.from_config(node.value)  # type: ignore[attr-defined]
        except ValueError as error:
            message = str(error) or f"expected {self.expected}"
            raise Refused(f"{message}, got {show(node)}", of_type=not str(error)) from None


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A scalar: pydantic's TypeAdapter validates it, strictly for the types that YAML itself tells apart."""

    base: Any
    adapter: TypeAdapter
    expected: str
    strict: bool
    options: tuple[Any, ...] = ()

    def take(self, node: Node) -> Any:
        """Returns the value.

        Raises:
          Refused: the value does not fit.
        """
        value = node.value
        if isinstance(value, Secret):
            raise Refused(
                f"{value} goes to the keywords of code of your own ({{fn: ...}}) alone: what stands here is written"
                " into the run folder and into messages"
            )
        if self.base is str and node.text is not None and isinstance(value, int | float):
            value = node.text
        if self.base is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # so that 1e6 is a number of steps
        if isinstance(value, dict | list) or value != value or not self._may_hold(value):
            raise self._refused(node)
        try:
            return self.adapter.validate_python(value, strict=self.strict)
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False)[0]
            if details["type"] == "literal_error":
                raise self._refused(node) from None
            raise wording(details, self.expected, node) from None

    def _may_hold(self, value: Any) -> bool:
        # In Python 1 == True, but Literal[1, 2] must not take `true`.
        return not self.options or any(value == option and type(value) is type(option) for option in self.options)

    def _refused(self, node: Node) -> Refused:
        hint = nearest(node.value, map(str, self.options)) if isinstance(node.value, str) else ""
        return Refused(f"expected {self.expected}, got {show(node)}{hint}", of_type=True)


@dataclasses.dataclass(frozen=True)
class Items:
    """A list: any number of `item`, or exactly the shapes in `fixed`."""

    make: type
    item: "Shape | None"
    fixed: "tuple[Shape, ...]" = ()

    @property
    def expected(self) -> str:
        return f"a list of {len(self.fixed)}" if self.fixed else "a list"


@dataclasses.dataclass(frozen=True)
class Entries:
    """A mapping whose keys the user chooses."""

    key: Leaf
    value: "Shape"
    expected: str = "a mapping"


@dataclasses.dataclass(frozen=True)
class Checked:
    """A shape with constraints on the whole value: `Annotated[tuple[int, ...], Field(min_length=1)]`."""

    inner: "Shape"
    adapter: TypeAdapter

    @property
    def expected(self) -> str:
        return self.inner.expected

    def take(self, value: Any) -> Any:
        """Returns the value unchanged.

        Raises:
          Refused: a constraint does not hold.
        """
        try:
            return self.adapter.validate_python(value)
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False)[0]
            raise wording(details, self.expected, value) from None


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a dataclass; `name` is its Python name (`global_`)."""

    name: str
    shape: "Shape"
    source: dataclasses.Field

    def default(self, instance: Any = ABSENT) -> Any:
        """Returns the field's default; ABSENT where a value must be given (a `kind` of one possible value need not be).

        `instance` is the default of the dataclass around the field, and overrides the defaults of the class.
        """
        if instance is not ABSENT:
            return getattr(instance, self.name)
        if self.source.default is not dataclasses.MISSING:
            return self.source.default
        if self.source.default_factory is not dataclasses.MISSING:
            return self.source.default_factory()
        if self.name == "kind" and isinstance(self.shape, Leaf) and len(self.shape.options) == 1:
            return self.shape.options[0]
        return ABSENT


@dataclasses.dataclass(frozen=True)
class Record:
    """A dataclass: `fields` by their name in YAML."""

    cls: type
    shape_of: Callable[[Any], "Shape"]
    expected: str = "a mapping"

    @functools.cached_property
    def fields(self) -> Mapping[str, Field]:
        # The fields are worked out on demand, because a dataclass may contain itself.
        hints = typing.get_type_hints(self.cls, include_extras=True)
        return {
            spelled(source.name): Field(source.name, self.shape_of(hints[source.name]), source)
            for source in dataclasses.fields(self.cls)
            if source.init
        }

    @functools.cached_property
    def kinds(self) -> tuple[str, ...]:
        """The tags of a member of a tagged union; empty for any other dataclass."""
        hint = typing.get_type_hints(self.cls).get("kind")
        return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


@dataclasses.dataclass(frozen=True)
class Choice:
    """A union: `kind` chooses the member of a mapping, else a key (a member's first field), else the default.

    Attributes:
      tagged: the dataclasses with a `kind`, by kind.
      keyed: the dataclasses without a `kind`, by the name of their first field, and ByPath by `fn`.
      only: the single dataclass that needs neither.
      others: all members that are not dataclasses.
    """

    tagged: Mapping[str, Record]
    keyed: Mapping[str, Record | Call]
    only: Record | None
    others: "tuple[Shape, ...]"

    @property
    def expected(self) -> str:
        said = [f"one of the kinds {', '.join(self.tagged)}"] if self.tagged else []
        said += [_keyed(key, member) for key, member in self.keyed.items()]
        said += ["a mapping"] if self.only else []
        return one_of(said + [option for other in self.others for option in _options(other)])

    def spelled_out(self, node: Node) -> Node:
        """Expands a word to its mapping: `adamw` to `{kind: adamw}`, `pkg.mod:name` to `{fn: pkg.mod:name}`."""
        word = node.value
        if not isinstance(word, str):
            return node
        if "fn" in self.keyed and IMPORT_PATH.fullmatch(word):
            return Node({"fn": node}, node.origin)
        if word in self.tagged or (self.tagged and not any(_fits(other, node) for other in self.others)):
            return Node({"kind": node}, node.origin)
        return node

    def near(self, word: Any) -> str:
        """Returns `; did you mean 'auto'?` where `word` is a misspelling of an allowed word."""
        words = [str(option) for other in self.others if isinstance(other, Leaf) for option in other.options]
        return nearest(word, [*self.tagged, *words]) if isinstance(word, str) else ""

    def tag(self, entries: Mapping[str, Node], default: Any = ABSENT) -> tuple[str, Any] | None:
        """Returns the (key, value) that chooses the member, from the mapping or else the default, or None."""
        if self.tagged and "kind" in entries:
            return "kind", entries["kind"].value
        if "fn" in entries and isinstance(self.keyed.get("fn"), Call):
            return "fn", entries["fn"].value
        key = next((key for key in self.keyed if key in entries), None)
        if key is None and any(type(default) is record.cls for record in self.tagged.values()):
            return "kind", default.kind
        return None if key is None else (key, None)

    def member(self, entries: Mapping[str, Node], default: Any = ABSENT) -> Record | Call | None:
        """Returns the dataclass that a mapping stands for, None where that is not known."""
        if self.tagged and "kind" in entries:
            kind = entries["kind"].value
            return self.tagged.get(kind) if isinstance(kind, str) else None
        found = next((self.keyed[key] for key in self.keyed if key in entries), None)
        if found is not None:
            return found
        records = [*self.tagged.values(), *(r for r in self.keyed.values() if isinstance(r, Record))]
        implied = next((record for record in records if type(default) is record.cls), self.only)
        return implied or (records[0] if len(records) == 1 and not self.keyed else None)


Shape = Anything | Call | Word | Leaf | Items | Entries | Checked | Record | Choice


def _keyed(key: str, member: Shape) -> str:
    return member.expected if isinstance(member, Call) else f"a mapping with {key!r}"


def _options(shape: Shape) -> list[str]:
    if isinstance(shape, Leaf) and shape.options:
        return [show(option) for option in shape.options]
    return [shape.expected]


def _fits(shape: Shape, node: Node) -> bool:
    if isinstance(shape, Checked):
        return _fits(shape.inner, node)
    if not isinstance(shape, Leaf | Word):
        return isinstance(shape, Anything)
    try:
        shape.take(node)
    except Refused:
        return False
    return True
