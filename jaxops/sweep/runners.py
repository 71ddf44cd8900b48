"""Runners of points: in this process, or in processes of their own that share the machine's cores and GPUs."""

import ctypes
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TextIO

from jaxops.core.failures import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, RunFailed, UserError
from jaxops.run.build import build_task, config_from_dict
from jaxops.run.fit import fit
from jaxops.sweep.points import Point
from jaxops.sweep.records import PointEnd, SweepFolder

_LONGEST = 600
"""Letters of a reason that are kept; the log has the rest."""
_STOP_LOOK = 1.0


class RunningPoint(Protocol):
    """A point that was started."""

    def poll(self) -> PointEnd | None:
        """Returns how it ended; None while it runs."""
        ...

    def stop(self) -> None:
        """Asks it to save and stop."""
        ...

    def kill(self) -> None:
        """Ends it at once."""
        ...


class Runner(Protocol):
    """A way to run points."""

    slots: int

    def adopt(self, point: Point) -> RunningPoint | None:
        """Returns the job of a point that an earlier process started and that goes on.

        By default there is none: points end with the process that started them.
        """
        return None

    def start(
        self, point: Point, config: Mapping[str, Any], claim: TextIO, given_up: Callable[[], bool] | None = None
    ) -> RunningPoint:
        """Starts a point, which holds its claim as long as it runs.

        Args:
          point: the point.
          config: its resolved config.
          claim: its claim.
          given_up: says whether it is to be stopped early; a runner that returns at once need not ask.
        """
        ...


@dataclasses.dataclass
class _Done:
    """A job of `InProcessRunner`, which has ended when it is returned."""

    ended: PointEnd

    def poll(self) -> PointEnd | None:
        return self.ended

    def stop(self) -> None:
        """Does nothing: it has ended."""

    def kill(self) -> None:
        """Does nothing: it has ended."""


class InProcessRunner(Runner):
    """Runs a point in this process before `start` returns; what it prints of an error goes to the point's log."""

    slots = 1

    def __init__(self, folder: SweepFolder, accept_code: bool = False) -> None:
        self._folder, self._accept_code = folder, accept_code

    def start(
        self, point: Point, config: Mapping[str, Any], claim: TextIO, given_up: Callable[[], bool] | None = None
    ) -> RunningPoint:
        """Runs a point to its end.

        Args:
          point: the point.
          config: its resolved config.
          claim: its claim, which is held as long as it runs.
          given_up: says whether it is to be stopped early; it is asked now and then.

        Raises:
          KeyboardInterrupt: the run was told to stop (Ctrl-C, SIGTERM, `--stop`), and has saved.
        """
        with _stopped_from_outside(self._folder, given_up) as outside:
            try:
                task = build_task(config_from_dict(config, source=f"points/{point.id}.yaml"))
                run = fit(task, quiet=True, accept_code=self._accept_code)
            except UserError as error:
                return self._failed(point, EXIT_USAGE, str(error))
            except RunFailed as error:
                return self._failed(point, error.status, str(error))
            except Exception as error:  # code of the user's own may raise anything, and the other points go on
                return self._failed(point, EXIT_FAILED, f"{type(error).__name__}: {error}")
        if run.state in ("interrupted", "preempted") and not outside.given_up:
            raise KeyboardInterrupt(run.state)
        return _Done(PointEnd(0) if run.state == "finished" else PointEnd(EXIT_INTERRUPTED, run.state))

    def _failed(self, point: Point, status: int, reason: str) -> _Done:
        with open(self._folder.log(point), "a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        return _Done(PointEnd(status, reason[:_LONGEST]))


class _stopped_from_outside:
    """A context that sends this process SIGTERM, which a run saves at, when somebody wants the run to stop.

    Attributes:
      given_up: True where it was the guide of the sweep, and not somebody who asked the sweep to stop.
    """

    def __init__(self, folder: SweepFolder, given_up: Callable[[], bool] | None) -> None:
        self._folder, self._ask, self._over, self.given_up = folder, given_up, threading.Event(), False
        self._before: Any = None
        self._thread = threading.Thread(target=self._watch, args=(folder.stop_mark(),), daemon=True)

    def _watch(self, before: int) -> None:
        while not self._over.wait(_STOP_LOOK):
            self.given_up = self._ask is not None and self._ask()
            if self.given_up or self._folder.stop_mark() != before:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def __enter__(self) -> "_stopped_from_outside":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._late)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _late(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal that came before the run could take it, or after it: the run's own handler is not there."""
        if not self.given_up and callable(self._before):
            self._before(number, frame)


@dataclasses.dataclass(frozen=True)
class JobShare:
    """The part of a machine that one job may use: cores by number, and GPUs as CUDA_VISIBLE_DEVICES names them."""

    cores: frozenset[int]
    gpus: tuple[str, ...]


def shares(jobs: int, cores: Sequence[int], gpus: Sequence[str]) -> list[JobShare]:
    """Divides a machine among jobs: as equally as it goes, and no GPU for two; cores only where there are enough.

    Raises:
      UserError: there are more jobs than GPUs.
    """
    if gpus and jobs > len(gpus):
        raise UserError(
            f"runner.jobs: {jobs} jobs, but {len(gpus)} GPU(s), and two processes on one run out of its memory; set"
            f" runner.jobs={len(gpus)}, or JAX_PLATFORMS=cpu to leave the GPUs alone"
        )
    part = lambda things, at: list(things)[at * len(things) // jobs : (at + 1) * len(things) // jobs]
    own = jobs <= len(cores)
    return [JobShare(frozenset(part(cores, at) if own else cores), tuple(part(gpus, at))) for at in range(jobs)]


def cores_here() -> list[int]:
    """Returns the numbers of the cores that this process may use; none where the system cannot assign them."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def gpus_here() -> list[str]:
    """Returns the NVIDIA GPUs that jax would use here, without opening one."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & {*platforms.split(",")}:
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


class LocalRunner(Runner):
    """Runs each point in a process of its own.

    Args:
      folder: the sweep's.
      jobs: how many run at a time.
      command: the command that trains the config whose path is put behind it.
      divided: False where the command trains elsewhere, so that this machine's cores and GPUs are not shared out.
    """

    def __init__(self, folder: SweepFolder, jobs: int, command: Sequence[str], *, divided: bool = True) -> None:
        self.slots, self._folder, self._command = jobs, folder, list(command)
        self._free = shares(jobs, cores_here(), gpus_here()) if divided else [JobShare(frozenset(), ())] * jobs

    def start(
        self, point: Point, config: Mapping[str, Any], claim: TextIO, given_up: Callable[[], bool] | None = None
    ) -> RunningPoint:
        """Starts a process; it has a session of its own, so that Ctrl-C reaches the sweep alone, which stops it.

        Args:
          point: the point.
          config: its resolved config.
          claim: its claim, which is held as long as it runs.
          given_up: is not asked: the sweep stops the process itself.
        """
        path = self._folder.write_config(point, config)
        share = self._free.pop(0)
        env = dict(os.environ)
        if share.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
        log = open(self._folder.log(point), "ab")  # noqa: SIM115 (the child's, closed below)
        begins = log.tell()
        try:
            with _on_cores(share.cores):
                process = subprocess.Popen(
                    [*self._command, str(path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=env,
                    pass_fds=[claim.fileno()],
                    start_new_session=True,
                )
        finally:
            log.close()
        give_back = lambda: self._free.append(share)
        return _Process(process, self._folder.log(point), begins, give_back)


class _on_cores:
    """A context in which new processes begin on some cores only; an empty set leaves them all."""

    def __init__(self, cores: frozenset[int]) -> None:
        self._cores = cores

    def __enter__(self) -> None:
        if self._cores:
            self._before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, self._cores)

    def __exit__(self, *error: object) -> None:
        if self._cores:
            os.sched_setaffinity(0, self._before)


@dataclasses.dataclass
class _Process:
    """A job of `LocalRunner`: `begins` is where its part of the log does."""

    process: "subprocess.Popen[bytes]"
    log: Path
    begins: int
    give_back: Callable[[], None]

    def poll(self) -> PointEnd | None:
        status = self.process.poll()
        if status is None:
            return None
        self.give_back()
        return PointEnd(status, last_words(self.log, self.begins, status))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.process.kill()


def last_words(log: Path, begins: int, status: int) -> str:
    """Returns the reason of an exit status: the message that a process printed where it has one, else its last line.

    Args:
      log: what it printed.
      begins: where its part of the log begins.
      status: its exit status; negative where a signal ended it.
    """
    if status == 0:
        return ""
    if status < 0:
        name = signal.Signals(-status).name
        return f"ended by {name}{' (by hand, or out of memory)' if status == -signal.SIGKILL else ''}"
    try:
        with open(log, "rb") as file:
            file.seek(begins)
            said = file.read().decode("utf-8", errors="replace").strip()
    except OSError:
        return ""
    _, message, text = f"\n{said}".rpartition("\njaxops: ")
    if not message:  # a traceback ends with the error; what is said at a save is no reason
        text = said.rpartition("\n")[2] if PointEnd(status).failed else ""
    return text[:_LONGEST]


def end_with(parent: int) -> None:
    """Has this process told to stop, as by SIGTERM, when the process that started it ends in any way (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has ended already
            os.kill(os.getpid(), signal.SIGTERM)
