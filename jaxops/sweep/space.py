"""The points of a sweep file, as values by dotted path: grid, zip, draws and seeds multiplied."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from jaxops.config.errors import Problem, show
from jaxops.config.merge import beneath
from jaxops.config.node import BROKEN, Node, join_path, node_of
from jaxops.sweep.spec import MAX_POINTS, RandomDraws, Runs, When

Assignment = dict[str, Node]
"""The values of one point, by dotted path of the base config; each knows the line it was written in."""

SEED = "run.seed"
OURS = {"run.name": "the id of each run", "run.dir": "`dir` and `name` of the sweep"}
"""Paths that a sweep sets itself, and what says them instead."""
_RANGE = re.compile(r"[-+.\deE]*\.\.[-+.\deE]*")
_WHOLE = re.compile(r"([-+]?\d+)\.\.([-+]?\d+)")


def expand(tree: Node, runs: Runs | When, problems: list[Problem], path: str = "runs") -> list[Assignment]:
    """Returns the points of a part of a sweep: the product of its grid, zip, draws and seeds.

    Args:
      tree: the part as it was written, which knows lines.
      runs: the same, validated.
      problems: receives what is wrong.
      path: dotted path of the part in the sweep file.
    """
    axes = [
        [{name: value} for value in values] for name, values in _lists(tree, "grid", problems, path).items() if values
    ]
    axes += _zipped(tree, problems, path)
    if runs.random is not None:
        axes.append(_drawn(tree.value["random"], runs.random))
    if isinstance(runs, Runs) and runs.seeds is not None:
        given = tree.value["seeds"]
        seeds = list(range(runs.seeds)) if isinstance(runs.seeds, int) else list(runs.seeds)
        if not seeds:
            problems.append(Problem(f"{path}.seeds", given.origin, None, "an empty list: nothing would run"))
        axes.append([{SEED: Node(seed, given.origin)} for seed in seeds])
    return multiply(axes, problems, path)


def multiply(axes: Sequence[Sequence[Assignment]], problems: list[Problem], path: str) -> list[Assignment]:
    """Returns every combination of the entries of some axes.

    Args:
      axes: each a list of values by dotted path.
      problems: receives an error where two axes set one path, or there are too many combinations.
      path: dotted path of the part that they are of.
    """
    seen: dict[str, Node] = {}
    for axis in axes:
        for name, node in (axis[0] if axis else {}).items():
            if name in seen:
                message = f"given twice: here and at {seen[name].origin}"
                problems.append(Problem(join_path(path, name), node.origin, None, message))
            seen[name] = node
    if (count := math.prod(len(axis) for axis in axes)) > MAX_POINTS:
        message = f"{count:,} points: a sweep has {MAX_POINTS:,} at most; draw some of them (random)"
        problems.append(Problem(path, "", None, message))
        return []
    return [{name: node for part in parts for name, node in part.items()} for parts in itertools.product(*axes)]


def values_of(node: Node, path: str, problems: list[Problem]) -> list[Node]:
    """Returns the values of a swept path: the entries of a list, or of a range of whole numbers such as `0..4`."""
    if isinstance(node.value, list):
        if not node.value:
            problems.append(Problem(path, node.origin, None, "an empty list: nothing would run"))
        return node.value
    if is_range(node.value):
        whole = _WHOLE.fullmatch(node.value)
        if whole is not None and int(whole[1]) <= int(whole[2]) < int(whole[1]) + MAX_POINTS:
            return [Node(value, node.origin) for value in range(int(whole[1]), int(whole[2]) + 1)]
        message = (
            "a range is two whole numbers, the lower first, both included, such as 0..4 (at most"
            f" {MAX_POINTS:,} of them); got {show(node)}"
        )
    elif node.value is BROKEN:
        return []
    else:
        message = f"expected a list of values, or a range such as 0..4, got {show(node)}"
    problems.append(Problem(path, node.origin, None, message))
    return []


def is_range(value: object) -> bool:
    """Returns whether a value is written like a range of numbers, rightly or wrongly; `../data` is none."""
    return isinstance(value, str) and _RANGE.fullmatch(value) is not None and any(c.isdigit() for c in value)


def overrides_of(assignment: Assignment) -> list[Node]:
    """Returns the trees of a point's values, whole sections before what is set inside of them."""
    paths = sorted(assignment, key=lambda path: path.count("."))
    return [beneath(path.split("."), assignment[path]) for path in paths]


def look_up(values: Any, path: str) -> tuple[bool, Any]:
    """Returns whether there is a value at a dotted path, and the value."""
    for name in path.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return False, None
        values = values[name]
    return True, values


def _lists(tree: Node, name: str, problems: list[Problem], path: str) -> dict[str, list[Node]]:
    """Returns the values by path of `grid` or `zip`."""
    given: Mapping[str, Node] = tree.value[name].value if name in tree.value else {}
    return {key: values_of(node, f"{path}.{name}.{key}", problems) for key, node in (given or {}).items()}


def _zipped(tree: Node, problems: list[Problem], path: str) -> list[list[Assignment]]:
    lists = _lists(tree, "zip", problems, path)
    if not lists:
        return []
    lengths = {name: len(values) for name, values in lists.items()}
    if len({*lengths.values()}) > 1:
        if 0 not in lengths.values():  # an empty list has been told
            told = ", ".join(f"{name} {length}" for name, length in lengths.items())
            message = f"its lists are walked together and need one length; they have {told}"
            problems.append(Problem(f"{path}.zip", tree.value["zip"].origin, None, message))
        return []
    return [[dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]]


def _drawn(tree: Node, draws: RandomDraws) -> list[Assignment]:
    origins = {path: node.origin for path, node in tree.value["values"].value.items()}
    return [
        {
            path: node_of(kind.draw(Random(f"{draws.seed}/{path}/{number}")), origins[path])
            for path, kind in draws.values.items()
        }
        for number in range(draws.count)
    ]
