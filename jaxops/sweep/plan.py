"""The plan of a sweep: every point resolved and checked before anything starts, with an id by what it will do."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxops.config.dump import digest
from jaxops.config.errors import ConfigError, Problem, show
from jaxops.config.load import Loaded, load_trees
from jaxops.config.merge import beneath, merge_all
from jaxops.config.node import Node, plain_node
from jaxops.config.schema import record_of
from jaxops.core import stores
from jaxops.core.failures import UserError, nearest
from jaxops.core.home import expand_home
from jaxops.core.metric import Metric
from jaxops.run.family import SCHEMAS
from jaxops.run.folder.listing import MARKS, is_run
from jaxops.sweep.sources import SweepSource, read_source
from jaxops.sweep.space import OURS, Assignment, expand, multiply
from jaxops.sweep.spec import InProcess, Local, SweepSpec, When

ID_LENGTH = 10
"""Hexadecimal digits of a run's id: among 20,000 points two are alike once in ten thousand sweeps, which is told."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      id: the digest of its resolved config, but for name and folder; the name of its run folder.
      values: the values that the sweep gave it, by dotted path.
      group: the digest without the seed too: points of one group differ in their seed alone.
      seed: its run.seed.
    """

    id: str
    values: dict[str, Any]
    group: str
    seed: int

    @property
    def label(self) -> str:
        """The point for people: `optimizer.lr=0.001, run.seed=0`."""
        return label_of_values(self.values)


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """A sweep that may start: all of its points are valid.

    Attributes:
      name: its name.
      folder: where its runs go, each in a folder named by its id.
      metric: what the runs are judged by, on validation.
      points: the points, in the order in which they start.
      runner: how they are run.
      configs: the resolved config of each point, by id; empty where the plan was read from a sweep's folder.
    """

    name: str
    folder: Path
    metric: Metric
    points: list[Point]
    runner: Local | InProcess = Local()
    configs: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def swept(self) -> list[str]:
        """The dotted paths that any point has a value for."""
        return list(dict.fromkeys(path for point in self.points for path in point.values))


def label_of_values(values: Mapping[str, Any]) -> str:
    """Returns values by path as one would type them: `optimizer.lr=0.001, run.seed=0`."""
    return ", ".join(f"{path}={_typed(value)}" for path, value in values.items()) or "the base as it is"


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else show(value)


def make_plan(path: str, overrides: Sequence[str] = ()) -> SweepPlan:
    """Plans a sweep from its file, or from a run's config and overrides with several values (`run.seed=0..2`).

    Nothing is written, and no data are opened.

    Raises:
      UserError: the sweep or some of its points are wrong; everything is told at once, each thing once.
    """
    source = read_source(path, overrides)
    problems: list[Problem] = []
    merged = merge_all(record_of(SweepSpec), [source.sweep], source.own, problems)
    if problems:
        raise ConfigError(problems)
    spec = load_trees(SweepSpec, [merged]).config
    runs = merged.value["runs"] if "runs" in merged.value else Node({}, source.sweep.origin)
    assignments = multiply([expand(runs, spec.runs, problems), *source.axes], problems, "")
    _check_paths(source, assignments, problems)
    if problems:
        raise ConfigError(problems)
    if not any(assignments) and not spec.runs.when:
        raise UserError(
            f"{path}: nothing is swept. Give a path several values (jaxops sweep {path} optimizer.lr=1e-4,3e-4"
            " run.seed=0..2), or write `base: CONFIG` and `runs: {grid: ..., seeds: 3}` into a sweep file"
        )
    resolver = _Resolver(source, spec.runs.when, runs)
    found = resolver.all(assignments)
    metric = _metric(spec.metric, found)
    return _plan(source, spec, metric, found)


def _check_paths(source: SweepSource, assignments: Sequence[Assignment], problems: list[Problem]) -> None:
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


class _Resolver:
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
            if absent := [path for path in part.if_ if path not in met]:
                node = tree.value["if"].value[absent[0]]
                known = {path for _, loaded in found for path in loaded.origins}
                message = f"no point has {absent[0]}{nearest(absent[0], known)}"
                raise ConfigError([Problem("runs.when", node.origin, None, message)])
        return found

    def _all(self, assignments: Sequence[Assignment]) -> Iterator[tuple[Assignment, Loaded[Any] | ConfigError]]:
        for assignment in assignments:
            todo = [(assignment, 0)]
            while todo:
                now, start = todo.pop(0)
                loaded = self._load(now)
                place = next((i for i in range(start, len(self._parts)) if self._holds(i, now, loaded)), None)
                if place is None:
                    yield now, loaded
                    continue
                problems: list[Problem] = []
                path = f"runs.when.{place}"
                more = expand(self._trees[place], self._parts[place], problems, path)
                _check_paths(self._source, more, problems)
                grown = multiply([[now], more], problems, path)
                if problems:
                    raise ConfigError(problems)
                todo += [(one, place + 1) for one in grown]

    def _load(self, assignment: Assignment) -> Loaded[Any] | ConfigError:
        try:
            return load_trees(SCHEMAS, self._source.base, [*self._source.fixed, *_overrides(assignment)])
        except ConfigError as error:
            return error

    def _holds(self, place: int, assignment: Assignment, loaded: Loaded[Any] | ConfigError) -> bool:
        """Returns whether the condition of a part holds, by the resolved config or else by what was written."""
        if isinstance(loaded, Loaded):
            values: Any = loaded.resolved
        else:
            given = [*self._source.fixed, *_overrides(assignment)]
            values = plain_node(merge_all(None, self._source.base, given, []))  # type: ignore[arg-type]
        holds = True
        for path, wanted in self._parts[place].if_.items():
            there, value = _look_up(values, path)
            if there:
                self._met[place].add(path)
            holds &= there and value in (wanted if isinstance(wanted, list | tuple) else [wanted])
        return holds


def _overrides(assignment: Assignment) -> list[Node]:
    """Returns the trees of a point's values, whole sections before what is set inside of them."""
    paths = sorted(assignment, key=lambda path: path.count("."))
    return [beneath(path.split("."), assignment[path]) for path in paths]


def _look_up(values: Any, path: str) -> tuple[bool, Any]:
    """Returns whether there is a value at a dotted path, and the value."""
    for name in path.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return False, None
        values = values[name]
    return True, values


def _told(wrong: Sequence[tuple[Problem, Sequence[Assignment]]], count: int) -> str:
    """Returns a message with each problem once, and the points that have it."""
    lines = []
    for problem, points in wrong:
        which = "all points" if len(points) == count else f"{len(points)} of {count} points"
        first = label_of_values({path: plain_node(node) for path, node in points[0].items()})
        lines.append(f"  {problem} (in {which}, the first: {first})" if count > 1 else f"  {problem}")
    head = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
    return "\n".join([f"{head} in the points of the sweep; nothing was started:", *lines])


def _metric(name: str | None, found: Sequence[tuple[Assignment, Loaded[Any]]]) -> Metric:
    """Returns the metric that the runs are judged by.

    Raises:
      UserError: some runs do not measure it, it chooses nothing, or nothing says which it is.
    """
    if name is not None and name.startswith("test/"):
        raise UserError(f"metric: {name} would choose on the test data, which then say nothing of new data; use valid/")
    wanted = None if name is None else name.removeprefix("valid/")
    metrics: dict[str, Metric] = {}
    for assignment, loaded in found:
        config = loaded.config
        stop = config.evaluate.stop
        usable = [one for one, metric in config.metrics().items() if metric.chooses]
        mine = wanted or config.checkpoint.best or (stop.metric if stop else None) or next(iter(usable), None)
        point = label_of_values({path: plain_node(node) for path, node in assignment.items()})
        if mine is None:
            raise UserError(f"metric: evaluate.metrics has none that says which run is better ({point})")
        if mine not in usable:
            known = f"{nearest(mine, usable)} (those that can choose: {', '.join(usable) or 'none'}; {point})"
            raise UserError(f"metric: {mine!r} is not in evaluate.metrics, or has no better direction{known}")
        metrics[mine] = config.metric(mine)
    if len(metrics) > 1:
        raise UserError(f"metric: the points are judged by different metrics ({', '.join(metrics)}); name one")
    return next(iter(metrics.values()))


def _plan(
    source: SweepSource, spec: SweepSpec, metric: Metric, found: Sequence[tuple[Assignment, Loaded[Any]]]
) -> SweepPlan:
    name = spec.name or source.name
    folder = spec.dir or found[0][1].config.run.dir
    if stores.is_url(folder):
        raise UserError(f"dir: a sweep keeps its runs in a local folder, not in {folder}; set dir=FOLDER")
    place = Path(expand_home(folder)) / name
    if place.is_dir() and is_run(place):
        raise UserError(f"{place} is a run (it has one of {', '.join(MARKS)}), not a sweep; set name=NAME")
    points, configs, taken = [], dict[str, dict[str, Any]](), dict[str, Point]()
    for assignment, loaded in found:
        values = {path: plain_node(node) for path, node in assignment.items()}
        resolved = copy.deepcopy(loaded.resolved)
        point = Point(run_id(resolved), values, group_id(resolved), resolved["run"]["seed"])
        if point.id in taken:
            raise UserError(
                f"the same point twice: {point.label} and {taken[point.id].label} resolve to one config; nothing was"
                " started"
            )
        taken[point.id] = point
        resolved["run"] |= {"name": point.id, "dir": str(place)}
        points.append(point)
        configs[point.id] = resolved
    return SweepPlan(name, place, metric, points, spec.runner, configs)


def run_id(resolved: Mapping[str, Any]) -> str:
    """Returns the id of a run: a digest of its resolved config, whatever its name, folder and order of keys."""
    return _digest_without(resolved, ("name", "dir"))


def group_id(resolved: Mapping[str, Any]) -> str:
    """Returns the id that a run shares with those that differ from it in their seed alone."""
    return _digest_without(resolved, ("name", "dir", "seed"))


def _digest_without(resolved: Mapping[str, Any], names: Sequence[str]) -> str:
    run = {name: value for name, value in resolved["run"].items() if name not in names}
    return digest({**resolved, "run": run})[:ID_LENGTH]
