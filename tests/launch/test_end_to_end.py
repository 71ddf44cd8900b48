"""Launch, train, preempt, resume, done, by processes of this machine and over a real sshd: the undisturbed run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import CODE
from object_stores import needs_moto, objects, s3  # noqa: F401
from run_records import records, state
from slurm_cluster import slurm
from sshd import sshd
from tiny_runs import furnish

from jaxops.core.metrics_file import read_metrics
from jaxops.launch.record import LaunchFolder, launch_id
from jaxops.launch.session import Session

ROOT = Path(__file__).parents[2]
OVERRIDES = [
    "run.log_every=1",
    "evaluate.baselines=false",
    "checkpoint.best=null",
    "checkpoint.every=4",
    "run.steps=40",
]
OVERRIDES += ["data={fn: 'ownpkg.data:make'}", "run.seed=${env:LAUNCH_SEED}"]
"""A batch takes OWNPKG_SLEEP seconds, so that a test can meet the run in the middle."""


started: list["Launcher"] = []


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A repository with a tiny run, whose launches, workers and hosts keep to this folder."""
    (tmp_path / "code").mkdir()
    furnish(tmp_path / "code")
    subprocess.run(["git", "init", "-q", tmp_path / "code"], check=True)
    (tmp_path / "code" / ".gitignore").write_text("__pycache__/\n")
    for name, value in variables(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LAUNCH_SEED", "3")  # which hosts over ssh have by --secret alone
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.chdir(tmp_path / "code")
    yield tmp_path
    while started:
        launcher = started.pop()
        launcher.process.kill()
        launcher.process.wait()
        if (record := launcher.folder.load()) is not None and record.spec.backend == "local":
            Session(launcher.folder, record, print).stop("KILL")


def variables(home: Path) -> dict[str, str]:
    own = {"JAXOPS_STATE": str(home / "state"), "JAXOPS_CACHE": os.environ["JAXOPS_CACHE"], "OWNPKG_SLEEP": "0.2"}
    return {**own, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def own_python(home: Path) -> Path:
    """A Python that brings what the test needs: nothing of this process reaches a job of Slurm or a pod."""
    python = home / "python"
    exports = " ".join(f"{name}={value}" for name, value in variables(home).items() if name != "PYTHONPATH")
    path = f'PYTHONPATH="${{PYTHONPATH:-}}:{ROOT}"'
    python.write_text(f'#!/bin/sh\nexec env {exports} {path} {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


@contextlib.contextmanager
def hosts(backend: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The arguments of the backend, with a real sshd where they need one."""
    if backend == "local":
        yield ["--workers", "2"]
        return
    if backend == "gke":
        from test_gke import install_kubectl

        install_kubectl(home / "bin", {"seed/value": "3"})
        monkeypatch.setenv("PATH", f"{home}/bin:{os.environ['PATH']}")
        python = own_python(home)
        options = ["--option", "image=img:1", "--option", f"mount=runs:{home}", "--workers", "2"]
        yield ["--backend", "gke", *options, "--python", str(python), "--secret", "LAUNCH_SEED=k8s:seed/value"]
        return
    if backend == "slurm":
        with slurm(home / "slurm") as env:
            for name, value in env.items():
                monkeypatch.setenv(name, value)
            seed = home / "seed"
            seed.touch(0o600)
            seed.write_text("3\n")
            where = ["--backend", "slurm", "--workers", "2", "--python", str(own_python(home))]
            yield [*where, "--secret", f"LAUNCH_SEED=file:{seed}"]
        return
    with sshd(home / "sshd", variables(home)) as path:
        monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
        try:
            yield ["--backend", "ssh", "--hosts", "alpha,beta", "--python", sys.executable]
        finally:
            for launcher in started:  # while there is an sshd
                launcher.process.kill()
                if (record := launcher.folder.load()) is not None:
                    Session(launcher.folder, record, print).stop("KILL")


class Launcher:
    """`jaxops launch` of the tiny run, as a process of its own, with what it says in files."""

    def __init__(self, home: Path, where: list[str], name: str, *more: str, runs: str = ""):
        runs = runs or str(home / "runs")
        self.folder = LaunchFolder(launch_id(runs, name))
        self.metrics = home / "runs" / name / "metrics.jsonl"
        self.log = home / f"{name}.log"
        argv = [sys.executable, "-c", CODE, "launch", "my.yaml", f"run.name={name}", f"run.dir={runs}"]
        argv += [*OVERRIDES, "--on", "cpu-4", "--max-hours", "0.5", *where, *more]
        argv += [] if "--secret" in argv else ["--secret", "LAUNCH_SEED"]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        started.append(self)

    def reach(self, attempt: int) -> None:
        """Returns once this attempt, or a later one where the machine is too busy for it, has logged three steps."""
        begun = None
        for _ in range(2400):
            record = self.folder.load()
            if record is not None and record.attempt >= attempt:
                begun = self.step() if begun is None else begun
                if self.step() >= begun + 3:
                    return
            assert self.process.poll() is None, self.said()
            time.sleep(0.05)
        raise AssertionError(self.said())

    def step(self) -> int:
        """The last step that is logged."""
        with contextlib.suppress(OSError):
            return max((line.get("step", 0) for line in read_metrics(self.metrics)), default=0)
        return 0

    def preempt(self, name: str, worker: int) -> None:
        """What befalls a host: its worker gets a signal from outside of the launch."""
        record = self.folder.load()
        assert record is not None
        if record.spec.backend == "slurm":
            found = subprocess.run(["pgrep", "-f", f"jaxops train .*run.name={record.spec.name}"], capture_output=True)
            for pid in map(int, found.stdout.split()):
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if f"JAXOPS_PROCESS_ID={worker}".encode() in environ:
                    os.kill(pid, signal.Signals[f"SIG{name}"])
            return
        Session(self.folder, record, print).stop(name, [worker])

    def said(self) -> str:
        return self.log.read_text()

    def end(self, status: int = 0) -> str:
        assert self.process.wait(timeout=280) == status, self.said()
        return self.said()


def job(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE, "job", *argv], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["local", "ssh", "slurm"])
def test_preempted_by_term_and_by_kill_it_becomes_the_undisturbed_run(backend, home, monkeypatch):
    with hosts(backend, home, monkeypatch) as where:
        whole = Launcher(home, where, "whole")
        whole.end()
        cut = Launcher(home, where, "cut")
        cut.reach(attempt=1)
        cut.preempt("TERM", 1)  # saved, 75
        cut.reach(attempt=2)
        cut.preempt("KILL", 0)  # lost, from the last checkpoint
        said = cut.end()
        if backend != "slurm":  # which judges by itself; its launcher only looks
            assert "was told to stop, and saved (exit status 75)" in said and "was killed (exit status 137)" in said
            assert "attempt 3: done" in said
        assert "resumed from step" in said and ": done" in said
        whole_run, cut_run = home / "runs" / "whole", home / "runs" / "cut"
        assert records(cut_run) == records(whole_run) and len(records(cut_run)) >= 40
        assert state(cut_run) == state(whole_run) and "seed: 3" in (cut_run / "config.yaml").read_text()
        status = json.loads(job("status", "cut", "--json").stdout)
        assert [one["state"] for one in status["workers"]] == ["ended", "ended"] and status["retried"] >= 2
        logs = job("logs", "cut", "--worker", "1").stdout
        assert all(line.startswith("[1]") for line in logs.splitlines())
        assert job("down", "cut").returncode == 0 and job("down", "whole").returncode == 0
        assert not list((home / "state" / "launch").rglob("attempt-*"))
        assert (home / "runs" / "cut" / "summary.json").exists()


@pytest.mark.slow
def test_a_jobset_that_lost_pods_becomes_the_undisturbed_run(home, monkeypatch):
    """The cluster is a stand-in; the workers, their preflight, the training and the folder of runs are real."""
    with hosts("gke", home, monkeypatch) as where:
        whole = Launcher(home, where, "whole")
        whole.end()
        cut = Launcher(home, where, "cut")
        for attempt, how, worker in ((1, "delete", "1"), (2, "kill", "0")):
            cut.reach(attempt)
            subprocess.run(["kubectl", "control", how, worker], check=True, timeout=60)
        said = cut.end()
        assert "attempt 3: running" in said and "attempt 3: done" in said and said.count("submitted as") == 1
        whole_run, cut_run = home / "runs" / "whole", home / "runs" / "cut"
        assert records(cut_run) == records(whole_run) and len(records(cut_run)) >= 40
        assert state(cut_run) == state(whole_run) and "seed: 3" in (cut_run / "config.yaml").read_text()
        attempts = json.loads((cut_run / "attempts.json").read_text())["attempts"]
        assert [(one["attempt"], one["backend"], one.get("state")) for one in attempts] == [
            (1, "gke", "preempted"),
            (2, "gke", None),
            (3, "gke", "finished"),
        ]
        assert job("down", "cut").returncode == 0 and job("down", "whole").returncode == 0
        assert json.loads((home / "bin" / "cluster.json").read_text())["jobsets"] == {}


@pytest.mark.slow
def test_a_detached_launcher_sees_it_to_its_end(home):
    launcher = Launcher(home, ["--workers", "2"], "far", "run.steps=8", "--detach")
    said = launcher.end()
    assert "watches it and tries again" in said and "as long as this machine is awake" in said
    assert job("logs", "far", "--follow").stdout.count("[0] resumed") <= 1
    for _ in range(600):
        status = json.loads(job("status", "far", "--json").stdout)
        if status["state"] == "ended" and not status["watched"]:
            break
        time.sleep(0.1)
    assert (status["status"], status["attempt"], status["why"]) == (0, 1, "done")
    assert "found attempt 1 of this run" in launcher.folder.log.read_text()
    assert job("down", "far").returncode == 0


@needs_moto
@pytest.mark.slow
def test_the_folder_of_runs_may_be_an_object_store(home, s3):  # noqa: F811
    launcher = Launcher(home, ["--workers", "2"], "stored", "run.steps=8", runs=f"{s3}/runs")
    said = launcher.end()
    record = launcher.folder.load()
    assert "attempt 1: done" in said and record is not None
    names = set(objects(s3))
    assert f"runs/code/{record.code}.tar" in names and "runs/stored/summary.json" in names
    assert job("down", "stored").returncode == 0 and set(objects(s3)) == names
