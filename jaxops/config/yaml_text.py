"""Parses YAML into nodes that know their line, with the scalars of YAML 1.2: `1e-4` is a number and `no` a word.

PyYAML follows YAML 1.1, where `1e-4` is a string, `on` is true, `1:30` is 90 and a date is an object. Here null, true,
false, integers (decimal, 0x, 0o, 0b; underscores allowed) and floats are special, and everything else is text.
"""

import contextlib
import re
from typing import Any

import yaml

from jaxops.config.errors import ConfigError, Problem
from jaxops.config.node import BROKEN, Node, join_path

_INT = r"[-+]?(?:0|[1-9](?:_?[0-9])*|0x[0-9a-fA-F](?:_?[0-9a-fA-F])*|0o[0-7]+|0b[01]+)"
_DIGITS = r"(?:0|[1-9](?:_?[0-9])*)"
_EXPONENT = r"[eE][-+]?[0-9]+"
_FLOAT = (
    rf"[-+]?(?:{_DIGITS}\.[0-9]*(?:{_EXPONENT})?|\.[0-9]+(?:{_EXPONENT})?|{_DIGITS}{_EXPONENT})"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
MAX_BYTES, MAX_DEPTH, MAX_VALUES = 1 << 20, 100, 100_000
"""Of one file. A file of 300 bytes can ask for a thousand million values by its aliases."""
_TAG = "tag:yaml.org,2002:"
_RESOLVERS = {
    _TAG + "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    _TAG + "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    _TAG + "int": (_INT, list("-+0123456789")),
    _TAG + "float": (_FLOAT, list("-+.0123456789")),
}


class YamlLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars; it composes nodes only, and never constructs objects."""

    yaml_implicit_resolvers: dict = {}
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        try:
            if self._depth > MAX_DEPTH:
                mark = self.peek_event().start_mark
                raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark)
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


for _tag, (_pattern, _first) in _RESOLVERS.items():
    YamlLoader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a string wherever this reader, or one of YAML 1.1, would read something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, (_pattern, _first) in _RESOLVERS.items():
    Dumper.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


def scalar_of(text: str) -> Any:
    """Returns the value of an unquoted scalar: `5` is an int, `1e-4` a float, `null` None, anything else a string."""
    for tag, (pattern, _) in _RESOLVERS.items():
        if re.fullmatch(pattern, text):
            with contextlib.suppress(ValueError):  # an integer of too many digits
                return _construct(tag, text)
    return text


def _construct(tag: str, text: str) -> Any:
    kind = tag.removeprefix(_TAG)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0)
    if kind == "float":
        word = text.lower().lstrip("+-")
        number = float(word[1:] if word in (".inf", ".nan") else word)
        return -number if text.startswith("-") else number
    return text


def parse_yaml(text: str, name: str, *, lines: bool = True) -> Node:
    """Reads one YAML document; an empty one is null.

    With `lines` each origin is "name:line". Without, it is `name` unchanged (an override), and unquoted scalars keep
    their text.

    Raises:
      ConfigError: not YAML, a key twice in one mapping, a key that is no scalar, an unknown tag; more bytes, depth or
        values than a configuration has.
    """
    if len(text) > MAX_BYTES:
        message = f"too long for a configuration: {len(text):,} bytes (at most {MAX_BYTES:,})"
        raise ConfigError([Problem("", name, None, message)])
    loader = None
    try:
        loader = YamlLoader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark and lines else name
        raise ConfigError([Problem("", where, None, _syntax(error))]) from None
    except yaml.YAMLError as error:
        raise ConfigError([Problem("", name, None, f"not YAML: {' '.join(str(error).split())}")]) from None
    finally:
        if loader is not None:
            loader.dispose()
    converter = _Converter(name, lines)
    node = Node(None, name) if root is None else converter.convert(root, "", converter.origin(root))
    if converter.problems:
        raise ConfigError(converter.problems)
    return node


def _syntax(error: yaml.MarkedYAMLError) -> str:
    said = " ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in said:
        return "not YAML: YAML is indented with spaces, there is a tab here"
    if "expected a single document" in said:
        return "not one YAML document: a second one starts here"
    return f"not YAML: {said}"


class _Converter:
    """Converts PyYAML's nodes to ours, and collects problems so that all duplicates are reported at once."""

    def __init__(self, name: str, lines: bool):
        self.name, self.lines, self.problems = name, lines, list[Problem]()
        self.open: set[int] = set()
        self.values = 0

    def origin(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.lines else self.name

    def convert(self, node: yaml.Node, path: str, origin: str) -> Node:
        self.values += 1
        if self.values > MAX_VALUES:
            message = f"more than {MAX_VALUES:,} values, those that aliases (*) repeat among them"
            raise ConfigError([Problem(path, origin, None, message)])
        if id(node) in self.open:
            return self._wrong(path, origin, "an alias (*) inside the very thing that its anchor (&) names")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path, origin)
            if isinstance(node, yaml.SequenceNode):
                entries = [
                    self.convert(entry, join_path(path, i), self.origin(entry)) for i, entry in enumerate(node.value)
                ]
                return Node(entries, origin)
            assert isinstance(node, yaml.ScalarNode)
            return self._scalar(node, path, origin)
        finally:
            self.open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: str, origin: str) -> Node:
        entries: dict[str, Node] = {}
        for key, value in node.value:
            where = self.origin(key)
            if not isinstance(key, yaml.ScalarNode):
                self._wrong(path, where, "a key must be a single word or number")
            elif strange := STRANGE.search(key.value):
                self._wrong(path, where, f"a key with a character that no configuration needs: {strange[0]!a}")
            elif key.value == "<<" and key.style is None:
                self._wrong(path, where, "merge keys (<<) are not read; name other files in 'base:'")
            elif key.value in entries:
                first = entries[key.value].origin
                self._wrong(join_path(path, key.value), where, f"the same key twice in one mapping, first at {first}")
            else:
                entries[key.value] = self.convert(value, join_path(path, key.value), where)
        return Node(entries, origin)

    def _scalar(self, node: yaml.ScalarNode, path: str, origin: str) -> Node:
        if not node.tag.startswith(_TAG) or node.tag.removeprefix(_TAG) not in ("str", *_KINDS):
            return self._wrong(path, origin, f"unknown YAML tag {node.tag.replace(_TAG, '!!')!r}")
        if strange := STRANGE.search(node.value):
            return self._wrong(path, origin, f"a character that no configuration needs: {strange[0]!a}")
        unquoted = node.style is None
        text = node.value if unquoted and (not self.lines or "${env" in node.value) else None
        try:
            return Node(_construct(node.tag, node.value), origin, text)
        except ValueError:
            return self._wrong(path, origin, f"{node.value!r} is not what its tag says")

    def _wrong(self, path: str, origin: str, message: str) -> Node:
        self.problems.append(Problem(path, origin, None, message))
        return Node(BROKEN, origin)


STRANGE = re.compile("[\\x00\\ud800-\\udfff]")
"""NUL and halves of characters, which no path, file or terminal takes."""
_KINDS = tuple(tag.removeprefix(_TAG) for tag in _RESOLVERS)
