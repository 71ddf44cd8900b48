"""Leads a search: proposes points, follows their metric, decides which are pruned, and writes all of it down first.

The runs know nothing of it: their `metrics.jsonl` is read, and SIGTERM stops them as anybody's would.
Tested in tests/sweep/test_search_runs.py and, by kills, in tests/sweep/test_search_crashes.py.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from jaxops.config.dump import plain_of
from jaxops.config.errors import ConfigError
from jaxops.core.failures import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, UserError
from jaxops.core.metric import Metric
from jaxops.report.results import score
from jaxops.run.folder.run_folder import RunFolder
from jaxops.sweep.plan import SweepPlan
from jaxops.sweep.points import Point, config_of, point_of, run_id
from jaxops.sweep.records import PointEnd, SweepFolder
from jaxops.sweep.search.events import SearchEvent
from jaxops.sweep.search.journal import TrialJournal
from jaxops.sweep.search.space import SearchSpace
from jaxops.sweep.search.study import Study, Trial

LOOK = 1.0
"""Seconds between two looks at the metric of the points that run."""
_FIXED = ("kind", "seed", "values", "when", "first")
"""What a search that has begun keeps; the rest of its section may change."""


class SearchLead:
    """The leader of one search, in the process that holds its journal.

    Args:
      plan: the plan, which gets the points.
      space: the plan's.
      folder: the sweep's folder, which has begun.
      journal: the journal, which this process leads.
      say: it is called with each line that a person should read.

    Raises:
      UserError: the journal is that of another search, or the base has changed since.
    """

    def __init__(
        self,
        plan: SweepPlan,
        space: SearchSpace,
        folder: SweepFolder,
        journal: TrialJournal,
        say: Callable[[str], None],
    ) -> None:
        self._plan, self._space, self._folder, self._journal, self._say = plan, space, folder, journal, say
        self._study = Study(space.search, plan.metric, space.evaluations())
        self._tails: dict[str, MetricTail] = {}
        self._looked = 0.0
        self._again: list[int] = []
        events = journal.read()
        begun = {
            "search": {name: value for name, value in plain_of(space.search).items() if name in _FIXED},
            "metric": dataclasses.asdict(plan.metric),
        }
        if not events:
            journal.append(SearchEvent("begin", 0, begun))
        else:
            require_same_search(begun, events[0].fields, journal.where)
        self._study.replay(events)
        for trial in self._study.trials:
            self._adopt(trial)
        self._note_those_elsewhere()
        self._write_plan()

    def retry_failed(self) -> None:
        """Has the trials that failed tried again, each as a further trial with its values."""
        latest = {trial.point: trial for trial in self._study.trials if trial.point}
        self._again = [trial.number for trial in latest.values() if trial.state == "failed"]

    @property
    def left(self) -> int:
        """How many trials are to be proposed yet."""
        return max(0, self._space.search.trials - self._study.spent) + len(self._again)

    def unfinished(self) -> list[Point]:
        """Returns the points of trials that were asked and have not ended."""
        wanted = {trial.point for trial in self._study.running()}
        return [point for point in self._plan.points if point.id in wanted]

    def more(self) -> Point | None:
        """Returns the next point to run; None where all trials have been proposed."""
        while self._again:
            event = self._study.ask_again(self._again.pop(0))
            self._journal.append(event)
            return self._point(self._study.trials[event.trial])
        while self._study.spent < self._space.search.trials:
            event = self._study.ask(self._space.propose, self._id_of)
            self._journal.append(event)
            trial = self._study.trials[event.trial]
            same = [one for one in self._study.trials[: trial.number] if one.point == trial.point]
            if not trial.point:
                wrong = str(self._space.load(trial.values)).strip()
                self._say(f"trial {trial.number} is no valid run ({self._label(trial)}): {wrong}")
                self._tell(trial, "failed", reason=wrong, refused=True)
            elif same:
                self._say(f"trial {trial.number} is trial {same[-1].number} again ({trial.point}); it is not run twice")
                self._copy(same[-1], trial)
            else:
                self._adopt(trial)
                self._write_plan()
                return self._point(trial)
            self._write_plan()
        return None

    def watch(self, running: Collection[Point]) -> list[Point]:
        """Returns the points that run and are to be stopped, after a look at their metric now and then."""
        if time.monotonic() >= self._looked + LOOK:
            self._looked = time.monotonic()
            for point in running:
                self._follow(point, prune=True)
        return [point for point in running if self.pruned(point)]

    def pruned(self, point: Point) -> str:
        """Returns why it was decided to stop a point early; empty where it was not."""
        return next((trial.pruned for trial in self._of(point)), "")

    def ended(self, point: Point, ended: PointEnd) -> PointEnd:
        """Writes down how a point ended, and returns it: one that was to be stopped early and was is `pruned`."""
        self._follow(point, prune=False)
        reason = self.pruned(point)
        if reason and ended.status != 0 and not ended.failed:
            ended = PointEnd(ended.status, reason, pruned=True)
        if ended.status != 0:  # before the trial is told: whoever leads next looks at no point of one that was
            self._folder.record(point, ended)
        for trial in self._of(point):
            if ended.pruned:
                self._tell(trial, "pruned", reason=reason)
            elif ended.failed:
                self._tell(trial, "failed", reason=ended.reason, refused=ended.status == EXIT_USAGE)
            elif ended.status == 0:
                name = f"valid/{self._plan.metric.name}"
                value = RunFolder(self._folder.path / point.id).summary().get(name)
                if isinstance(value, int | float) and math.isfinite(value):
                    self._tell(trial, "complete", value=float(value))
                else:
                    self._tell(trial, "failed", reason=f"it measured no finite {name}")
        return ended

    @property
    def best(self) -> str:
        """The best trial so far, for people."""
        found = [trial for trial in self._study.trials if trial.value is not None]
        if not found:
            return ""
        sign = -1.0 if self._plan.metric.better == "higher" else 1.0
        first = min(found, key=lambda trial: sign * (trial.value or 0.0))
        return f"best so far {score(first.value or 0.0)}, trial {first.number}"

    def importance(self) -> list[tuple[str, float]]:
        """Returns the paths with their importance by Optuna's own evaluator, largest first."""
        return sorted(self._study.importance().items(), key=lambda one: -one[1])

    def _write_plan(self) -> None:
        self._folder.write_plan(dataclasses.replace(self._plan, proposed=self._study.spent))

    def _of(self, point: Point) -> list[Trial]:
        return [trial for trial in self._study.running() if trial.point == point.id]

    def _label(self, trial: Trial) -> str:
        return Point("", trial.values, "", 0).label

    def _point(self, trial: Trial) -> Point:
        return next(point for point in self._plan.points if point.id == trial.point)

    def _id_of(self, values: Any) -> str:
        loaded = self._space.load(values)
        return "" if isinstance(loaded, ConfigError) else run_id(loaded.resolved)

    def _adopt(self, trial: Trial) -> None:
        """Makes a trial a point of the plan, with the config that it has by the base as it is now.

        Raises:
          UserError: that is no longer the config that it was asked with.
        """
        if not trial.point or trial.point in self._plan.configs:
            return
        loaded = self._space.load(trial.values)
        if isinstance(loaded, ConfigError):
            raise UserError(f"{self._changed(trial)}, and trial {trial.number} is no valid run any more: {loaded}")
        point = point_of(self._space.assignment(trial.values), loaded.resolved)
        if point.id != trial.point:
            if not self._folder.is_same(trial.point, point):
                raise UserError(self._changed(trial))
            point = dataclasses.replace(point, id=trial.point)
        self._plan.points.append(point)
        self._plan.configs[point.id] = config = config_of(point, loaded.resolved, self._plan.folder)
        if not self._folder.config(point).exists():
            self._folder.write_config(point, config)

    def _note_those_elsewhere(self) -> None:
        """Records how trials ended whose run folders are not here: the journal has outlived a folder or a machine."""
        here = {point.id: point for point in self._plan.points}
        for trial in self._study.trials:
            point = here.get(trial.point)
            if point is None or trial.state is None or (self._folder.path / point.id).is_dir():
                continue
            reason = trial.reason or "its run folder is not here; the journal has its number"
            ends = {
                "complete": PointEnd(0, reason, value=trial.value),
                "pruned": PointEnd(EXIT_INTERRUPTED, reason, pruned=True),
                "failed": PointEnd(EXIT_FAILED, reason),
            }
            self._folder.record(point, ends[trial.state])

    def _changed(self, trial: Trial) -> str:
        return (
            f"{self._journal.where}: trial {trial.number} was asked with another base config, and trials of two bases"
            " cannot be compared; set name=NAME to begin another search, or take the change back"
        )

    def _follow(self, point: Point, *, prune: bool) -> None:
        """Reports what a point has measured since the last look, and decides whether it goes on."""
        trials = self._of(point)
        if not trials:
            return
        path = self._folder.path / point.id / "metrics.jsonl"
        tail = self._tails.setdefault(point.id, MetricTail(path, f"valid/{self._plan.metric.name}"))
        found = list(tail.new())
        for trial in trials:
            last = trial.reports[-1][0] if trial.reports else -1
            for step, value in found:
                if step <= last:
                    continue
                event = SearchEvent("report", trial.number, {"step": step, "value": value})
                self._journal.append(event, durable=False)  # it can be read again where the run wrote it
                if self._study.apply(event) and prune and not trial.pruned:
                    self._prune(trial, step, value)

    def _prune(self, trial: Trial, step: int, value: float) -> None:
        shown = f"valid/{self._plan.metric.name} {score(value)}" if math.isfinite(value) else "no finite number"
        reason = f"pruned at step {step} (evaluation {len(trial.reports)}): {shown}"
        self._write(SearchEvent("prune", trial.number, {"step": step, "reason": reason}))

    def _copy(self, old: Trial, new: Trial) -> None:
        """Has a trial end as an earlier one with the same config did; one that still runs ends both."""
        for step, value in old.reports:
            self._write(SearchEvent("report", new.number, {"step": step, "value": value}), durable=False)
        if old.state is not None:
            self._tell(new, old.state, value=old.value, reason=old.reason)

    def _tell(self, trial: Trial, state: str, **fields: Any) -> None:
        self._write(SearchEvent("tell", trial.number, {"state": state, **fields}))

    def _write(self, event: SearchEvent, *, durable: bool = True) -> None:
        self._journal.append(event, durable=durable)
        self._study.apply(event)


class MetricTail:
    """The end of a run's `metrics.jsonl` that grows, of one metric."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._read, self._file = 0, 0

    def new(self) -> Iterable[tuple[int, float]]:
        """Yields (step, value) of the whole lines since the last call; all of them where the file was written anew."""
        try:
            with open(self._path, "rb") as file:
                there = os.fstat(file.fileno())
                if there.st_ino != self._file or there.st_size < self._read:  # a run that resumes cuts its log
                    self._file, self._read = there.st_ino, 0
                if there.st_size == self._read:
                    return
                file.seek(self._read)
                data = file.read()
        except OSError:
            return
        whole = data.rfind(b"\n") + 1
        self._read += whole
        key = json.dumps(self._name).encode()
        for raw in data[:whole].split(b"\n"):
            if key not in raw:
                continue
            try:
                line = json.loads(raw)
                value = line[self._name]
                yield int(line["step"]), math.nan if value is None else float(value)
            except (ValueError, KeyError, TypeError):
                continue


def require_same_search(now: dict[str, Any], begun: Any, where: str) -> None:
    """Checks that a search goes on as it began.

    Raises:
      UserError: it searches other values, or for another metric; trials of both would be compared with each other.
    """
    now = json.loads(json.dumps(now))
    if now["metric"] != begun["metric"]:
        before = Metric(**begun["metric"])
        raise UserError(
            f"{where} is of a search for valid/{before.name} ({before.better} is better), and this one is for"
            f" valid/{now['metric']['name']}; set name=NAME to begin another search"
        )
    changed = [name for name in _FIXED if now["search"].get(name) != begun["search"].get(name)]
    if changed:
        raise UserError(
            f"{where} is of another search: search.{changed[0]} has changed since it began. Set name=NAME to begin"
            " another one, or take the change back (trials, startup, pruner and runner may change)"
        )
