"""The folder of a sweep: its plan as it was begun, a claim and an outcome for each point, and the state of each.

`sweep.json` is the plan. `.sweep/claims/ID` is locked by the process that runs a point, and by the one that started it.
`.sweep/outcomes/ID.json` says how an attempt ended. `.sweep/stop` is written anew by whoever asks the sweep to stop.
"""

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from jaxops.config.dump import dump_yaml
from jaxops.config.node import plain_node
from jaxops.config.yaml_text import parse_yaml
from jaxops.core.failures import EXIT_INTERRUPTED, EXIT_LOST, UserError
from jaxops.core.home import expand_home
from jaxops.core.metric import Metric
from jaxops.core.small_files import read_text
from jaxops.core.whole_files import replace_file, writing
from jaxops.report.folder import finite, read_run
from jaxops.run.build import completed
from jaxops.run.folder.listing import standing
from jaxops.sweep.plan import SweepPlan
from jaxops.sweep.points import Point, run_id

VERSION = 1
FILE = "sweep.json"
State = Literal["waiting", "running", "finished", "unfinished", "failed", "pruned"]
RESUMES = (EXIT_INTERRUPTED, EXIT_LOST, 130, -1, -2, -9, -15)
"""Exit statuses of runs that were stopped or lost, and go on when they are started again; -9 is a kill."""


@dataclasses.dataclass(frozen=True)
class PointEnd:
    """The end of an attempt to run a point: its exit status, and why it was not 0."""

    status: int
    reason: str = ""
    pruned: bool = False
    """True where a search stopped it early: it neither failed nor goes on."""
    value: float | None = None
    """The metric of a run that finished, where its folder is not here and the journal of the search has the number."""

    @property
    def failed(self) -> bool:
        """True where the same run would fail again."""
        return self.status != 0 and self.status not in RESUMES


class SweepFolder:
    """The files of a sweep, beside the folders of its runs. Nothing is written before `begin`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def has_begun(self) -> bool:
        """True where there is a sweep in the folder."""
        return (self.path / FILE).is_file()

    def begin(self, plan: SweepPlan) -> list[str]:
        """Writes the plan, and returns the ids of runs in the folder that the plan no longer has.

        Raises:
          UserError: another sweep has trained points there and shares none with this one, or it holds something else.
        """
        if plan.space is None and self.has_begun and read_plan(self.path).trials:
            raise UserError(f"{self.path} is the folder of a search, not of these runs; set name=NAME")
        there, here = self._ids(), [point.id for point in plan.points]
        gone = [one for one in there if one not in {*here} and (self.path / one).is_dir()]
        if gone and not {*there} & {*here}:  # where nothing was trained, a mended base may go on
            raise UserError(
                f"{self.path} is the folder of another sweep: none of its {len(there)} points is among these"
                f" {len(here)}. Something that all of them have is different now (the base, or jaxops itself is newer);"
                " set name=NAME to begin another sweep, or take the change back to go on with that one"
            )
        if not there and self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and is no sweep: it has no {FILE}; set name=NAME")
        self.write_plan(plan)
        return gone

    def begin_search(self, plan: SweepPlan) -> None:
        """Makes the folder of a search, which keeps what is there.

        Raises:
          UserError: it is the folder of another sweep, or holds something else.
        """
        if not self.has_begun:
            self.begin(plan)
        elif read_plan(self.path).trials is None:
            raise UserError(f"{self.path} is the folder of another sweep, not of a search; set name=NAME")

    def write_plan(self, plan: SweepPlan) -> None:
        """Writes the plan, and makes what the folder needs.

        Raises:
          RunFailed: it cannot be written.
        """
        values: dict[str, Any] = {
            "version": VERSION,
            "name": plan.name,
            "metric": dataclasses.asdict(plan.metric),
            "points": [dataclasses.asdict(point) for point in plan.points],
        }
        if plan.trials is not None:
            values |= {"trials": plan.trials, "proposed": plan.proposed}
        with writing(self.path):
            for name in ("claims", "outcomes"):
                (self.path / ".sweep" / name).mkdir(parents=True, exist_ok=True)
            for name in ("points", "logs"):
                (self.path / name).mkdir(exist_ok=True)
            replace_file(self.path / FILE, [(json.dumps(values, indent=1) + "\n").encode()])

    def _ids(self) -> list[str]:
        return [point.id for point in read_plan(self.path).points] if self.has_begun else []

    def write_config(self, point: Point, config: Mapping[str, Any]) -> Path:
        """Writes the config of a point, which `jaxops train` takes as it is, and returns its path."""
        path = self.config(point)
        with writing(path):
            replace_file(path, [dump_yaml(config).encode()])
        return path

    def aligned(self, plan: SweepPlan) -> SweepPlan:
        """Returns a plan whose points have the ids of runs of the folder that are the same.

        The id of a run is of its whole config. Where that has fields by now that are newer than the run, the run is
        the same with their defaults, and its id stays what it was.
        """
        if not self.has_begun:
            return plan
        there, points = {*self._ids()}, {point.id: point for point in plan.points}
        new, old = {one for one in points if one not in there}, [one for one in there if one not in points]
        named: dict[str, str] = {}
        for one in old if new else ():
            if (now := self._id_now(one)) in new:
                named[now] = one
        if not named:
            return plan
        configs = {named.get(one, one): config for one, config in plan.configs.items()}
        for one in named.values():
            configs[one] = {**configs[one], "run": {**configs[one]["run"], "name": one}}
        renamed = [dataclasses.replace(point, id=named.get(point.id, point.id)) for point in plan.points]
        return dataclasses.replace(plan, points=renamed, configs=configs)

    def is_same(self, old: str, point: Point) -> bool:
        """Returns whether a run of the folder has the config of a point, but for fields that are newer than the run."""
        return self._id_now(old) == point.id

    def _id_now(self, old: str) -> str:
        """Returns the id of a run's config with the defaults of fields that are newer; empty where it is not known."""
        for path in (self.path / old / "config.yaml", self.path / "points" / f"{old}.yaml"):
            try:
                found = plain_node(parse_yaml(read_text(path), str(path)))
                return run_id(completed(found, str(found.get("task"))))
            except (OSError, ValueError, UserError, AttributeError, KeyError, TypeError):
                continue
        return ""

    def config(self, point: Point) -> Path:
        """Returns the path of a point's config."""
        return self.path / "points" / f"{point.id}.yaml"

    def log(self, point: Point) -> Path:
        """Returns the path of what the processes of a point print."""
        return self.path / "logs" / f"{point.id}.txt"

    def claim(self, point: Point) -> TextIO | None:
        """Returns the open file that makes a point this process's own, or None where another process has it.

        The claim is a lock of the open file, so that it passes to a child that inherits the file. It ends with the last
        process that has it open, however that ends.
        """
        file = open(self._claim(point), "a+")  # noqa: SIM115 (open as long as the claim is held)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        return file

    def is_claimed(self, point: Point) -> bool:
        """Returns whether a live process runs a point."""
        if not self._claim(point).exists():
            return False
        with open(self._claim(point)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def _claim(self, point: Point) -> Path:
        return self.path / ".sweep" / "claims" / point.id

    def record(self, point: Point, ended: PointEnd) -> None:
        """Records how an attempt ended; whoever holds the claim may."""
        values = {"version": VERSION, "status": ended.status, "reason": ended.reason, "time": time.time()}
        if ended.pruned:
            values["pruned"] = True
        if ended.value is not None:
            values["value"] = ended.value
        with writing(self.path):
            replace_file(self._outcome(point), [json.dumps(values).encode()])

    def forget(self, point: Point) -> None:
        """Removes the outcome of the last attempt, as another one begins."""
        self._outcome(point).unlink(missing_ok=True)

    def _outcome(self, point: Point) -> Path:
        return self.path / ".sweep" / "outcomes" / f"{point.id}.json"

    def outcome(self, point: Point) -> PointEnd | None:
        """Returns how the last attempt ended; None where it did not end in sight of a sweep."""
        try:
            found = json.loads(read_text(self._outcome(point)))
            return PointEnd(
                int(found["status"]), str(found["reason"]), found.get("pruned") is True, finite(found.get("value"))
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def state(self, point: Point, *, ours: bool = False) -> tuple[State, str]:
        """Returns the state of a point, and the reason of one that failed or was stopped.

        Args:
          point: the point.
          ours: this process holds its claim.
        """
        folder = self.path / point.id
        if not ours and self.is_claimed(point):
            return "running", ""
        outcome = self.outcome(point)
        if outcome is not None and outcome.failed:
            return "failed", outcome.reason
        if outcome is not None and outcome.pruned and not _is_finished(folder):
            return "pruned", outcome.reason
        if not folder.is_dir():
            if outcome is not None and outcome.status == 0:
                return "finished", outcome.reason
            return "waiting", outcome.reason if outcome else ""
        if _is_finished(folder):  # without reading a long log: of a sweep's points most are, when it is run again
            return "finished", ""
        stands = standing(read_run(folder))
        if stands.state in ("finished", "running", "failed"):
            return stands.state, stands.reason  # type: ignore[return-value]
        return "unfinished", stands.reason or (outcome.reason if outcome else "")

    def ask_to_stop(self) -> None:
        """Asks the processes that run the sweep to stop."""
        with writing(self.path):
            replace_file(self.path / ".sweep" / "stop", [f"{time.time()}".encode()])

    def stop_mark(self) -> int:
        """Returns a number that changes when somebody asks the sweep to stop."""
        try:
            return os.stat(self.path / ".sweep" / "stop").st_mtime_ns
        except OSError:
            return 0


def read_plan(folder: Path) -> SweepPlan:
    """Returns the plan of a sweep's folder, without configs: what is read there is shown, and never run.

    Raises:
      UserError: there is no sweep, or its file is broken or of a newer version.
    """
    file = folder / FILE
    try:
        found = json.loads(read_text(file))
        if found["version"] > VERSION:
            raise UserError(f"{file} is of a newer version of jaxops, which reads it")
        points = [
            Point(**{field.name: one[field.name] for field in dataclasses.fields(Point)}) for one in found["points"]
        ]
        metric = Metric(*(str(found["metric"][name]) for name in ("name", "better", "label")))  # type: ignore[arg-type]
        if not all(map(_is_point, points)) or metric.better not in ("higher", "lower"):
            raise ValueError("it is not as jaxops writes it")
        trials, proposed = found.get("trials"), found.get("proposed", 0)
        if not isinstance(trials, int | None) or not isinstance(proposed, int):
            raise ValueError("it is not as jaxops writes it")
        return SweepPlan(str(found["name"]), folder, metric, points, trials=trials, proposed=proposed)
    except FileNotFoundError:
        raise UserError(f"{folder} is no sweep: it has no {FILE}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from None


def _is_finished(folder: Path) -> bool:
    """Returns whether a run has finished and has logged nothing since; False where that takes a closer look."""
    try:
        found = json.loads(read_text(folder / "summary.json"))
        written, logged = (os.stat(folder / name).st_mtime for name in ("summary.json", "metrics.jsonl"))
        return isinstance(found, dict) and found.get("state") == "finished" and logged <= written
    except (OSError, ValueError, RecursionError):
        return False


def _is_point(point: Point) -> bool:
    """Returns whether the fields of a point that was read are what they must be; its id becomes a part of paths."""
    named = isinstance(point.id, str) and point.id.isalnum() and isinstance(point.group, str)
    return named and isinstance(point.values, dict) and isinstance(point.seed, int)


def is_sweep_folder(path: str) -> bool:
    """Returns whether a path is the folder of a sweep that has begun."""
    return (Path(expand_home(path)) / FILE).is_file() if "://" not in path else False
