"""How the values of points become valid configs, and how what is wrong with any of them is told once."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jaxops.config.errors import ConfigError, Problem
from jaxops.config.load import Loaded, load_trees
from jaxops.config.merge import merge_all
from jaxops.config.node import Node, plain_node
from jaxops.core.failures import UserError, nearest
from jaxops.run.family import SCHEMAS
from jaxops.sweep.points import label_of_values
from jaxops.sweep.sources import SweepSource
from jaxops.sweep.space import OURS, Assignment, expand, look_up, multiply, overrides_of
from jaxops.sweep.spec import When


def check_paths(source: SweepSource, assignments: Sequence[Assignment], problems: list[Problem]) -> None:
    """Adds what is wrong with the swept paths themselves."""
    swept = {path: node for assignment in assignments[:1] for path, node in assignment.items()}
    for path, node in swept.items():
        if path in OURS:
            problems.append(Problem(path, node.origin, None, f"a sweep sets it itself; set {OURS[path]}"))
        if not all(path.split(".")):
            problems.append(Problem(path, node.origin, None, "expected a dotted path of the base config"))
    for path, node in source.fixed_paths.items():
        if path == "run.name":
            problems.append(Problem(path, node.origin, None, "a sweep names its runs itself; set name=NAME"))
        if path in swept:
            problems.append(Problem(path, node.origin, None, f"it is swept already, at {swept[path].origin}"))


class Resolver:
    """Turns assignments into valid configs, and gathers what is wrong with any of them."""

    def __init__(self, source: SweepSource, parts: Sequence[When], runs: Node) -> None:
        self._source, self._parts = source, parts
        self._trees = runs.value["when"].value if parts else []
        self._met = [set[str]() for _ in parts]
        """The paths of each part's condition that some point has."""

    def all(self, assignments: Sequence[Assignment]) -> list[tuple[Assignment, Loaded[Any]]]:
        """Returns the points with their configs.

        Raises:
          UserError: some are wrong; a problem of many points is told once.
        """
        found: list[tuple[Assignment, Loaded[Any]]] = []
        wrong: dict[tuple[str, str, str], tuple[Problem, list[Assignment]]] = {}
        count = 0
        for assignment, loaded in self._all(assignments):
            count += 1
            if isinstance(loaded, Loaded):
                found.append((assignment, loaded))
                continue
            for problem in loaded.problems:
                key = (problem.path, problem.origin, problem.message)
                wrong.setdefault(key, (problem, []))[1].append(assignment)
        if wrong:
            raise UserError(_told(list(wrong.values()), count))
        for part, tree, met in zip(self._parts, self._trees, self._met, strict=True):
            require_met(part.if_, tree, met, found, "runs.when")
        return found

    def _all(self, assignments: Sequence[Assignment]) -> Iterator[tuple[Assignment, Loaded[Any] | ConfigError]]:
        for assignment in assignments:
            todo = [(assignment, 0)]
            while todo:
                now, start = todo.pop(0)
                loaded = self.load(now)
                place = next((i for i in range(start, len(self._parts)) if self._holds(i, now, loaded)), None)
                if place is None:
                    yield now, loaded
                    continue
                problems: list[Problem] = []
                path = f"runs.when.{place}"
                more = expand(self._trees[place], self._parts[place], problems, path)
                check_paths(self._source, more, problems)
                grown = multiply([[now], more], problems, path)
                if problems:
                    raise ConfigError(problems)
                todo += [(one, place + 1) for one in grown]

    def load(self, assignment: Assignment) -> Loaded[Any] | ConfigError:
        """Returns the config of a point, or what is wrong with it."""
        try:
            return load_trees(SCHEMAS, self._source.base, [*self._source.fixed, *overrides_of(assignment)])
        except ConfigError as error:
            return error

    def _holds(self, place: int, assignment: Assignment, loaded: Loaded[Any] | ConfigError) -> bool:
        holds, known = self.holds(self._parts[place].if_, assignment, loaded)
        self._met[place] |= known
        return holds

    def holds(
        self, condition: Mapping[str, Any], assignment: Assignment, loaded: Loaded[Any] | ConfigError
    ) -> tuple[bool, set[str]]:
        """Returns whether a condition holds, and those of its paths that the point has.

        It is looked up in the resolved config, or else in what was written.
        """
        if isinstance(loaded, Loaded):
            values: Any = loaded.resolved
        else:
            given = [*self._source.fixed, *overrides_of(assignment)]
            values = plain_node(merge_all(None, self._source.base, given, []))  # type: ignore[arg-type]
        holds, known = True, set[str]()
        for path, wanted in condition.items():
            there, value = look_up(values, path)
            if there:
                known.add(path)
            holds &= there and value in (wanted if isinstance(wanted, list | tuple) else [wanted])
        return holds, known


def require_met(
    condition: Mapping[str, Any],
    tree: Node,
    met: Collection[str],
    found: Sequence[tuple[Assignment, Loaded[Any]]],
    where: str,
) -> None:
    """Checks that each path of a condition is one that some point has.

    Args:
      condition: the values by path.
      tree: the part that has it, as it was written.
      met: the paths that were found.
      found: the points.
      where: the dotted path of such parts in the sweep file.

    Raises:
      ConfigError: one is not.
    """
    if absent := [path for path in condition if path not in met]:
        known = {path for _, loaded in found for path in loaded.origins}
        message = f"no point has {absent[0]}{nearest(absent[0], known)}"
        raise ConfigError([Problem(where, tree.value["if"].value[absent[0]].origin, None, message)])


def _told(wrong: Sequence[tuple[Problem, Sequence[Assignment]]], count: int) -> str:
    """Returns a message with each problem once, and the points that have it."""
    lines = []
    for problem, points in wrong:
        which = "all points" if len(points) == count else f"{len(points)} of {count} points"
        first = label_of_values({path: plain_node(node) for path, node in points[0].items()})
        lines.append(f"  {problem} (in {which}, the first: {first})" if count > 1 else f"  {problem}")
    head = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
    return "\n".join([f"{head} in the points of the sweep; nothing was started:", *lines])
