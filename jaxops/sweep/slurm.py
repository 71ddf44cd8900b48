"""Points as the tasks of one Slurm job array, which go on when the sweep's own process has ended.

A task trains the config of its point, and writes its exit status beside the list of the array's points: without an
accounting database Slurm forgets it within minutes. The next process that works on the sweep finds the tasks that wait
or run, and takes them over. The folder is one that this machine and all nodes share.
Tested in tests/sweep/test_sweep_slurm.py, with a real Slurm where there is one.
"""

import getpass
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from jaxops.core.failures import EXIT_INTERRUPTED, RunFailed, UserError
from jaxops.core.interrupt import EXIT_NOW
from jaxops.core.whole_files import replace_file, writing
from jaxops.sweep.points import Point
from jaxops.sweep.records import PointEnd, SweepFolder
from jaxops.sweep.runners import RunningPoint, last_words
from jaxops.sweep.spec import Slurm

LOOK = 5.0
"""Seconds between two questions to the controller of the cluster."""
LARGEST = 1000
"""Tasks of one array: a cluster's MaxArraySize is 1001 where nobody has set it."""
GRACE = 120
"""Seconds before the end of its time at which a task is told to save."""
LOST = -9
"""Status of a task that has gone without one: it was cancelled, or ended by a node's failure or its limits."""


class SlurmRunner:
    """Submits the points that are started between two looks as one array, and follows its tasks.

    Args:
      folder: the sweep's.
      spec: the options of the array.
      slots: how many points are handed over at a time; Slurm runs `spec.jobs` of them.
      command: the command that trains the config whose path is put behind it.

    Raises:
      UserError: this machine is not one from which jobs are submitted.
    """

    def __init__(self, folder: SweepFolder, spec: Slurm, slots: int, command: Sequence[str]) -> None:
        if shutil.which("sbatch") is None:
            raise UserError("runner.kind=slurm: there is no sbatch here; sweep from a login node of the cluster")
        self.slots, self._folder, self._spec, self._command = slots, folder, spec, list(command)
        self._place = folder.path.resolve() / ".sweep" / "slurm"
        self._new: list[_Task] = []
        self._alive: set[str] | None = None
        self._looked = -math.inf
        self._known = self._read()

    def start(
        self, point: Point, config: Mapping[str, Any], claim: TextIO, given_up: Callable[[], bool] | None = None
    ) -> RunningPoint:
        """Writes a point's config; it is submitted with the others at the next look.

        Args:
          point: the point.
          config: its resolved config.
          claim: its claim, which the sweep holds while it follows the task.
          given_up: is not asked: the sweep stops the task itself.
        """
        self._folder.write_config(point, config)
        task = _Task(self, point, self._folder.log(point))
        self._new.append(task)
        return task

    def adopt(self, point: Point) -> RunningPoint | None:
        """Returns the task of a point that waits or runs already, submitted by an earlier process; None without one."""
        alive = self.alive()
        found = [id for id in self._known.get(point.id, []) if id in alive]
        if not found:
            return None
        return _Task(self, point, self._folder.log(point), found[-1])

    def alive(self) -> set[str]:
        """Returns the ids of this user's tasks of the sweep that wait or run, by the last look.

        Raises:
          RunFailed: Slurm does not answer.
        """
        if self._alive is None or time.monotonic() >= self._looked + LOOK:
            whose = [f"--user={getpass.getuser()}", f"--name={self._label}"]
            listed = _slurm("squeue", "--noheader", "--array", *whose, "--format=%i|%k").split()
            self._alive, self._looked = {line.partition("|")[0] for line in listed}, time.monotonic()
            for id, _, name in (line.partition("|") for line in listed):
                self._learn(id, name)
        return self._alive

    def _learn(self, id: str, name: str) -> None:
        """Notes the point of a task in the queue, also of an array whose number a kill has kept from being noted."""
        index = id.rpartition("_")[2]
        if not name.isalnum() or not index.isdigit():
            return
        try:
            point = (self._place / f"{name}.points").read_text().split()[int(index)]
        except (OSError, IndexError):
            return
        if id not in self._known.setdefault(point, []):
            self._known[point].append(id)

    def ended(self, id: str) -> int | None:
        """Returns the exit status that a task wrote; None where it has written none."""
        try:
            status = int((self._place / f"{id}.exit").read_text())
        except (OSError, ValueError):
            return None
        by_signal = status > 128 and status != EXIT_NOW  # as a shell says it
        return 128 - status if by_signal and status - 128 in {*signal.Signals} else status

    def submit(self) -> None:
        """Submits what was started since the last time.

        Raises:
          UserError: Slurm refuses it.
        """
        while self._new:
            tasks, self._new = self._new[:LARGEST], self._new[LARGEST:]
            name = uuid.uuid4().hex[:10]
            with writing(self._place):
                self._place.mkdir(parents=True, exist_ok=True)
                points = "".join(f"{task.point.id}\n" for task in tasks)
                replace_file(self._place / f"{name}.points", [points.encode()])
                replace_file(self._place / f"{name}.sbatch", [self.script(name, len(tasks)).encode()])
            job = _slurm("sbatch", "--parsable", str(self._place / f"{name}.sbatch")).strip().split(";")[0]
            with writing(self._place):
                replace_file(self._place / f"{name}.json", [json.dumps({"job": job}).encode()])
            for index, task in enumerate(tasks):
                task.id = f"{job}_{index}"
                self._known.setdefault(task.point.id, []).append(task.id)
            self._looked = -math.inf

    def script(self, name: str, count: int) -> str:
        """Returns the batch script of an array, which can be submitted by hand as well.

        Args:
          name: of the array's files.
          count: how many tasks it has.
        """
        seconds = math.ceil(self._spec.hours * 3600)
        flags = {
            "job-name": self._label,
            "comment": name,  # by which an array is known again whose number was never noted
            "array": f"0-{count - 1}%{self._spec.jobs}",
            "time": f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}",
            "signal": f"B:TERM@{min(GRACE, seconds // 2)}",
            "output": "/dev/null",
            **self._spec.options,
        }
        folder, here = shlex.quote(str(self._folder.path.resolve())), shlex.quote(os.getcwd())
        lines = [
            "#!/bin/bash",
            *(f"#SBATCH --{key}={value}" for key, value in flags.items()),
            f"cd {here} || exit 1",
            f"folder={folder}",
            f'point=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$folder/.sweep/slurm/{name}.points")',
            'exec >> "$folder/logs/$point.txt" 2>&1',
            "child= stopped=",
            'trap \'stopped=1; [ -z "$child" ] || kill -TERM "$child"\' TERM',
            *self._spec.setup,
            f'[ -z "$stopped" ] || exit {EXIT_INTERRUPTED}',
            f'{shlex.join(self._command)} "$folder/points/$point.yaml" &',
            "child=$!",
            '[ -z "$stopped" ] || kill -TERM "$child"',
            # A trapped signal ends `wait` before the child has ended: it is waited for until it has.
            'while true; do wait "$child"; code=$?; kill -0 "$child" 2> /dev/null || break; done',
            'told="$folder/.sweep/slurm/${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID.exit"',
            'echo "$code" > "$told.new" && mv "$told.new" "$told"',
            'exit "$code"',
        ]
        return "\n".join(lines) + "\n"

    @property
    def _label(self) -> str:
        return f"jaxops-sweep-{self._folder.path.name}"

    def _read(self) -> dict[str, list[str]]:
        """Returns the ids of the tasks of each point, in the order in which they were submitted."""
        known: dict[str, list[str]] = {}
        records = sorted(self._place.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for record in records:
            try:
                job = str(json.loads(record.read_text())["job"])
                points = record.with_suffix(".points").read_text().split()
            except (OSError, ValueError, KeyError, TypeError):
                continue
            for index, point in enumerate(points):
                known.setdefault(point, []).append(f"{job}_{index}")
        return known


class _Task:
    """One point as a task of an array; `id` is empty until it is submitted."""

    def __init__(self, runner: SlurmRunner, point: Point, log: Path, id: str = "") -> None:
        self.point, self.id, self._runner, self._log = point, id, runner, log
        self._begins = log.stat().st_size if log.exists() and not id else 0
        self._gone: float | None = None

    def poll(self) -> PointEnd | None:
        """Returns how the task ended; None while it waits or runs."""
        if not self.id:
            self._runner.submit()
        if (status := self._runner.ended(self.id)) is not None:
            return PointEnd(status, last_words(self._log, self._begins, status))
        if self.id in self._runner.alive():
            self._gone = None
            return None
        now = time.monotonic()
        self._gone = now if self._gone is None else self._gone
        if now < self._gone + 2 * LOOK:  # a shared folder may show what a task has written a moment later
            return None
        return PointEnd(LOST, f"the Slurm task {self.id} is gone (cancelled, or ended by a limit or by its node)")

    def stop(self) -> None:
        """Takes the task back where it waits, and has it save where it runs."""
        if not self.id:
            self._runner.submit()
        _slurm("scancel", "--state=PENDING", self.id)
        _slurm("scancel", "--batch", "--signal=TERM", self.id)

    def kill(self) -> None:
        """Cancels the task; one that was not submitted yet never is."""
        if self.id:
            _slurm("scancel", self.id)


def _slurm(*argv: str) -> str:
    """Returns what a command of Slurm prints.

    Raises:
      UserError: sbatch refuses the job.
      RunFailed: another command fails.
    """
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"{argv[0]} did not answer within a minute; the same command goes on") from None
    if done.returncode == 0 or argv[0] == "scancel":  # which a task that has just ended may be refused
        return done.stdout
    said = (done.stderr or done.stdout).strip().rpartition("\n")[2]
    if argv[0] == "sbatch":
        raise UserError(f"runner: sbatch refuses the array: {said}")
    raise RunFailed(f"{argv[0]} fails: {said}; the same command goes on")
