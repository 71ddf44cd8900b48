"""The work of a sweep: what is missing is run, each point by one process, until all of them have ended.

Any number of processes may work on one sweep. Tested in tests/sweep/test_sweep_runs.py, by killing real ones.
"""

import collections
import time
from collections.abc import Callable
from typing import TextIO

from jaxops.core.distributed import is_one_of_several
from jaxops.core.failures import EXIT_USAGE, UserError
from jaxops.report.results import score
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.own_code import check_code, code_paths
from jaxops.sweep.plan import Point, SweepPlan
from jaxops.sweep.records import PointEnd, SweepFolder
from jaxops.sweep.runners import Job, Runner

POLL = 0.1
"""Seconds between two looks at the processes that run."""
ALIKE = 3
"""So many points that are refused for one reason, before any has finished, end the sweep: all would be refused."""
ELSEWHERE = 2.0
"""Seconds between two looks at a point that another process runs."""


class Sweep:
    """A plan at work in this process.

    Args:
      plan: the points.
      folder: the sweep's folder, which has begun.
      runner: what runs them.
      say: it is called with each line that a person should read.
      retry_failed: runs points again whose last attempt failed.
    """

    def __init__(
        self,
        plan: SweepPlan,
        folder: SweepFolder,
        runner: Runner,
        say: Callable[[str], None],
        *,
        retry_failed: bool = False,
    ) -> None:
        self._plan, self._folder, self._runner, self._say = plan, folder, runner, say
        self._retry = retry_failed
        self._waiting = list(plan.points)
        self._later: dict[str, float] = {}
        self._active: dict[str, tuple[Point, Job, TextIO]] = {}
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
                if not self._active and not self._waiting:
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

    def _begin(self, point: Point, claim: TextIO) -> bool:
        """Starts a point whose claim is held, or drops it where there is nothing to do; False where it runs already."""
        state, reason = self._folder.state(point, ours=True)
        if state == "running":  # by hand: jaxops train
            claim.close()
            return False
        self._waiting.remove(point)
        if state == "finished" or (state == "failed" and not self._retry):
            claim.close()
            self._finished += state == "finished"
            if state == "failed":
                self._say(f"{point.id} has failed before: {reason} (--retry-failed runs it again)")
            return True
        self._say(f"{point.id} {'begins' if state == 'waiting' else 'goes on'}: {point.label}")
        self._folder.forget(point)
        try:
            job = self._runner.start(point, self._plan.configs[point.id], claim)
        except BaseException:
            claim.close()
            raise
        self._active[point.id] = point, job, claim
        return True

    def _reap(self) -> None:
        """Records what has ended."""
        for point, job, claim in list(self._active.values()):
            if (ended := job.poll()) is not None:
                if ended.status != 0:
                    self._folder.record(point, ended)
                del self._active[point.id]
                claim.close()
                self._tell(point, ended)

    def _tell(self, point: Point, ended: PointEnd) -> None:
        if ended.status != 0:
            word = "failed" if ended.failed else "stopped"
            self._refused[ended.reason] += ended.status == EXIT_USAGE
            self._say(f"{point.id} {word} (exit status {ended.status}): {ended.reason or 'it can go on'}")
            return
        self._finished += 1
        value = RunFolder(self._folder.path / point.id).summary().get(f"valid/{self._plan.metric.name}")
        shown = f"valid/{self._plan.metric.name} {score(value)}" if isinstance(value, int | float) else "no figure"
        self._say(f"{point.id} finished: {shown} ({point.label}); {self._finished} of {len(self._plan.points)}")

    def _require_hope(self) -> None:
        """Ends the sweep where the first points were refused alike, as where their data are wrong."""
        reason, count = max(self._refused.items(), key=lambda item: item[1], default=("", 0))
        if count < ALIKE or self._finished or not self._waiting:
            return
        left = len(self._waiting)
        self._end()
        raise UserError(
            f"the first {count} points were refused for one reason, and {left} more were not started; mend it and"
            f" give the same command again: {reason}"
        )

    def _end(self) -> None:
        """Asks all processes to save and stop, and waits until they have."""
        for _, job, _ in self._active.values():
            job.stop()
        while self._active:
            self._reap()
            time.sleep(POLL)


def require_configs(plan: SweepPlan) -> None:
    """Checks that a plan can be run.

    Raises:
      UserError: it was read from a sweep's folder, whose contents may be anybody's.
    """
    if not plan.configs:
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
