"""Launches in a real Slurm of two nodes on this machine: submitted once, tried again, stopped, out of time, removed."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import pytest
from fake_worker import STEPS, Scene
from slurm_cluster import slurm

from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.launch.scheduled import remove_scheduled, stop_scheduled

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm") / "cluster") as env:
        yield env


@pytest.fixture
def scene(cluster, tmp_path, monkeypatch):
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    made = SlurmScene(tmp_path).make()
    yield made
    if made.folder.load() is not None:
        launch = made.scheduled()
        launch.backend.remove(launch.job)


class SlurmScene(Scene):
    """A launch by Slurm of the stand-in for the training."""

    def record(self, **changes):
        return super().record(backend="slurm", hosts=tuple(f"node-{n}" for n in range(self.workers)), **changes)

    def pids(self, rank: int) -> int:
        """The process of the stand-in of this rank."""
        found = subprocess.run(["pgrep", "-f", f"{self.python} -m jaxops train"], capture_output=True, text=True)
        for pid in found.stdout.split():
            with open(f"/proc/{pid}/environ", "rb") as file:
                if f"JAXOPS_PROCESS_ID={rank}".encode() in file.read().split(b"\0"):
                    return int(pid)
        raise AssertionError(f"no process of rank {rank}")


def soon(action: Callable[[], object], when: Callable[[], bool]) -> threading.Thread:
    def run() -> None:
        while not when():
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_it_runs_to_its_end_on_two_nodes_and_nothing_is_left_in_the_queue(scene, capsys):
    assert scene.submit() == 0
    said = capsys.readouterr()
    assert {"[0] from step 0", "[1] from step 0", "[0] done", "[1] done"} <= set(said.out.splitlines())
    launch = scene.scheduled()
    assert [poll["host"] for poll in launch.polls()] == ["node1", "node2"]
    assert (launch.record.status, launch.record.attempt) == (0, 1) and launch.record.handle.isdigit()
    assert scene.steps(0) == scene.steps(1) == STEPS
    left = remove_scheduled(launch)
    assert not (scene.runs / ".launch" / launch.folder.id).exists() and "the run itself" in left[0]


@pytest.mark.parametrize("how", ["KILL", "TERM", "requeue", "signal"])
def test_after_a_preemption_slurm_itself_starts_it_again_and_it_goes_on(scene, capsys, how):
    def preempt() -> None:
        id = scene.scheduled().record.handle
        if how == "requeue":  # as Slurm does it for a job of more importance
            subprocess.run(["scontrol", "requeue", id], check=True)
        elif how == "signal":
            subprocess.run(["scancel", "--signal=TERM", id], check=True)
        else:
            os.kill(scene.pids(1), signal.Signals[f"SIG{how}"])

    thread = soon(preempt, lambda: scene.steps(1) >= 4 and bool(scene.scheduled().record.handle))
    assert scene.submit() == 0
    thread.join()
    said = capsys.readouterr()
    record = scene.folder.load()
    assert (record.attempt, record.retried) == (2, 1) and (scene.starts(0), scene.starts(1)) == (2, 2)
    assert scene.steps(0) == scene.steps(1) == STEPS
    assert said.out.count("[1] from step 0\n") == 1 and said.out.count("[1] from step") == 2  # it went on, not anew


@pytest.mark.parametrize("code", [1, 2])
def test_a_mistake_of_ones_own_is_never_tried_again(scene, capsys, code):
    scene.fail(code)
    assert scene.submit() == code
    assert scene.starts() == 1 and "its log says why" in capsys.readouterr().err


def test_a_loss_is_tried_again_a_bounded_number_of_times(scene, capsys):
    scene.fail(76)
    assert scene.submit() == 76
    assert scene.starts() == 2 and "(1 retries: enough)" in capsys.readouterr().err


def test_job_stop_has_it_save_and_the_next_launch_resumes(scene):
    scene.slow(0.5)  # so that it is not done before the wish arrives
    thread = soon(lambda: stop_scheduled(scene.scheduled(), 0.2), lambda: min(map(scene.steps, (0, 1))) >= 3)
    assert scene.submit() == 75
    thread.join()
    record = scene.folder.load()
    assert record.why == "stopped: it saved" and not scene.alive() and 3 <= scene.steps() < STEPS
    scene.slow(0.05)
    assert scene.submit() == 0 and scene.steps() == STEPS and scene.folder.load().attempt == 2


def test_a_job_in_the_queue_is_taken_back(scene):
    subprocess.run(["scontrol", "update", "partitionname=main", "state=down"], check=True)
    try:
        assert scene.submit(watch=False) is None
        launch = scene.scheduled()
        assert [poll["state"] for poll in launch.polls()] == ["waiting", "waiting"]
        assert stop_scheduled(launch, 0.1) == 0 and scene.starts() == 0
        assert launch.backend.look(launch.job).why.startswith("CANCELLED")
    finally:
        subprocess.run(["scontrol", "update", "partitionname=main", "state=up"], check=True)


def test_the_hours_end_it_saved_and_not_tried_again(scene, capsys):
    scene.slow(0.5)
    assert scene.submit(hours=8 / 3600) == 75
    assert scene.folder.load().attempt == 1 and 0 < scene.steps() < STEPS
    assert "--max-hours are used up: it saved" in capsys.readouterr().err


def test_the_time_limit_of_slurm_itself_has_it_save_and_is_no_preemption(scene, capsys):
    scene.slow(5.0)
    assert scene.submit(hours=1 / 60) == 75
    record = scene.folder.load()
    (late,) = (scene.runs / ".launch" / scene.folder.id).glob("attempt-*/late")
    assert late.parent.name == "attempt-1" and record.attempt == 1 and 0 < scene.steps() < STEPS
    assert "--max-hours are used up: it saved" in capsys.readouterr().err


def test_a_second_launcher_adopts_what_runs_and_one_submission_is_in_the_queue(scene, capsys):
    scene.submit(watch=False)
    first = scene.scheduled().record
    assert scene.submit() == 0 and scene.starts(0) == scene.starts(1) == 1
    assert scene.folder.load().handle == first.handle
    assert "of this run (" in capsys.readouterr().err


def test_job_status_and_logs_say_how_it_is(scene, capsys):
    scene.slow(0.2)
    scene.submit(watch=False)
    while not min(map(scene.steps, (0, 1))):
        time.sleep(0.1)
    assert main(["job", "status", "tiny", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert [one["state"] for one in status["workers"]] == ["running", "running"] and 0.9 < status["hours_left"] <= 1
    assert main(["job", "status", "tiny"]) == 0
    said = capsys.readouterr().out
    assert "node1: running" in said and "(slurm)" in said and "nobody would try again" not in said
    assert main(["job", "logs", "tiny", "--worker", "1", "--follow"]) == 0
    assert capsys.readouterr().out.splitlines() == ["[1] from step 0", "[1] done"]
    assert main(["job", "down", "tiny"]) == 0 and scene.folder.load() is None


def test_a_launcher_that_was_killed_before_it_noted_the_job_finds_it(scene):
    scene.submit(watch=False)
    launch = scene.scheduled()
    launch.note(handle="", state="preparing")
    assert scene.submit() == 0 and scene.starts(0) == 1


def test_a_job_that_another_machine_has_submitted_is_not_submitted_twice(scene, tmp_path, monkeypatch):
    scene.submit(watch=False)
    folder = scene.folder
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("JAXOPS_STATE", str(tmp_path / "elsewhere"))
        with pytest.raises(UserError, match="in the cluster, and this machine knows nothing of it"):
            scene.submit()
    assert folder.load() is not None


def test_sbatch_that_refuses_is_told_in_its_words(scene):
    with pytest.raises(UserError, match=r"sbatch refuses the job: .*invalid partition"):
        scene.submit(options={"partition": "nowhere"})


def test_no_variable_of_this_machine_reaches_slurm(scene, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    scene.submit(watch=False)
    launch = scene.scheduled()
    while not scene.starts():
        time.sleep(0.1)
    id = launch.record.handle
    shown = subprocess.run(["scontrol", "show", "job", "-d", id], capture_output=True, text=True).stdout
    with open(f"/proc/{scene.pids(0)}/environ") as file:
        assert "hunter2" not in file.read() + shown
    state = os.path.dirname(os.environ["SLURM_CONF"])
    assert subprocess.run(["grep", "-rq", "hunter2", f"{state}/state"]).returncode == 1
