"""The work of a sweep: what is missing is run, each point by one process, until all of them have ended.

Any number of processes may work on one sweep. Tested in tests/sweep/test_sweep_runs.py, by killing real ones.
"""

import collections
import time
from collections.abc import Callable, Collection
from typing import Protocol, TextIO

from jaxops.core.distributed import is_one_of_several
from jaxops.core.failures import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, UserError
from jaxops.report.results import score
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.own_code import check_code, code_paths
from jaxops.sweep.plan import SweepPlan
from jaxops.sweep.points import Point
from jaxops.sweep.records import PointEnd, SweepFolder
from jaxops.sweep.runners import Runner, RunningPoint

POLL = 0.1
"""Seconds between two looks at the processes that run."""
ALIKE = 3
"""So many points that are refused for one reason, before any has finished, end the sweep: all would be refused."""
ELSEWHERE = 2.0
"""Seconds between two looks at a point that another process runs."""


class Guide(Protocol):
    """A search: it decides which points there are, and which are stopped early."""

    @property
    def left(self) -> int:
        """How many points it is to propose yet."""
        ...

    @property
    def best(self) -> str:
        """The best point so far, for people."""
        ...

    def importance(self) -> list[tuple[str, float]]:
        """Returns how much each path matters, largest first; empty where that is not known."""
        ...

    def unfinished(self) -> list[Point]:
        """Returns the points that it has proposed and that have not ended."""
        ...

    def more(self) -> Point | None:
        """Returns the next point to run; None where there is none."""
        ...

    def watch(self, running: Collection[Point]) -> list[Point]:
        """Returns those of the points that run that are to be stopped."""
        ...

    def pruned(self, point: Point) -> str:
        """Returns why a point is to be stopped; empty where it is not."""
        ...

    def ended(self, point: Point, ended: PointEnd) -> PointEnd:
        """Learns how a point ended, and returns it as it is recorded."""
        ...


class Sweep:
    """A plan at work in this process.

    Args:
      plan: the points.
      folder: the sweep's folder, which has begun.
      runner: what runs them.
      say: it is called with each line that a person should read.
      retry_failed: runs points again whose last attempt failed.
      guide: proposes the points, where the plan has not all of them.
    """

    def __init__(
        self,
        plan: SweepPlan,
        folder: SweepFolder,
        runner: Runner,
        say: Callable[[str], None],
        *,
        retry_failed: bool = False,
        guide: Guide | None = None,
    ) -> None:
        self._plan, self._folder, self._runner, self._say = plan, folder, runner, say
        self._retry, self._guide = retry_failed, guide
        self._waiting = guide.unfinished() if guide else list(plan.points)
        self._stopped = set[str]()
        self._later: dict[str, float] = {}
        self._active: dict[str, tuple[Point, RunningPoint, TextIO]] = {}
        self._finished = 0
        self._refused: collections.Counter[str] = collections.Counter()

    def run(self) -> bool:
        """Runs what is missing; returns False where it was stopped before that was done.

        Points that another process runs are waited for, and run here where it leaves them.

        Raises:
          UserError: the first points were refused for one reason, which is told.
        """
        mark = self._folder.stop_mark()
        try:
            while True:
                self._reap()
                if self._folder.stop_mark() != mark:
                    self._say("asked to stop")
                    self._end()
                    return False
                self._require_hope()
                self._fill()
                self._prune()
                if not self._active and not self._waiting and not (self._guide and self._guide.left):
                    return True
                time.sleep(POLL)
        except KeyboardInterrupt:
            self._say(f"stopping: {len(self._active)} process(es) save (Ctrl-C again ends them at once)")
            self._end()
            return False
        finally:
            for _, job, claim in self._active.values():
                job.kill()
                claim.close()

    def _fill(self) -> None:
        """Starts points while there is room."""
        now = time.monotonic()
        for point in list(self._waiting):
            if len(self._active) >= self._runner.slots:
                return
            if self._later.get(point.id, 0.0) > now:
                continue
            claim = self._folder.claim(point)
            if claim is None or not self._begin(point, claim):
                if not self._later:
                    self._say("waiting for points that another process runs")
                self._later[point.id] = now + ELSEWHERE

        while self._guide is not None and len(self._active) < self._runner.slots:
            if (new := self._guide.more()) is None:
                return
            self._waiting.append(new)
            claim = self._folder.claim(new)
            if claim is None or not self._begin(new, claim):
                self._later[new.id] = now + ELSEWHERE

    def _prune(self) -> None:
        """Stops the points that the guide gives up."""
        if self._guide is None:
            return
        for point in self._guide.watch([point for point, _, _ in self._active.values()]):
            if point.id not in self._stopped:
                self._stopped.add(point.id)
                self._active[point.id][1].stop()

    def _begin(self, point: Point, claim: TextIO) -> bool:
        """Starts a point whose claim is held, or drops it where there is nothing to do; False where it runs already."""
        if (job := self._runner.adopt(point)) is not None:
            self._waiting.remove(point)
            self._say(f"{point.id} goes on where an earlier process started it: {point.label}")
            self._active[point.id] = point, job, claim
            return True
        state, reason = self._folder.state(point, ours=True)
        if state == "running":  # by hand: jaxops train
            claim.close()
            return False
        self._waiting.remove(point)
        if state == "finished" or (state == "failed" and not self._retry):
            self._finished += state == "finished"
            if state == "failed":
                self._say(f"{point.id} has failed before: {reason} (--retry-failed runs it again)")
            if self._guide is not None:  # it ended after the process that led the search had
                failed = self._folder.outcome(point) or PointEnd(EXIT_FAILED, reason)
                self._guide.ended(point, PointEnd(0) if state == "finished" else failed)
            claim.close()
            return True
        if self._guide is not None and (why := self._guide.pruned(point)):
            self._folder.record(point, self._guide.ended(point, PointEnd(EXIT_INTERRUPTED, why)))
            claim.close()
            return True
        self._say(f"{point.id} {'begins' if state == 'waiting' else 'goes on'}: {point.label}")
        self._folder.forget(point)
        try:
            job = self._runner.start(point, self._plan.configs[point.id], claim, self._given_up(point))
        except BaseException:
            claim.close()
            raise
        self._active[point.id] = point, job, claim
        return True

    def _given_up(self, point: Point) -> Callable[[], bool] | None:
        guide = self._guide
        return None if guide is None else lambda: bool(guide.watch([point]))

    def _reap(self) -> None:
        """Records what has ended."""
        for point, job, claim in list(self._active.values()):
            if (ended := job.poll()) is not None:
                if self._guide is not None:
                    ended = self._guide.ended(point, ended)
                if ended.status != 0:
                    self._folder.record(point, ended)
                del self._active[point.id]
                claim.close()
                self._tell(point, ended)

    def _tell(self, point: Point, ended: PointEnd) -> None:
        of = len(self._plan.points) if self._plan.trials is None else self._plan.trials
        if ended.pruned:
            self._say(f"{point.id} {ended.reason} ({point.label})")
            return
        if ended.status != 0:
            word = "failed" if ended.failed else "stopped"
            self._refused[ended.reason] += ended.status == EXIT_USAGE
            self._say(f"{point.id} {word} (exit status {ended.status}): {ended.reason or 'it can go on'}")
            return
        self._finished += 1
        best = f"; {self._guide.best}" if self._guide is not None and self._guide.best else ""
        value = RunFolder(self._folder.path / point.id).summary().get(f"valid/{self._plan.metric.name}")
        shown = f"valid/{self._plan.metric.name} {score(value)}" if isinstance(value, int | float) else "no figure"
        self._say(f"{point.id} finished: {shown} ({point.label}); {self._finished} of {of}{best}")

    def _require_hope(self) -> None:
        """Ends the sweep where the first points were refused alike, as where their data are wrong."""
        reason, count = max(self._refused.items(), key=lambda item: item[1], default=("", 0))
        left = len(self._waiting) + (self._guide.left if self._guide else 0)
        if count < ALIKE or self._finished or not left:
            return
        self._end()
        raise UserError(
            f"the first {count} points were refused for one reason, and {left} more were not started; mend it and"
            f" give the same command again: {reason}"
        )

    def _end(self) -> None:
        """Asks all processes to save and stop, and waits until they have."""
        for _, job, _ in reversed(self._active.values()):  # those that a queue has not started yet come first
            job.stop()
        while self._active:
            self._reap()
            time.sleep(POLL)


def require_configs(plan: SweepPlan) -> None:
    """Checks that a plan can be run.

    Raises:
      UserError: it was read from a sweep's folder, whose contents may be anybody's.
    """
    if not plan.configs and plan.space is None:
        raise UserError(f"{plan.folder} is the folder of a sweep; it is run by its file: jaxops sweep FILE")
    if is_one_of_several():
        raise UserError("jaxops sweep runs on one machine, but the environment makes this one of several processes")


def require_same_code(plan: SweepPlan) -> None:
    """Checks that the runs that are there were trained with the code, by import path, that is here now.

    Raises:
      UserError: some were not: their numbers and those of the missing runs would stand in one table.
    """
    changed, first = 0, ""
    for point in plan.points:
        folder = RunFolder(plan.folder / point.id)
        if folder.exists:
            try:
                check_code(folder, code_paths(plan.configs[point.id]), accept=False)
            except UserError as error:
                changed, first = changed + 1, first or str(error)
    if changed:
        raise UserError(f"{changed} run(s) of this sweep were trained with other code. The first: {first}")
