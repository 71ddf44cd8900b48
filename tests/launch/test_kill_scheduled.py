"""The launcher is killed at random moments, beside machines that it makes or a queue: nothing twice, no run lost."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_gcloud
import pytest
from fake_worker import STEPS, Scene
from slurm_cluster import slurm
from test_mig import MigScene
from test_queued_resources import QueuedScene
from test_slurm import SlurmScene

from jaxops.launch import engine
from jaxops.launch.backends import queued_resources
from jaxops.launch.scheduled import remove_scheduled, stop_scheduled

SCENES: dict[str, type[Scene]] = {"mig": MigScene, "queued-resources": QueuedScene, "slurm": SlurmScene}


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    return tmp_path


def launcher(name: str, scene: Scene) -> subprocess.Popen[bytes]:
    argv = [sys.executable, str(Path(__file__)), name, str(scene.home)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]) + os.pathsep + str(Path(__file__).parents[1])}
    return subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def kill_and_go_on(name: str, scene: Scene, kills: int, longest: float) -> int:
    """Kills launchers at random moments; the last one sees the run to its end.

    Returns the most submissions that there may be: the run's own, and one of each launcher that came after its end.
    """
    draw, before, most = random.Random(kills), [0, 0], 1
    for _ in range(kills):
        most += before == [STEPS, STEPS]
        process = launcher(name, scene)
        try:
            said = process.communicate(timeout=draw.uniform(0.5, longest))[1].decode()
            assert process.returncode == 0, said
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        assert not list(scene.runs.glob("twice-*"))
        now = [scene.steps(rank) for rank in range(scene.workers)]
        assert now >= before  # what was saved stays
        before = now
    most += before == [STEPS, STEPS]
    process = launcher(name, scene)
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, said
    assert [scene.steps(rank) for rank in range(scene.workers)] == [STEPS, STEPS] and not scene.alive()
    assert not list(scene.runs.glob("twice-*"))
    return most


@pytest.mark.slow
def test_of_a_group(state, monkeypatch):
    cloud, scene = fake_gcloud.install(state, monkeypatch), MigScene(state).make()
    scene.slow(0.5)
    most = kill_and_go_on("mig", scene, kills=20, longest=4.0)
    left = cloud.look()
    assert not (left["groups"] or left["templates"] or left["policies"])
    made = [call for call in cloud.calls() if "instance-groups" in call and "create" in call]
    assert len(made) == len({call[4] for call in made}) <= most  # each group once


@pytest.mark.slow
def test_of_a_queued_resource(state, monkeypatch):
    cloud, scene = fake_gcloud.install(state, monkeypatch), QueuedScene(state).make()
    scene.slow(0.5)
    kill_and_go_on("queued-resources", scene, kills=20, longest=6.0)
    assert not cloud.look()["queued"]


@pytest.mark.slow
def test_of_a_batch_job(state, monkeypatch):
    with slurm(state / "slurm") as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        scene = SlurmScene(state).make()
        scene.slow(0.8)
        most = kill_and_go_on("slurm", scene, kills=6, longest=4.0)
        jobs = subprocess.run(["squeue", "-h", "--states=all"], capture_output=True, text=True).stdout.splitlines()
        # A launch of a run that is done is a job of its own, which finds all done.
        assert scene.starts(0) == scene.starts(1) == len(jobs) <= most


@pytest.mark.slow
@pytest.mark.parametrize("at", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_down_after_a_kill_leaves_nothing(state, monkeypatch, at):
    cloud, scene = fake_gcloud.install(state, monkeypatch), MigScene(state).make()
    process = launcher("mig", scene)
    time.sleep(at)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    if scene.folder.load() is not None:
        launch = scene.scheduled()
        stop_scheduled(launch, 0.1)
        remove_scheduled(launch)
    left = cloud.look()
    assert not (left["groups"] or left["templates"] or left["policies"]) and not scene.alive()


if __name__ == "__main__":
    kind, place = sys.argv[1:]
    queued_resources.POLL_SECONDS = 0.1
    started = SCENES[kind](Path(place))
    if kind == "queued-resources":
        session, status = started.launch()
        engine.give_back(session)
    else:
        status = started.submit()
    sys.exit(status)
