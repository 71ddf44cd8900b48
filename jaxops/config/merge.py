"""Merges trees: the later value wins, mapping by mapping, and a mapping of another `kind` replaces the earlier one."""

from collections.abc import Sequence
from typing import Any

from jaxops.config.errors import ConfigError, Problem, show
from jaxops.config.node import Node, join_path, plain_node
from jaxops.config.shapes import ABSENT, Anything, Call, Checked, Choice, Entries, Record, Shape
from jaxops.config.yaml_text import parse_yaml


def merge_nodes(
    shape: Shape | None, old: Node, new: Node, problems: list[Problem], path: str = "", default: Any = ABSENT
) -> Node:
    """Merges `new` over `old`: mappings entry by entry, everything else whole.

    A mapping whose `kind` or `fn` differs from the old one's replaces it whole, and so does a list.

    Args:
      shape: the schema, by which a word may be short for a mapping (`adamw` for `{kind: adamw}`); None without a
        schema.
      old: the earlier tree.
      new: the later tree.
      problems: receives an error for each override beneath a scalar or a list.
      path: dotted path of both trees.
      default: default of the field, whose kind holds where none is written.
    """
    if new.whole:
        return new
    while isinstance(shape, Checked):
        shape = shape.inner
    if isinstance(shape, Choice):
        old, new = shape.spelled_out(old), shape.spelled_out(new)
    if not (isinstance(old.value, dict) and isinstance(new.value, dict)):
        if not new.implied or old.value is None:
            return new
        problems.append(_beneath(path, old, new))
        return old
    # Overrides such as model.layers=3 and model.kind=hstu may come in any order; the files' kind is not yet known.
    known = ABSENT if old.implied else default
    if _another_kind(shape, old.value, new.value, known) and not (old.implied and new.implied):
        _say_what_goes(shape, old, new, problems, path)
        return new
    entries = dict(old.value)
    if isinstance(shape, Record) and not (old.implied and new.implied):
        _make_way(shape, entries, new, problems, path)
    for key, entry in new.value.items():
        child, fallback = _child(shape, {**old.value, **new.value}, key, default)
        entries[key] = (
            merge_nodes(child, entries[key], entry, problems, join_path(path, key), fallback)
            if key in entries
            else entry
        )
    origin = old.origin if new.implied else new.origin
    return Node(entries, origin, implied=old.implied and new.implied, whole=old.whole)


class Replaced(Problem):
    """A notice, not an error: another field of the same record, written later, replaces this value."""

    def __str__(self) -> str:
        return f"{self.path} [{self.origin}] {self.message}"


def _make_way(shape: Record, entries: dict[str, Node], new: Node, problems: list[Problem], path: str) -> None:
    """Removes fields that exclude each other (`alternatives` of a schema), except the one written later, with a notice.

    Where one tree gives several of them, all stay. That is a contradiction, which the schema's own check refuses.
    """
    for group in getattr(shape.cls, "alternatives", ()):
        given = [key for key in group if key in new.value and new.value[key].value is not None]
        if len(given) != 1:
            continue
        for key in group:
            if key != given[0] and key in entries and key not in new.value and entries[key].value is not None:
                gone, later = entries.pop(key), new.value[given[0]]
                message = f"takes the place of {join_path(path, key)}={show(gone)} [{gone.origin}]"
                where = f"{join_path(path, given[0])}={show(later)}"
                problems.append(Replaced(where, later.origin, plain_node(later), message))


def _say_what_goes(shape: Shape | None, old: Node, new: Node, problems: list[Problem], path: str) -> None:
    """Notices that an override such as `model.weights=DIR` takes the place of all that was written of another kind.

    Whoever writes `kind` knows that.
    """
    tag = shape.tag(new.value) if isinstance(shape, Choice) else None
    if tag is None or tag[0] in ("kind", "fn") or not new.implied or not old.value:
        return
    later = new.value[tag[0]]
    message = f"takes the place of {', '.join(join_path(path, key) for key in old.value)} [{old.origin}]"
    problems.append(Replaced(f"{join_path(path, tag[0])}={show(later)}", later.origin, plain_node(later), message))


def _beneath(path: str, old: Node, new: Node) -> Problem:
    what = "a list: override it whole" if isinstance(old.value, list) else "a single value"
    below = join_path(path, next(iter(new.value)))
    return Problem(below, new.origin, plain_node(new), f"'{path}' is {show(old)} [{old.origin}], {what}")


def _another_kind(shape: Shape | None, old: dict[str, Node], new: dict[str, Node], default: Any) -> bool:
    if isinstance(shape, Choice):
        before, after = shape.tag(old, default), shape.tag(new)
        return before is not None and after is not None and before != after
    if isinstance(shape, Anything):  # The user's own keywords have no schema, but follow the same rule.
        return any(key in old and key in new and old[key].value != new[key].value for key in ("kind", "fn"))
    return False


def _child(shape: Shape | None, entries: dict[str, Node], key: str, default: Any) -> tuple[Shape | None, Any]:
    """Returns the shape beneath `key` and the default that it has there."""
    if isinstance(shape, Choice):
        member = shape.member(entries, default)
        if member is not None:
            return _child(member, entries, key, default)
        # Only another file names the kind: any member that has this key will do.
        members = [*shape.tagged.values(), *shape.others]
        found = (_child(other, entries, key, ABSENT) for other in members)
        return next((child for child in found if child[0]), (None, ABSENT))
    if isinstance(shape, Record) and key in shape.fields:
        field = shape.fields[key]
        return field.shape, field.default(default if type(default) is shape.cls else ABSENT)
    if isinstance(shape, Entries):
        return shape.value, ABSENT
    return (Anything() if isinstance(shape, Anything | Call) else None), ABSENT


def parse_overrides(overrides: Sequence[str]) -> list[Node]:
    """Parses each `a.b=3` into a tree of its own, with the value read as YAML.

    Raises:
      ConfigError: overrides have no `=`, an empty name in the path, or a value that is not YAML; all are reported at
        once.
    """
    trees, problems = list[Node](), list[Problem]()
    for override in overrides:
        try:
            trees.append(_override(override))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return trees


def merge_all(shape: Shape, trees: Sequence[Node], overrides: Sequence[Node], problems: list[Problem]) -> Node:
    """Merges files in their order, then the overrides, which are merged among themselves first.

    Args:
      shape: the schema.
      trees: the files' trees.
      overrides: a tree for each override.
      problems: receives the errors.
    """
    command_line = Node({}, "the command line", implied=True)
    for tree in overrides:
        command_line = merge_nodes(shape, command_line, tree, problems)
    merged = Node({}, "nothing given")
    for tree in [*trees, command_line]:
        merged = merge_nodes(shape, merged, tree, problems)
    return merged


def _override(override: str) -> Node:
    path, equals, text = override.partition("=")
    origin = f"override '{override}'"
    names = path.strip().split(".")
    if not equals or not all(names):
        message = "an override is written dotted.path=VALUE" + ("" if equals else " (there is no '=')")
        raise ConfigError([Problem("", origin, None, message)])
    try:
        node = parse_yaml(text, origin, lines=False)
    except ConfigError as error:
        raise ConfigError(
            [Problem(join_path(path, p.path) if p.path else path, p.origin, p.value, p.message) for p in error.problems]
        ) from None
    return beneath(names, node)


def beneath(names: Sequence[str], node: Node) -> Node:
    """Returns the tree of an override: a node under mappings that nobody wrote."""
    for name in reversed(names):
        node = Node({name: node}, node.origin, implied=True)
    return node
