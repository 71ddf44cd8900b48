"""The plan of a sweep: every point resolved and checked before anything starts, with an id by what it will do."""

import dataclasses
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

from jaxops.config.errors import ConfigError, Problem
from jaxops.config.load import Loaded, load_trees
from jaxops.config.merge import merge_all
from jaxops.config.node import Node, plain_node
from jaxops.config.schema import record_of
from jaxops.core import stores
from jaxops.core.failures import UserError, nearest
from jaxops.core.home import expand_home
from jaxops.core.metric import Metric
from jaxops.run.folder.listing import MARKS, is_run
from jaxops.sweep.points import Point, config_of, label_of_values, point_of
from jaxops.sweep.resolve import Resolver, check_paths
from jaxops.sweep.search.space import SearchSpace
from jaxops.sweep.search.spec import Search
from jaxops.sweep.sources import SweepSource, read_source
from jaxops.sweep.space import Assignment, expand, multiply
from jaxops.sweep.spec import Local, RunnerSpec, Runs, SweepSpec


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
      space: of a search, which adds the points; None of other sweeps, and where the plan was read from a folder.
      trials: how many trials a search is to have; None of other sweeps.
      proposed: how many it has proposed, which is more than its points where some had a config of others.
    """

    name: str
    folder: Path
    metric: Metric
    points: list[Point]
    runner: RunnerSpec = Local()
    configs: MutableMapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    space: SearchSpace | None = None
    trials: int | None = None
    proposed: int = 0

    @property
    def swept(self) -> list[str]:
        """The dotted paths that any point has a value for."""
        return list(dict.fromkeys(path for point in self.points for path in point.values))


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
    if spec.set:
        source = source.with_values(merged.value["set"].value)
    if spec.search is not None:
        return _plan_search(source, spec, spec.search, merged)
    runs = merged.value["runs"] if "runs" in merged.value else Node({}, source.sweep.origin)
    assignments = multiply([expand(runs, spec.runs, problems), *source.axes], problems, "")
    check_paths(source, assignments, problems)
    if problems:
        raise ConfigError(problems)
    if not any(assignments) and not spec.runs.when:
        raise UserError(
            f"{path}: nothing is swept. Give a path several values (jaxops sweep {path} optimizer.lr=1e-4,3e-4"
            " run.seed=0..2), or write `base: CONFIG` and `runs: {grid: ..., seeds: 3}` into a sweep file"
        )
    found = Resolver(source, spec.runs.when, runs).all(assignments)
    metric = _metric(spec.metric, found)
    place = _place(source, spec, found)
    points, configs, taken = [], dict[str, dict[str, Any]](), dict[str, Point]()
    for assignment, loaded in found:
        point = point_of(assignment, loaded.resolved)
        if point.id in taken:
            raise UserError(
                f"the same point twice: {point.label} and {taken[point.id].label} resolve to one config; nothing was"
                " started"
            )
        taken[point.id] = point
        points.append(point)
        configs[point.id] = config_of(point, loaded.resolved, place)
    return SweepPlan(place.name, place, metric, points, spec.runner, configs)


def _plan_search(source: SweepSource, spec: SweepSpec, search: Search, merged: Node) -> SweepPlan:
    """Returns the plan of a search: without points, which come one after the other."""
    if source.axes or spec.runs != Runs():
        raise UserError(
            "search: a sweep has `search` or `runs` (or overrides with several values), not both. Values of a grid"
            " become search.values {kind: choice, of: [...]}; seeds are for the best trials, when the search is done"
        )
    space = SearchSpace(source, search, merged.value["search"])
    found = space.checked()
    place = _place(source, spec, found)
    return SweepPlan(place.name, place, _metric(spec.metric, found), [], spec.runner, {}, space, search.trials)


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


def _place(source: SweepSource, spec: SweepSpec, found: Sequence[tuple[Assignment, Loaded[Any]]]) -> Path:
    """Returns the folder of a sweep.

    Raises:
      UserError: it is in an object store, or a run.
    """
    folder = spec.dir or found[0][1].config.run.dir
    if stores.is_url(folder):
        raise UserError(f"dir: a sweep keeps its runs in a local folder, not in {folder}; set dir=FOLDER")
    place = Path(expand_home(folder)) / (spec.name or source.name)
    if place.is_dir() and is_run(place):
        raise UserError(f"{place} is a run (it has one of {', '.join(MARKS)}), not a sweep; set name=NAME")
    return place
