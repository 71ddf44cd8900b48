"""The tree that a configuration is read into: plain values, each of which keeps its origin."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A value read from YAML, with its origin.

    Attributes:
      value: a dict of str to Node, a list of Nodes, or a scalar.
      origin: "file.yaml:12", "override 'a.b=3'" or another name of the source.
      text: spelling of an unquoted scalar that came through the shell (an override, the environment), where quoting is
        awkward; a string field takes it unchanged.
      implied: True for a mapping that nobody wrote: the `{model: {` around an override of `model.kind`.
      whole: True for a mapping that has every entry it is to have: it is not merged with an earlier one.
    """

    value: Any
    origin: str
    text: str | None = None
    implied: bool = False
    whole: bool = False


BROKEN = object()
"""The value of a node whose problem has already been reported."""


def plain_node(node: Node) -> Any:
    """Returns the value without origins: nested dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {key: plain_node(entry) for key, entry in node.value.items()}
    if isinstance(node.value, list):
        return [plain_node(entry) for entry in node.value]
    return node.value


def node_of(value: Any, origin: str) -> Node:
    """Wraps nested plain values (mappings, lists or tuples, scalars) in nodes that all have the same origin."""
    if isinstance(value, Mapping):
        return Node({str(key): node_of(entry, origin) for key, entry in value.items()}, origin)
    if isinstance(value, list | tuple):
        return Node([node_of(entry, origin) for entry in value], origin)
    return Node(value, origin)


def join_path(path: str, key: str | int) -> str:
    """Joins `a.b` and `c` to `a.b.c`; list entries are numbered from 0."""
    return f"{path}.{key}" if path else str(key)
