"""`jaxops train CONFIG --processes N`: N processes on this machine, for development.

Each process runs the same command with JAXOPS_COORDINATOR, JAXOPS_NUM_PROCESSES and JAXOPS_PROCESS_ID set. Its output
is forwarded with the number of the process in front. Where one fails, the others are ended after a short grace period.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from jaxops.core.failures import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_LOST, EXIT_OK, UserError

EXIT_STOPPED = 130
GRACE_SECONDS = 15.0
"""Seconds that the other processes have after one has failed, to learn of it and to report it."""


def launch_processes(argv: Sequence[str], count: int) -> int:
    """Runs `jaxops argv` as `count` processes and returns the exit status of the first that failed, else theirs.

    Raises:
      UserError: `count` is below one, or this process is part of a job already.
    """
    if count < 1:
        raise UserError(f"--processes: expected at least 1, got {count}")
    if os.environ.get("JAXOPS_COORDINATOR"):
        raise UserError("--processes starts a job, and JAXOPS_COORDINATOR says that this process is part of one")
    command = [sys.executable, "-c", _CHILD, *_without_processes(argv)]
    address = f"127.0.0.1:{_free_port()}"
    job = _Job([_start(command, address, count, rank) for rank in range(count)])
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, job.ask) for number in numbers}
    try:
        return job.wait()
    finally:
        job.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


_CHILD = """
import ctypes, os, signal, sys
if sys.platform == "linux":  # a child does not outlive its launcher
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(os.environ["JAXOPS_LAUNCHER"]):
        sys.exit(1)
sys.argv[0] = "jaxops"
from jaxops.cli.main import script
script()
"""


def _start(command: list[str], address: str, count: int, rank: int) -> subprocess.Popen[str]:
    job = {"JAXOPS_COORDINATOR": address, "JAXOPS_NUM_PROCESSES": str(count), "JAXOPS_PROCESS_ID": str(rank)}
    # Each has a session of its own, so that Ctrl-C reaches the launcher alone. It signals one process, and all agree.
    return subprocess.Popen(
        command,
        env={**os.environ, **job, "JAXOPS_LAUNCHER": str(os.getpid()), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )


class _Job:
    """The processes of a job: it forwards their output and ends them."""

    def __init__(self, processes: list[subprocess.Popen[str]]):
        self._processes = processes
        self._asked = False
        self._threads = []
        for rank, process in enumerate(processes):
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                # Programs read the stdout of process 0 (--json), so that it has no prefix.
                prefix = f"[{rank}] " if target is sys.stderr or rank else ""
                thread = threading.Thread(target=_forward, args=(source, target, prefix), daemon=True)
                thread.start()
                self._threads.append(thread)

    def ask(self, number: int, frame: object) -> None:
        """Passes a signal on to one process, and all agree on a step to stop at; a second Ctrl-C ends them at once."""
        del frame
        if self._asked and number == signal.SIGINT:
            self.kill()
            os._exit(EXIT_STOPPED)
        self._asked = True
        alive = next((process for process in self._processes if process.poll() is None), None)
        if alive is not None:
            alive.send_signal(number)

    def wait(self) -> int:
        """Waits until all processes have ended, ends the others after a failure, and returns the exit status."""
        failed: tuple[int, int] | None = None
        deadline = float("inf")
        while any(process.poll() is None for process in self._processes):
            time.sleep(0.05)
            for rank, process in enumerate(self._processes):
                if failed is None and process.poll() not in (None, EXIT_OK, EXIT_INTERRUPTED):
                    failed, deadline = (rank, process.returncode), time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline:
                self._end()
        for thread in self._threads:
            thread.join(timeout=5)
        codes = [process.returncode for process in self._processes]
        bad = [(rank, code) for rank, code in enumerate(codes) if code not in (EXIT_OK, EXIT_INTERRUPTED)]
        if failed is None and not bad:
            return max(codes)
        rank, code = failed or bad[0]
        if code < 0:
            print(f"jaxops: process {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
            return EXIT_LOST if -code in (signal.SIGKILL, signal.SIGABRT) else EXIT_FAILED
        return code

    def _end(self) -> None:
        """Ends processes with SIGABRT, which leaves their stacks in the run folder, and then with SIGKILL."""
        alive = [(rank, process) for rank, process in enumerate(self._processes) if process.poll() is None]
        for rank, process in alive:
            print(f"jaxops: process {rank} did not end by itself: its stacks are in the run folder", file=sys.stderr)
            process.send_signal(signal.SIGABRT)
        for _, process in alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
        self.kill()

    def kill(self) -> None:
        """Ends all remaining processes at once."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _forward(source: IO[str] | None, target: IO[str], prefix: str) -> None:
    for line in source or ():
        if not line.startswith("[Gloo]"):  # the CPU collectives greet on stdout, which --json needs
            target.write(prefix + line)
            target.flush()


def _without_processes(argv: Sequence[str]) -> list[str]:
    """Returns the arguments without `--processes N` or `--processes=N`."""
    kept, skip = [], False
    for arg in argv:
        if skip:
            skip = False
        elif arg == "--processes":
            skip = True
        elif not arg.startswith("--processes="):
            kept.append(arg)
    return kept


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
