"""The launcher is killed at random moments: what comes next finds what there is, makes nothing twice, loses no run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_worker import STEPS, Scene

from jaxops.launch.engine import remove, stop_and_wait

ROOT = Path(__file__).parents[2]
WHOLE = 3.0
"""Seconds within which a launch comes to its end, about; a kill comes at a random moment of them."""


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    made = Scene(tmp_path).make()
    yield made
    if made.folder.load() is not None:
        made.session().stop("KILL")


def launcher(scene: Scene) -> subprocess.Popen[bytes]:
    argv = [sys.executable, str(Path(__file__).with_name("fake_worker.py")), str(scene.home)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def killed_after(scene: Scene, seconds: float) -> int | None:
    """Starts a launcher and kills it; returns its exit status where it was faster."""
    process = launcher(scene)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return None
    return process.returncode


def nothing_twice(scene: Scene) -> None:
    assert not list(scene.runs.glob("twice-*"))
    record = scene.folder.load()
    for rank in range(scene.workers):
        starts = (scene.runs / f"starts-{rank}").read_text().splitlines() if scene.starts(rank) else []
        assert len(starts) <= (record.attempt if record else 0), (rank, starts)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_the_next_launch_goes_on(scene, kills):
    draw, before = random.Random(kills), [0, 0]
    for _ in range(kills):
        status = killed_after(scene, draw.uniform(0.05, WHOLE))
        assert status in (None, 0)
        nothing_twice(scene)
        now = [scene.steps(rank) for rank in range(scene.workers)]
        assert now >= before  # what was saved stays
        before = now
    process = launcher(scene)
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, said
    nothing_twice(scene)
    assert [scene.steps(rank) for rank in range(scene.workers)] == [STEPS, STEPS] and not scene.alive()


@pytest.mark.parametrize("at", [1.2, *(pytest.param(at, marks=pytest.mark.slow) for at in (0.4, 0.8, 1.6, 2.0))])
def test_down_removes_what_a_killed_launcher_has_left(scene, tmp_path, at):
    killed_after(scene, at)
    if scene.folder.load() is not None:
        session = scene.session()
        stop_and_wait(session, 0.05)
        remove(session)
    assert not scene.alive() and not list((tmp_path / "state").rglob("*tiny-*/record.json"))
    assert not list((tmp_path / "state" / "launch" / "hosts").glob("*"))
    time.sleep(0.3)
    assert not scene.alive()
