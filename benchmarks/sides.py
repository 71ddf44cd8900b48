"""Two sides of a benchmark, each a process of one thread that is pinned to one core and does work when it is asked.

A side prints one JSON object that names it, and then one for each line that it reads. Sides that share a core take
turns, so that neither waits for the other; `measured` is what they time themselves with. On a machine that does other
work a turn's wall time is that of the queue for the core. CPU time leaves the queue out, so both are kept.
"""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NPROC": "1",
    "JAX_PLATFORMS": "cpu",
}


class Side:
    """One side, in a process that is pinned to a core; `name` is what it said first."""

    def __init__(self, command: list[str], core: int) -> None:
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core})  # which the process inherits
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD}
        )
        os.sched_setaffinity(0, cores)
        self.name = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        sys.exit(f"error: a side ended with status {self._process.wait()}")

    def __call__(self, asked: object) -> dict[str, Any]:
        """Returns what the side prints when it is asked for this."""
        assert self._process.stdin is not None
        print(asked, file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """Ends the process, once it has done what it was asked for."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def sides(core: int, **commands: list[str]) -> Iterator[dict[str, Side]]:
    """Starts a side for each command, pinned to this core, and ends them all afterwards."""
    found = {name: Side(command, core) for name, command in commands.items()}
    yield found
    for side in found.values():
        side.close()


def turns(sides: dict[str, Side], asked: object, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Asks all sides in turn, `rounds` times, each round in the other order; returns what each printed."""
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            said[name].append(sides[name](asked))
    return said


class Stopwatch:
    """What a stretch of work took: `seconds` by the clock, and `cpu_s` of this process."""

    seconds = cpu_s = 0.0

    def figures(self) -> dict[str, float]:
        """Returns both, with the most memory that this process has held so far, in MiB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return {"seconds": self.seconds, "cpu_s": self.cpu_s, "peak_mib": round(peak)}


@contextlib.contextmanager
def measured() -> Iterator[Stopwatch]:
    """Times the work inside; it must wait for its own results."""
    found, started, cpu = Stopwatch(), time.perf_counter(), time.process_time()
    yield found
    found.seconds, found.cpu_s = time.perf_counter() - started, time.process_time() - cpu


def spread(values: Iterable[float], digits: int = 3) -> dict[str, float]:
    """Returns median, least and most."""
    found = sorted(values)
    return {
        "median": round(statistics.median(found), digits),
        "least": round(found[0], digits),
        "most": round(found[-1], digits),
    }


def ratios(said: dict[str, list[dict[str, Any]]], by: str) -> dict[str, float]:
    """Returns the peer's time over ours within each round: above 1, ours is the quicker."""
    return spread(theirs[by] / mine[by] for mine, theirs in zip(said["ours"], said["peer"], strict=True))
