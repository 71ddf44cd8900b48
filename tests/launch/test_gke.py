"""Launches as JobSets, against a stand-in for the cluster that is made from tests/launch/kubernetes.md."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fake_worker import STEPS, Scene

from jaxops.core.failures import Lost, UserError
from jaxops.launch.backends.gke import BACKEND
from jaxops.launch.backends.protocol import Job
from jaxops.launch.scheduled import remove_scheduled, stop_scheduled

KUBECTL = Path(__file__).with_name("fake_kubectl.py")
ROOT = Path(__file__).parents[2]


class GkeScene(Scene):
    """A launch on gke of the stand-in for the training; the folder of runs is a claim that all pods share."""

    def make(self):
        super().make()
        (self.home / "bin").mkdir()
        program = self.home / "bin" / "kubectl"
        # Beside the cluster's own files, and with the packages of this Python.
        program.write_text(f"#!/bin/sh\nexec {sys.executable} {self.home}/bin/kubectl.py \"$@\"\n")
        program.chmod(0o755)
        (self.home / "bin" / "kubectl.py").write_text(KUBECTL.read_text())
        os.environ["PATH"] = f"{self.home}/bin:{os.environ['PATH']}"
        return self

    def record(self, **changes):
        options = {"image": "img:1", "mount": f"runs:{self.home}"} | changes.pop("options", {})
        hosts = tuple(f"worker-0-{n}" for n in range(self.workers))
        return super().record(backend="gke", hosts=hosts, options=options, price="on demand", **changes)

    def fresh_job(self):
        """The job of a launch of which nothing is there yet."""
        return Job(record=dataclasses.replace(self.record(), attempt=1, hours=1.0))

    def control(self, *words: str) -> None:
        subprocess.run(["kubectl", "control", *words], check=True, timeout=60)

    def cluster(self) -> dict:
        return yaml.safe_load((self.home / "bin" / "cluster.json").read_text())


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    made = GkeScene(tmp_path).make()
    yield made
    made.control("refuse", "")
    if made.folder.load() is not None:
        launch = made.scheduled()
        launch.record = dataclasses.replace(launch.record, grace=1)
        launch.backend.remove(launch.job)


def soon(action: Callable[[], object], when: Callable[[], bool]) -> threading.Thread:
    def run() -> None:
        while not when():
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_it_runs_to_its_end_and_down_leaves_nothing(scene, capsys):
    assert scene.submit() == 0
    said = capsys.readouterr()
    assert {"[0] done", "[1] done"} <= set(said.out.splitlines())
    launch = scene.scheduled()
    assert (launch.record.status, launch.record.attempt) == (0, 1)
    assert scene.cluster()["created"] == 1 and scene.steps(0) == scene.steps(1) == STEPS
    remove_scheduled(launch)
    assert scene.cluster()["jobsets"] == {}


@pytest.mark.parametrize("how", ["preempt", "kill"])
def test_after_a_preemption_the_jobset_restarts_and_the_run_goes_on(scene, capsys, how):
    scene.slow(0.1)
    thread = soon(lambda: scene.control(how, "1"), lambda: scene.steps(1) >= 4)
    assert scene.submit() == 0
    thread.join()
    said = capsys.readouterr()
    record = scene.folder.load()
    assert (record.attempt, scene.starts(0), scene.starts(1)) == (2, 2, 2) and scene.cluster()["created"] == 1
    assert scene.steps(0) == scene.steps(1) == STEPS
    assert said.out.count("[1] from step 0\n") == 1 and said.out.count("[1] from step") == 2  # it went on, not anew


@pytest.mark.parametrize("code", [1, 2])
def test_a_mistake_of_ones_own_is_never_tried_again(scene, capsys, code):
    scene.fail(code)
    assert scene.submit() == code
    assert scene.starts() == 1 and scene.cluster()["created"] == 1
    assert "its log says why" in capsys.readouterr().err


def test_a_loss_is_tried_again_a_bounded_number_of_times(scene, capsys):
    scene.fail(76)
    assert scene.submit() == 76
    assert scene.starts() == 2 and "(1 retries: enough)" in capsys.readouterr().err


def test_the_end_of_the_hours_saves_and_is_not_tried_again_though_attempts_are_left(scene, capsys):
    scene.slow(0.5)
    assert scene.submit(hours=6 / 3600) == 75
    assert scene.starts() == 1 and 0 < scene.steps() < STEPS
    assert "--max-hours are used up: it saved" in capsys.readouterr().err


def test_job_stop_has_it_save_and_the_next_launch_resumes(scene):
    scene.slow(0.1)
    thread = soon(lambda: stop_scheduled(scene.scheduled(), 0.2), lambda: min(map(scene.steps, (0, 1))) >= 3)
    assert scene.submit() == 75
    thread.join()
    record = scene.folder.load()
    assert record.why == "stopped: it saved" and not scene.alive() and 3 <= scene.steps() < STEPS
    assert scene.submit() == 0 and scene.steps() == STEPS and scene.folder.load().attempt == 2


def test_what_waits_in_kueues_queue_is_shown_and_starts_when_there_is_quota(scene):
    assert scene.submit(watch=False, options={"queue": "research"}) is None
    polls = scene.scheduled().polls()
    assert [poll["state"] for poll in polls] == ["waiting", "waiting"] and "Kueue" in polls[0]["why"]
    assert scene.starts() == 0
    scene.control("admit")
    assert scene.submit(options={"queue": "research"}) == 0 and scene.cluster()["created"] == 1


def test_a_second_launcher_adopts_what_runs(scene, capsys):
    scene.submit(watch=False)
    scene.scheduled().note(handle="", state="preparing")  # the first was killed before it noted what it had made
    assert scene.submit() == 0 and scene.starts(0) == scene.starts(1) == 1
    assert scene.cluster()["created"] == 1 and "of this run (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "error", "help"),
    [
        ("error: current-context is not set", UserError, "gcloud container clusters get-credentials"),
        ("Error in configuration: context was not found for specified context: x", UserError, "get-contexts"),
        ('no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"', UserError, "the cluster has no JobSet"),
        ("You must be logged in to the server (Unauthorized)", UserError, "gcloud auth login"),
        ('jobsets is forbidden: User "me" cannot create resource', UserError, "ask the cluster's owner"),
        ('calling webhook "mjobset.kb.io": no endpoints available for service', UserError, "jobset-system"),
        ('Error from server (NotFound): namespaces "team-a" not found', UserError, "--option namespace"),
        ("The connection to the server localhost:8080 was refused", Lost, "does not answer"),
        ("Unable to connect to the server: net/http: TLS handshake timeout", Lost, "does not answer"),
    ],
)
def test_what_the_cluster_refuses_is_said_with_what_helps(scene, said, error, help):
    scene.control("refuse", said)
    with pytest.raises(error) as caught:
        BACKEND.look(scene.fresh_job())
    assert help in str(caught.value) and "\n" not in str(caught.value)


def test_without_kubectl_it_says_what_to_install(scene, monkeypatch):
    with monkeypatch.context() as without:
        without.setenv("PATH", "/nonexistent")
        _looks_for_kubectl(scene)


def _looks_for_kubectl(scene):
    with pytest.raises(UserError, match="no `kubectl` on this machine: gcloud components install kubectl"):
        BACKEND.look(scene.fresh_job())
