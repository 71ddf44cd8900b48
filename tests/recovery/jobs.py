"""Real processes that train together, for tests that kill them: each is `jaxops train my.yaml ...` with its place in
the job given by the environment, as a scheduler would give it."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from children import COMMAND
from tiny_runs import curve

from jaxops.cli.main import main
from jaxops.core.metrics_file import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
OWN = "data={fn: 'ownpkg.data:make', record: ids.txt}"
QUICK = ["run.log_every=1", "evaluate.baselines=false", "checkpoint.best=null"]


class Job:
    """`processes` processes of one run, with `devices` CPU devices each; use as a context, which kills what is left.

    A batch takes `sleep` seconds, so that a test can meet the run in the middle. All but the first process start in the
    folder `elsewhere`, if there is one.
    """

    def __init__(
        self,
        run: str,
        *overrides: str,
        processes: int = 2,
        devices: int = 1,
        sleep: float = 0.1,
        elsewhere: str | None = None,
        **env: str,
    ):
        self.run = Path("runs") / run
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        argv = [*COMMAND, "train", "my.yaml", "--cpu-devices", str(devices)]
        argv += [*QUICK, f"run.name={run}", *overrides]
        shared = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OWNPKG_SLEEP": str(sleep), **env}
        shared["JAXOPS_CACHE"] = os.environ["JAXOPS_CACHE"]
        self.processes = []
        for rank in range(processes):
            place = {"JAXOPS_COORDINATOR": f"127.0.0.1:{port}", "JAXOPS_NUM_PROCESSES": str(processes)}
            place = {**place, "JAXOPS_PROCESS_ID": str(rank), "OWNPKG_RANK": str(rank)} if processes > 1 else {}
            with open(f"{run}-{rank}.log", "w") as log:
                self.processes.append(
                    subprocess.Popen(
                        argv,
                        env={**shared, **place},
                        cwd=elsewhere if rank else None,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def said(self, rank: int = 0) -> str:
        """What a process printed."""
        return Path(f"{self.run.name}-{rank}.log").read_text()

    def reach(self, step: int) -> None:
        """Returns once `step` is logged."""
        deadline = time.monotonic() + 120
        while max(curve(self.run.name), default=0) < step:
            assert self.processes[0].poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def signal(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)

    def end(self, seconds: float = 120) -> list[int]:
        """The exit statuses, once all have ended."""
        deadline = time.monotonic() + seconds
        return [process.wait(timeout=max(deadline - time.monotonic(), 0.1)) for process in self.processes]

    def summary(self) -> dict:
        return json.loads((self.run / "summary.json").read_text())


def train(run: str, *overrides: str) -> tuple[int, str]:
    """The same command in this process, on its eight devices: exit status and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        status = main(["train", "my.yaml", *QUICK, f"run.name={run}", *overrides])
    return status, said.getvalue()


def events(run: str) -> list[str]:
    return [line["event"] for line in read_metrics(f"runs/{run}/metrics.jsonl") if "event" in line]


def examples(record: str = "ids.txt") -> dict[int, int]:
    """Cursor -> the id that was built there, by whatever process; one that is built twice must be the same."""
    found: dict[int, int] = {}
    for line in Path(record).read_text().splitlines():
        start, *ids = map(int, line.split())
        for cursor, example in enumerate(ids, start):
            assert found.setdefault(cursor, example) == example
    return found
