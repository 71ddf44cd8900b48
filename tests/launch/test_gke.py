"""Launches as JobSets, against a stand-in for the cluster that is made from tests/launch/kubernetes.md."""

import dataclasses
import json
import os
import random
import re
import signal
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
from jaxops.launch.accelerators import find_accelerator
from jaxops.launch.arguments import Request
from jaxops.launch.backends.gke import BACKEND, plan_of, sight
from jaxops.launch.backends.protocol import Job
from jaxops.launch.record import LaunchRecord
from jaxops.launch.request import check
from jaxops.launch.scheduled import remove_scheduled, stop_scheduled

KUBECTL = Path(__file__).with_name("fake_kubectl.py")
ROOT = Path(__file__).parents[2]


def install_kubectl(folder: Path, secrets: dict[str, str]) -> None:
    """Puts the stand-in for kubectl into a folder, with a cluster of its own and its secrets."""
    folder.mkdir()
    (folder / "kubectl").write_text(f'#!/bin/sh\nexec {sys.executable} {folder}/kubectl.py "$@"\n')
    (folder / "kubectl").chmod(0o755)
    (folder / "kubectl.py").write_text(KUBECTL.read_text())
    (folder / "secrets.json").write_text(json.dumps(secrets))


class GkeScene(Scene):
    """A launch on gke of the stand-in for the training; the folder of runs is a claim that all pods share."""

    def make(self):
        super().make()
        install_kubectl(self.home / "bin", {})
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


@pytest.mark.slow
def test_it_runs_to_its_end_and_down_leaves_nothing(scene, capsys):
    assert scene.submit() == 0
    said = capsys.readouterr()
    assert {"[0] done", "[1] done"} <= set(said.out.splitlines())
    launch = scene.scheduled()
    assert (launch.record.status, launch.record.attempt) == (0, 1)
    assert scene.cluster()["created"] == 1 and scene.steps(0) == scene.steps(1) == STEPS
    remove_scheduled(launch)
    assert scene.cluster()["jobsets"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["preempt", "kill", "delete"])
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


@pytest.mark.slow
@pytest.mark.parametrize("code", [1, 2])
def test_a_mistake_of_ones_own_is_never_tried_again(scene, capsys, code):
    scene.fail(code)
    assert scene.submit() == code
    assert scene.starts() == 1 and scene.cluster()["created"] == 1
    assert "its log says why" in capsys.readouterr().err


@pytest.mark.slow
def test_a_loss_is_tried_again_a_bounded_number_of_times(scene, capsys):
    scene.fail(76)
    assert scene.submit() == 76
    assert scene.starts() == 2 and "(1 retries: enough)" in capsys.readouterr().err


@pytest.mark.slow
def test_the_end_of_the_hours_saves_and_is_not_tried_again_though_attempts_are_left(scene, capsys):
    scene.slow(0.5)
    assert scene.submit(hours=6 / 3600) == 75
    assert scene.starts() == 1 and 0 < scene.steps() < STEPS
    assert "--max-hours are used up: it saved" in capsys.readouterr().err


@pytest.mark.slow
def test_job_stop_has_it_save_and_the_next_launch_resumes(scene):
    scene.slow(0.1)
    thread = soon(lambda: stop_scheduled(scene.scheduled(), 0.2), lambda: min(map(scene.steps, (0, 1))) >= 3)
    assert scene.submit() == 75
    thread.join()
    record = scene.folder.load()
    assert record.why == "stopped: it saved" and not scene.alive() and 3 <= scene.steps() < STEPS
    assert scene.submit() == 0 and scene.steps() == STEPS and scene.folder.load().attempt == 2


@pytest.mark.slow
def test_what_waits_in_kueues_queue_is_shown_and_starts_when_there_is_quota(scene):
    assert scene.submit(watch=False, options={"queue": "research"}) is None
    polls = scene.scheduled().polls()
    assert [poll["state"] for poll in polls] == ["waiting", "waiting"] and "Kueue" in polls[0]["why"]
    assert scene.starts() == 0
    scene.control("admit")
    assert scene.submit(options={"queue": "research"}) == 0 and scene.cluster()["created"] == 1


@pytest.mark.slow
def test_what_kueue_suspends_goes_on_in_the_same_attempt_and_uses_no_retry(scene):
    """JobSet's issue 1117: a preemption by Kueue is a suspension; what the first life left misleads nobody."""
    scene.slow(0.15)

    def suspend() -> None:
        scene.control("suspend")
        while scene.alive():
            time.sleep(0.1)
            scene.control("look")
        scene.control("admit")

    thread = soon(suspend, lambda: min(map(scene.steps, (0, 1))) >= 4)
    assert scene.submit() == 0
    thread.join()
    record = scene.folder.load()
    assert (record.attempt, record.retried, scene.starts(0), scene.starts(1)) == (1, 0, 2, 2)
    assert scene.steps(0) == scene.steps(1) == STEPS


@pytest.mark.slow
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


def jobset_with(restarts: int = 0, **status) -> dict:
    metadata = {"name": "jx-a", "labels": {"jaxops-launch": "jx-a", "jaxops-attempt": "3"}}
    return {"metadata": metadata, "spec": {}, "status": {"restarts": restarts, **status}}


def holds(kind: str, **more) -> list[dict]:
    return [{"type": kind, "status": "True", **more}]


def pod(index: int, restart: int = 0, phase: str = "Running", state: dict | None = None, conditions=()) -> dict:
    labels = {"job-index": "0", "restart-attempt": str(restart)}
    labels = {f"jobset.sigs.k8s.io/{name}": value for name, value in labels.items()}
    labels["batch.kubernetes.io/job-completion-index"] = str(index)
    statuses = [{"name": "worker", "state": state or {"running": {}}}]
    env = [{"name": "JOB_PODS", "value": "2"}]
    return {
        "metadata": {"name": f"jx-a-worker-0-{index}-abcde", "labels": labels},
        "spec": {"nodeName": f"node-{index}", "containers": [{"name": "worker", "env": env}]},
        "status": {"phase": phase, "conditions": list(conditions), "containerStatuses": statuses},
    }


def ended(index: int, code: int, restart: int = 0, conditions=()) -> dict:
    return pod(index, restart, "Failed", {"terminated": {"exitCode": code}}, conditions)


def test_what_conditions_and_pods_say_of_a_launch():
    """J3 to J7, R6, R8 and the rest of kubernetes.md, each as the launcher reads it."""
    failed = {"conditions": holds("Failed", reason="FailJobSetFailurePolicyAction", message="first failed job: a")}
    late = [{"status": {"conditions": holds("Failed", reason="DeadlineExceeded")}}]
    pulled = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling\n image"}}
    unfit = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}]
    cases = [
        (jobset_with(conditions=holds("Completed")), [], [], ("ended", 3, 0, "Completed")),
        (jobset_with(), [], [pod(0), pod(1)], ("running", 3, None, "")),
        (jobset_with(2), [], [ended(0, 75, 1), pod(0, 2)], ("running", 5, None, "")),
        (jobset_with(), [], [], ("waiting", 3, None, "")),
        (jobset_with(conditions=holds("Suspended")), [], [], ("waiting", 3, None, "suspended: Kueue")),
        (jobset_with(), [], [pod(0, 0, "Pending", pulled)], ("waiting", 3, None, "ImagePullBackOff: Back-off pulling")),
        (jobset_with(), [], [pod(0, 0, "Pending", {}, unfit)], ("waiting", 3, None, "Unschedulable: 0/3 nodes")),
        (jobset_with(**failed), [], [ended(0, 75), ended(1, 2)], ("ended", 3, 2, "pod jx-a-worker-0-1-abcde ended")),
        (jobset_with(**failed), [], [ended(0, 76), ended(1, 137)], ("ended", 3, 76, "pod jx-a-worker-0-0-abcde")),
        (
            jobset_with(**failed),
            [],
            [ended(0, 1), ended(1, 143, 0, holds("DisruptionTarget"))],
            ("ended", 3, 76, "pod jx-a-worker-0-1-abcde was preempted"),
        ),
        (jobset_with(**failed), late, [], ("ended", 3, 75, "--max-hours are used up")),
        (jobset_with(**failed), [], [ended(0, 3)], ("ended", 3, 75, "--max-hours are used up")),
        (jobset_with(**failed), [], [], ("ended", 3, None, "FailJobSetFailurePolicyAction: first failed job")),
    ]
    for there, jobs, pods, (state, attempt, code, why) in cases:
        found = sight(there, jobs, pods)
        assert (found.state, found.attempt, found.code) == (state, attempt, code), (found, why)
        assert found.why.startswith(why) and found.late == ("max-hours" in why), (found, why)
    assert sight(jobset_with(), [], [pod(1), pod(0)]).hosts == ("node-0", "node-1")
    leaving = jobset_with()
    leaving["metadata"]["deletionTimestamp"] = "now"
    assert sight(leaving, [], []).state == "running"


def asked(*options: str, on: str = "v6e-16", **changes) -> list[str]:
    given = {"config": "my.yaml", "overrides": ["run.dir=gs://b/runs"], "on": on, "backend": "gke"}
    request = Request(**{**given, "options": ["image=reg/img:1", *options], **changes})
    return BACKEND.problems(request, find_accelerator(on))


@pytest.mark.parametrize(
    ("options", "changes", "says"),
    [
        ([], {"options": []}, "needs --option image=IMAGE, built from launch/Dockerfile"),
        (["image=my image"], {}, "--option image=my image: expected REGISTRY/PATH:TAG"),
        (["namespace=Team_A"], {}, "--option namespace=Team_A: expected a name of Kubernetes"),
        (["queue=$(touch x)"], {}, "--option queue="),
        (["context=--help"], {}, "--option context=--help: expected a name as `kubectl config get-contexts`"),
        (["mount=claim"], {}, "--option mount=claim: expected CLAIM:/PATH"),
        ([], {"overrides": ["run.dir=/home/me/runs"]}, "pods share an object store (gs://BUCKET/...), or a folder"),
        (["mount=c:/runs"], {"overrides": ["run.dir=/runs2"]}, "pods share an object store"),
        ([], {"hosts": "a,b"}, "--hosts goes with --backend ssh"),
        ([], {"workers": 2}, "v6e-16 = 16 chips on 4 hosts has one worker on each of its hosts"),
        ([], {"coordinator": "a"}, "--coordinator goes with --backend ssh"),
        ([], {"reservation": "a b"}, "--reservation a b: expected the name of a reservation"),
        ([], {"on": "cpu-8", "spot": True}, "has no price class"),
        ([], {"on": "cpu-8", "workers": 0}, "--workers 0: expected from 1 to 1000 pods"),
    ],
)
def test_a_request_that_cannot_be_a_jobset_is_refused_before_anything_is_touched(options, changes, says):
    (problem,) = asked(*options, **changes)
    assert says in problem


def test_a_good_request_has_no_problem_and_a_pod_for_each_host():
    assert asked("mount=claim:/shared", overrides=["run.dir=/shared/runs"]) == []
    assert asked("namespace=team-a", "queue=q", "context=gke_p_us-east5_c", on="2xv5p-128", spot=True) == []
    request = Request(config="a", overrides=[], on="2xv6e-16", backend="gke")
    names = BACKEND.workers(request, find_accelerator("2xv6e-16"))
    assert names[0] == "worker-0-0" and names[-1] == "worker-1-3" and len(names) == 8


@pytest.mark.parametrize("name", ["a" * 200, "Große Läufe!", "0day", "---", "run.v2_b", "x" * 27 + "-" * 9])
def test_names_of_pods_are_dns_labels_whatever_the_run_is_called(tmp_path, name):
    spec = dataclasses.replace(Scene(tmp_path).record().spec, name=name, options={"image": "i"}, type="2xv6e-256")
    made = plan_of(Job(record=LaunchRecord(spec=spec, attempt=1, hours=1.0)))
    pod = f"{made.name}-worker-9-9999-xxxxx"
    assert len(pod) <= 63 and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", made.name), made.name


def test_what_tries_again_by_itself_may_be_left_alone_on_spot_machines():
    given = {
        "config": "a",
        "overrides": ["run.dir=gs://b/runs"],
        "on": "v6e-16",
        "options": ["image=i"],
        "max_hours": 1.0,
    }
    assert check(Request(**given, backend="gke", spot=True, detach=True)).hosts == 4
    with pytest.raises(UserError, match="--detach --spot"):
        check(Request(**{**given, "options": ["project=p", "zone=z"]}, backend="mig", spot=True, detach=True))


def test_without_kubectl_it_says_what_to_install(scene, monkeypatch):
    with monkeypatch.context() as without:
        without.setenv("PATH", "/nonexistent")
        _looks_for_kubectl(scene)


def _looks_for_kubectl(scene):
    with pytest.raises(UserError, match="no `kubectl` on this machine: gcloud components install kubectl"):
        BACKEND.look(scene.fresh_job())


@pytest.mark.slow
def test_one_that_fails_while_another_is_preempted_is_tried_again(scene, capsys):
    """Peers fail in many ways when a worker goes; one preempted worker makes the slice preempted."""
    scene.slow(0.1)
    text = scene.python.read_text()
    broken = "    if rank == '0' and os.path.exists(place + '/saving') and not os.path.exists(place + '/broke'):\n"
    broken += "        open(place + '/broke', 'w').close()\n        sys.exit(1)\n"
    saving = "def save(*_):\n    open(place + '/saving', 'w').close()\n    time.sleep(1.5)\n    os._exit(75)\n"
    line = next(line for line in text.splitlines() if line.startswith("signal.signal"))
    text = text.replace(line, f"{saving}signal.signal(signal.SIGTERM, save)")
    scene.python.write_text(text.replace("    step += 1\n", f"    step += 1\n{broken}"))
    thread = soon(lambda: scene.control("preempt", "1"), lambda: scene.steps(1) >= 3)
    assert scene.submit() == 0
    thread.join()
    assert scene.starts(0) == 2 and scene.steps(0) == STEPS and scene.folder.load().attempt == 2


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_a_launcher_killed_at_random_moments_makes_nothing_twice(scene, kills):
    draw = random.Random(kills)
    scene.slow(0.1)
    argv = [sys.executable, str(Path(__file__)), str(scene.home)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    start = lambda: subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    for _ in range(kills):
        process = start()
        try:
            process.communicate(timeout=draw.uniform(0.3, 4.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert not list(scene.runs.glob("twice-*"))
    process = start()
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, said
    assert scene.steps(0) == scene.steps(1) == STEPS and not scene.alive() and not list(scene.runs.glob("twice-*"))


if __name__ == "__main__":
    sys.exit(GkeScene(Path(sys.argv[1])).submit())
