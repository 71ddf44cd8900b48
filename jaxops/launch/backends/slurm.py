"""Slurm: one batch job, one task a node, which Slurm itself puts into its queue again after a preemption.

Tested in tests/launch/test_slurm.py with Debian's slurmctld and slurmd.
"""

import getpass
import math
import os
import re
import shlex
import time
from collections.abc import Callable

from jaxops.core import stores
from jaxops.core.failures import RunFailed, UserError
from jaxops.launch.accelerators import Accelerator
from jaxops.launch.arguments import Request
from jaxops.launch.backends.protocol import Job, JobState, Scheduler, Sight
from jaxops.launch.commands import run_tool
from jaxops.launch.hosts import Output
from jaxops.launch.scripts import script
from jaxops.launch.worker_files import current_attempt

MISSING = "launch from a login node of the cluster"
_VALUE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:=+@/\[\]*&|!-]*")
_PLACE = re.compile(r"/[A-Za-z0-9_./+=@,-]*")
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
_LATE = ("TIMEOUT", "DEADLINE")


class SlurmBackend(Scheduler):
    """One node for each worker, of a cluster whose login node this machine is."""

    name = "slurm"
    what = "a batch job of the Slurm cluster that this machine belongs to"
    options = {
        "partition": "sbatch --partition",
        "account": "sbatch --account",
        "qos": "sbatch --qos",
        "constraint": "sbatch --constraint",
        "gres": "sbatch --gres, on each node",
        "mem": "sbatch --mem, on each node",
        "cpus-per-task": "sbatch --cpus-per-task",
        "nodelist": "sbatch --nodelist",
        "exclude": "sbatch --exclude",
        "reservation": "sbatch --reservation",
    }
    secrets = ("file",)
    tries_again = True
    meet = "folder"

    def problems(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Refuses what sbatch would read otherwise than it is meant."""
        found = ["--hosts goes with --backend ssh; Slurm chooses the nodes (--option nodelist=...)"] * bool(
            request.hosts
        )
        for key in self.options:
            value = request.option(key)
            if value and not _VALUE.fullmatch(value):
                found.append(f"--option {key}={value[:60]!r}: expected {self.options[key]}, one word without quotes")
        return found

    def workers(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Returns made-up names, one for each node."""
        workers = request.workers or (1 if accelerator.chip is None else accelerator.hosts)
        if not 1 <= workers <= 4096:
            raise UserError(f"--workers {workers}: expected from 1 to 4096 nodes")
        if accelerator.chip is not None and workers != accelerator.hosts:
            raise UserError(f"--workers {workers}: {accelerator}")
        return [f"node-{worker}" for worker in range(workers)]

    def folder_problem(self, run_dir: str) -> str:
        """Returns why the folder of runs cannot be used; the job's own files lie in it."""
        if stores.is_url(run_dir):
            return f"run.dir={run_dir}: with --backend slurm, a folder that this machine and all nodes share"
        if not _PLACE.fullmatch(run_dir):
            return f"run.dir={run_dir!r}: sbatch would misread it; letters, digits and ._/+=@,- only"
        return ""

    def files(self, job: Job) -> dict[str, str]:
        """Returns the batch script, and the host scripts that it calls before anything is unpacked."""
        scripts = {name: script(name).read_text() for name in ("start_worker.sh", "judge_attempt.py")}
        return {"job.sbatch": batch_script(job), **scripts}

    def commands(self, job: Job) -> list[list[str]]:
        """Returns the one command that submits."""
        return [["sbatch", "--parsable", f"{job.folder}/job.sbatch"]]

    def submit(self, job: Job, say: Callable[[str], None]) -> str:
        """Submits, unless a job of this launch waits or runs; returns Slurm's number of it."""
        id, state = self._find(job)[:2]
        if id and _sort(state) in ("waiting", "running"):
            return id
        done = _slurm(*self.commands(job)[0])
        if done.code:
            raise UserError(f"sbatch refuses the job: {done.last_words}")
        return done.out.strip().split(";")[0]

    def look(self, job: Job) -> Sight:
        """Returns how the newest job of the launch is."""
        id, state, reason, nodes = self._find(job)
        attempt = current_attempt(job)
        if not id:
            return Sight("absent", attempt, why="Slurm knows no such job any more")
        sort = _sort(state)
        hosts = tuple(_slurm("scontrol", "show", "hostnames", nodes).out.split()) if nodes else ()
        why = f"{state}: {reason}" if reason not in ("", "None", state) else state
        code = _exit_code(id) if sort == "ended" else None
        return Sight(sort, attempt, code, why, late=state in _LATE, hosts=hosts)

    def _find(self, job: Job) -> tuple[str, str, str, str]:
        """Returns number, state, reason and nodes of the newest job of the launch; empty where there is none."""
        columns = "--format=%i|%T|%r|%N"
        done = _slurm(
            "squeue", "--noheader", "--states=all", f"--user={getpass.getuser()}", f"--name={job.label}", columns
        )
        if done.code:
            raise RunFailed(f"squeue does not answer: {done.last_words}")
        rows = [line.split("|") for line in done.out.splitlines() if line.count("|") == 3]
        rows = [row for row in rows if row[0].isdigit()]
        if not rows:
            return "", "", "", ""
        alive = [row for row in rows if _sort(row[1]) != "ended"]
        id, state, reason, nodes = max(alive or rows, key=lambda row: int(row[0]))
        return id, state, reason, nodes

    def cancel(self, job: Job) -> None:
        """Takes a waiting job back, and has the workers of a running one get SIGTERM."""
        id, state = self._find(job)[:2]
        if _sort(state) == "waiting":
            _slurm("scancel", "--state=PENDING", id)
        elif _sort(state) == "running":
            _slurm("scancel", "--signal=TERM", id)

    def remove(self, job: Job) -> list[str]:
        """Cancels the job at once; Slurm keeps its line for some minutes."""
        until = time.monotonic() + 120
        while (found := self._find(job))[0] and _sort(found[1]) != "ended":
            _slurm("scancel", found[0])
            if time.monotonic() > until:
                raise RunFailed(f"job {found[0]} is {found[1]} although it was cancelled: scancel {found[0]}")
            time.sleep(1)
        return []

    def console(self, job: Job, worker: int) -> str:
        """Returns the end of what the batch script has said, which is the same for all workers."""
        try:
            with open(f"{job.folder}/slurm.log", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                return file.read().decode("utf-8", "replace") if worker == 0 else ""
        except OSError:
            return ""

    def shell(self, job: Job, worker: int) -> list[str] | None:
        """Returns the command that opens a shell in the job's allocation."""
        id, state = self._find(job)[:2]
        if _sort(state) != "running":
            return None
        return ["srun", f"--jobid={id}", "--overlap", "--nodes=1", f"--relative={worker}", "--pty", "sh", "-l"]


def _slurm(*argv: str) -> Output:
    return run_tool(argv, missing=MISSING)


def _sort(state: str) -> JobState:
    if not state:
        return "absent"
    return "waiting" if state in _WAITING else "running" if state in _RUNNING else "ended"


def _exit_code(id: str) -> int | None:
    """Returns the exit status of an ended job, while Slurm still knows it."""
    found = re.search(r"\bExitCode=(\d+):(\d+)", _slurm("scontrol", "show", "job", "-o", id).out)
    if found is None:
        return None
    code, killed = int(found[1]), int(found[2])
    return code if not killed else 128 + killed


def batch_script(job: Job) -> str:
    """Returns the sbatch script, which can be submitted by hand as well."""
    record, spec = job.record, job.spec
    seconds = math.ceil(record.hours * 3600)
    grace = math.ceil(min(record.grace, seconds / 2))
    flags = {
        "job-name": job.label,
        "comment": f"jaxops-launch={job.id}",
        "nodes": str(len(spec.hosts)),
        "ntasks": str(len(spec.hosts)),
        "ntasks-per-node": "1",
        "time": f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}",
        "signal": f"B:TERM@{grace}",
        "open-mode": "append",
        "output": f"{job.folder}/slurm.log",
        "export": "NONE",  # the environment of the login node may hold secrets, and Slurm keeps what it is given
        "dependency": "singleton",  # never two of one name at a time
        **spec.options,
    }
    head = [f"#SBATCH --{name}={value}" for name, value in flags.items()] + ["#SBATCH --requeue"]
    settings = {**job.settings(), "LAUNCH_WORK": f"{job.folder}/work", "LAUNCH_ENVS": f"{spec.run_dir}/.launch/env"}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    numbers = [f"first={record.attempt}", f"retries={record.retries}", f"seconds={seconds}", f"grace={grace}"]
    return "\n".join(["#!/bin/sh", *head, "", *exports, *numbers, script("slurm_job.sh").read_text()])


BACKEND = SlurmBackend()
