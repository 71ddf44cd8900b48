"""What befalls a launch between its commands: a login that expires, a folder that is away, a tool that is gone."""

import dataclasses

import pytest
from fake_worker import Scene

from jaxops.cli.main import main
from jaxops.core.failures import RunFailed, UserError
from jaxops.launch import worker_files
from jaxops.launch.backends.protocol import Sight
from jaxops.launch.engine import open_session
from jaxops.launch.follow import Follower
from jaxops.launch.record import LaunchFolder, LaunchRecord
from jaxops.launch.scheduled import open_scheduled, remove_scheduled, stop_scheduled
from jaxops.launch.watch import AttemptWatch

EXPIRED = UserError("gcloud has no valid credentials: gcloud auth login")


class Cluster:
    """Stands in for the calls of a backend: `looks` are the answers to a look in their order, the last one for ever."""

    tries_again = False

    def __init__(self, *looks: Sight | Exception):
        self.looks, self.removed, self.submitted = list(looks), 0, 0
        self.refusal: Exception | None = None

    def look(self, job):
        found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(found, Exception):
            raise found
        return found

    def remove(self, job):
        if self.refusal is not None:
            raise self.refusal
        self.removed += 1
        return []

    def submit(self, job, say):
        self.submitted += 1
        return "handle"

    def cancel(self, job):
        pass

    def notes(self, job):
        return []

    def console(self, job, worker):
        return ""


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    return Scene(tmp_path)


def submitted(scene: Scene, backend: str = "slurm", **changes) -> LaunchRecord:
    """The record of a launch whose job runs."""
    record = scene.record(backend=backend)
    record = dataclasses.replace(record, state="running", attempt=1, host="h" * 64, code="c" * 64, hours=1.0, **changes)
    return scene.folder.save(record)


def following(scene: Scene, cluster: Cluster, said: list[str]) -> Follower:
    launch = scene.scheduled()
    launch.backend, launch.say = cluster, said.append
    return Follower(launch, 0.01)


def test_a_login_that_expires_is_told_once_and_the_launcher_looks_again(scene):
    submitted(scene)
    (scene.runs / ".launch" / scene.folder.id / "attempt-1").mkdir(parents=True)
    for worker in range(2):
        place = scene.runs / ".launch" / scene.folder.id / "attempt-1" / f"worker-{worker}.json"
        place.write_text('{"code": 0, "why": "", "host": "a"}')
    said: list[str] = []
    cluster = Cluster(Sight("running"), EXPIRED, EXPIRED, Sight("ended"))
    assert following(scene, cluster, said).follow() == 0
    assert [line for line in said if "gcloud auth login" in line] == [f"{EXPIRED}; looking again"]


def test_a_login_that_expires_between_two_attempts_ends_the_launch_and_says_what_may_be_left(scene):
    record = submitted(scene)
    scene.folder.save(dataclasses.replace(record, spec=dataclasses.replace(record.spec, price="spot")))
    cluster, said = Cluster(Sight("ended", why="PREEMPTED")), []
    cluster.refusal = EXPIRED
    with pytest.raises(UserError, match="gcloud auth login"):
        following(scene, cluster, said).follow()
    assert f"machines may be left, and cost money: jaxops job down {scene.folder.id}" in said[-1]
    left = scene.folder.load()
    assert left is not None and (left.state, left.retried) == ("ended", 1) and not cluster.submitted


def test_what_cannot_be_removed_between_two_attempts_counts(scene):
    submitted(scene)
    cluster, said = Cluster(Sight("ended", why="PREEMPTED")), []
    cluster.refusal = RunFailed("no answer")
    assert following(scene, cluster, said).follow() == 76
    assert said.count("no answer") == 1 and "(1 retries: enough)" in said[-1]


def test_a_login_that_expires_while_the_hosts_are_silent_ends_nothing(scene, monkeypatch):
    scene.folder.save(scene.record())
    session = scene.session()

    def standing(record):
        raise EXPIRED

    monkeypatch.setattr(session.backend, "standing", standing, raising=False)
    assert AttemptWatch(session, 0.01)._standing()


def test_a_run_is_launched_by_one_backend_at_a_time(scene):
    """Whoever forgets the first has two jobs that write into one run, or machines that nobody removes."""
    submitted(scene)
    with pytest.raises(UserError, match="another backend; this ends and removes that launch: jaxops job down tiny-"):
        open_session(scene.folder, scene.record(), print)
    scene.folder.save(dataclasses.replace(scene.record(backend="queued-resources"), machines=True))
    with pytest.raises(UserError, match="another backend; this ends and removes that launch: jaxops job down tiny-"):
        open_scheduled(scene.folder, scene.record(backend="slurm"), print)


def test_without_the_folder_of_runs_nobody_is_told_to_save_and_down_ends_the_job(scene):
    submitted(scene)
    scene.runs.write_text("not a folder any more")
    launch, said = scene.scheduled(), []
    launch.backend, launch.say = Cluster(Sight("running")), said.append
    with pytest.raises(RunFailed, match=r"cannot be written to: .*nobody saves: jaxops job down tiny-"):
        stop_scheduled(launch, 0.01)
    assert not launch.backend.removed
    launch.backend.looks = [Sight("absent")]
    assert stop_scheduled(launch, 0.01, at_once=True) == 0 and launch.backend.removed == 1
    assert "the job is removed at once, and nobody saves" in said[0]
    remove_scheduled(launch)
    assert scene.folder.load() is None and worker_files.stop_wanted(launch.job) is False


TOOLS = {"slurm": "squeue", "gke": "kubectl", "mig": "gcloud", "queued-resources": "gcloud", "ssh": "ssh"}
CLOUD = {"project": "good-project", "zone": "us-east5-b"}


@pytest.mark.parametrize("action", ["status", "logs", "stop", "down", "ssh"])
@pytest.mark.parametrize("backend", TOOLS)
def test_without_the_tool_of_its_backend_a_job_says_so(scene, monkeypatch, capsys, backend, action):
    options = CLOUD if TOOLS[backend] == "gcloud" else {"image": "img:1"} if backend == "gke" else {}
    changes = {"backend": backend, "options": options, "type": "v5p-16" if backend == "mig" else "cpu-4"}
    record = dataclasses.replace(scene.record(**changes), state="running", attempt=1, hours=1.0)
    driven = backend in ("ssh", "queued-resources")
    record = dataclasses.replace(record, **({"roots": ("/r", "/r")} if driven else {"host": "h" * 64}))
    scene.folder.save(record)
    monkeypatch.setenv("PATH", str(scene.home / "none"))
    status = main(["job", action, "tiny"])
    err = capsys.readouterr().err
    assert status == 2 and TOOLS[backend] in err and "Traceback" not in err
    assert ("there is no" in err or "is not installed" in err) and scene.folder.load() is not None


def test_down_twice(scene, capsys):
    record = dataclasses.replace(scene.record(), state="ended", attempt=1)
    LaunchFolder(record.spec.id).save(record)
    assert main(["job", "down", "tiny"]) == 0
    capsys.readouterr()
    assert main(["job", "down", "tiny"]) == 2
    assert "no launch of a run 'tiny' is known on this machine (known: none)" in capsys.readouterr().err
