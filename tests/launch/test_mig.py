"""Groups of Compute Engine, against a gcloud that is faked from google.md: created, preempted, made anew, removed."""

import re
import subprocess
import threading
import time
from collections.abc import Callable

import fake_gcloud
import pytest
from fake_worker import STEPS, Scene

from jaxops.core.failures import RunFailed, UserError
from jaxops.launch import gcloud
from jaxops.launch.backends import mig
from jaxops.launch.scheduled import remove_scheduled, stop_scheduled
from jaxops.launch.scripts import script

OPTIONS = {"project": "good-project", "zone": "us-east5-b"}


class MigScene(Scene):
    """A launch on a slice of two hosts of the stand-in for the training."""

    def record(self, **changes):
        given = {"backend": "mig", "type": "v5p-16", "devices": None, "price": "spot", "options": OPTIONS, **changes}
        return super().record(hosts=tuple(f"host-{n}" for n in range(self.workers)), **given)


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    return fake_gcloud.install(tmp_path, monkeypatch)


@pytest.fixture
def scene(cloud, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    made = MigScene(tmp_path).make()
    yield made
    if made.folder.load() is not None:
        launch = made.scheduled()
        launch.backend.remove(launch.job)


def nothing_left(cloud) -> bool:
    state = cloud.look()
    return not (state["groups"] or state["templates"] or state["policies"])


def soon(action: Callable[[], object], when: Callable[[], bool]) -> threading.Thread:
    def run() -> None:
        while not when():
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def made(cloud, *words: str) -> list[list[str]]:
    return [call for call in cloud.calls() if set(words) <= set(call)]


@pytest.mark.slow
@pytest.mark.parametrize("price", ["spot", "flex", "reservation", "on demand"])
def test_created_preempted_made_anew_resumed_done_and_nothing_left(scene, cloud, capsys, price):
    thread = soon(lambda: cloud.preempt(1), lambda: scene.steps(1) >= 4)
    options = OPTIONS | ({"reservation": "mine"} if price == "reservation" else {})
    assert scene.submit(price=price, options=options) == 0
    thread.join()
    said = capsys.readouterr()
    record = scene.folder.load()
    assert (record.attempt, record.retried) == (2, 1) and scene.steps(0) == scene.steps(1) == STEPS
    assert said.out.count("[1] from step 0\n") == 1 and said.out.count("[1] from step") == 2
    assert nothing_left(cloud)
    groups = made(cloud, "instance-groups", "create")
    assert [call[4][-3:] for call in groups] == ["-a1", "-a2"]
    assert all(("--target-size-policy-mode=bulk" in call) == (price in ("flex", "reservation")) for call in groups)
    assert all("--size=0" in call and "--default-action-on-vm-failure=do-nothing" in call for call in groups)


def test_what_it_asks_for_ends_with_its_hours_and_holds_no_secret(scene, cloud, monkeypatch):
    (cloud.home / "secrets").mkdir(parents=True)
    (cloud.home / "secrets" / "wandb").write_text("hunter2hunter2")
    assert scene.submit(hours=2.0, secrets=("TOKEN=sm:wandb",)) == 0
    (template,) = made(cloud, "instance-templates", "create")
    limit = next(int(word[19:-1]) for word in template if word.startswith("--max-run-duration="))
    assert 7100 < limit <= 7200 and "--provisioning-model=SPOT" in template
    everything = [path for path in scene.home.rglob("*") if path.is_file() and "secrets" not in path.parts]
    holding = [path for path in everything if b"hunter2" in path.read_bytes()]
    assert not holding
    assert (scene.runs / "token-0").exists()


@pytest.mark.slow
def test_a_slice_that_comes_up_in_part_is_removed_at_the_wait_limit(scene, cloud, capsys, monkeypatch):
    (cloud.home).mkdir(exist_ok=True)
    (cloud.home / "hosts").write_text("1")
    monkeypatch.setattr(mig, "_WAIT", dict.fromkeys(mig._WAIT, 1 / 60))
    scene.hold()
    assert scene.submit() == 76
    assert nothing_left(cloud) and scene.folder.load().retried == 1
    assert "1 of 2 VMs after 0 minutes" in capsys.readouterr().err


@pytest.mark.slow
def test_bulk_waits_and_its_stop_takes_the_request_back(scene, cloud):
    (cloud.home).mkdir(exist_ok=True)
    (cloud.home / "hosts").write_text("1")
    assert scene.submit(price="flex", watch=False) is None
    launch = scene.scheduled()
    assert launch.backend.look(launch.job).state == "waiting"
    assert stop_scheduled(launch, 0.1) == 0 and nothing_left(cloud) and scene.starts() == 0


@pytest.mark.slow
def test_job_stop_has_it_save(scene, cloud, capsys):
    thread = soon(lambda: stop_scheduled(scene.scheduled(), 0.2), lambda: min(map(scene.steps, (0, 1))) >= 3)
    scene.slow(1.0)
    assert scene.submit() == 75
    thread.join()
    assert scene.folder.load().why == "stopped: it saved" and nothing_left(cloud)


@pytest.mark.slow
@pytest.mark.parametrize("code", [1, 2])
def test_a_mistake_of_ones_own_is_never_tried_again(scene, cloud, code):
    scene.fail(code)
    assert scene.submit() == code and scene.starts() == 1 and nothing_left(cloud)


@pytest.mark.slow
def test_preempted_before_the_slice_was_whole_nothing_of_it_is_left_beside_the_next(scene, cloud, capsys):
    """As in skypilot-org/skypilot#1802 and #1468: two clusters of one name, one of them preempted."""
    cloud.home.mkdir(exist_ok=True)
    (cloud.home / "hosts").write_text("1")
    scene.hold()

    def preempt() -> None:
        (cloud.home / "hosts").unlink()
        scene.slow(0.05)
        cloud.preempt(0)

    soon(preempt, lambda: bool(cloud.home.exists() and any(g["vms"] for g in cloud.look()["groups"].values())))
    assert scene.submit() == 0
    assert "PREEMPTED: 1 of 2 VMs are TERMINATED" in capsys.readouterr().err and nothing_left(cloud)


@pytest.mark.slow
def test_a_group_that_somebody_deletes_is_not_waited_for(scene, cloud, capsys):
    """As in skypilot-org/skypilot#1150: the status of a job that nobody had submitted was asked for ever."""

    def delete() -> None:
        launch = scene.scheduled()
        launch.backend.remove(launch.job)

    scene.slow(0.3)
    soon(delete, lambda: min(map(scene.steps, (0, 1))) >= 2)
    assert scene.submit() == 0 and scene.folder.load().attempt == 2


def test_a_submission_that_is_refused_leaves_nothing(scene, cloud, monkeypatch):
    real = gcloud.call

    def refuse(argv, timeout=900.0):
        if "resize" in argv:
            return gcloud.Output(1, "", "Quota 'TPUS' exceeded. Limit: 0.0")
        return real(argv, timeout)

    monkeypatch.setattr(gcloud, "call", refuse)
    with pytest.raises(UserError, match="the quota does not allow it"):
        scene.submit()
    assert nothing_left(cloud) and scene.folder.load().state == "ended"


REFUSED = {
    "no-account": "gcloud has no valid credentials: gcloud auth login",
    "reauth": "gcloud has no valid credentials: gcloud auth login",
}


@pytest.mark.parametrize("name", REFUSED)
def test_expired_credentials_are_told_in_one_message_and_nothing_is_made(scene, cloud, name):
    cloud.home.mkdir(exist_ok=True)
    (cloud.home / "refuse").write_text(name)
    with pytest.raises(UserError, match=REFUSED[name]):
        scene.submit()
    (cloud.home / "refuse").unlink()
    assert nothing_left(cloud)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"project": "bogus-project", "zone": "us-east5-b"}, "no such project"),
        ({"project": "good-project", "zone": "no-such1-a"}, "no such zone"),
    ],
)
def test_an_unknown_project_or_zone_is_told_in_one_message(scene, cloud, options, says):
    with pytest.raises(UserError, match=says):
        scene.submit(options=options)
    scene.folder.remove()


def test_no_machines_free_is_no_mistake_of_the_user(scene, cloud):
    cloud.home.mkdir(exist_ok=True)
    (cloud.home / "refuse").write_text("exhausted")
    with pytest.raises(RunFailed, match="no machines of this kind are free in the zone"):
        scene.submit()
    (cloud.home / "refuse").unlink()


def test_without_gcloud_it_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin-that-is-not")
    with pytest.raises(UserError, match="there is no `gcloud` on this machine: install it"):
        gcloud.ask(["gcloud", "compute", "instances", "list"])


@pytest.mark.slow
def test_down_finds_what_a_killed_launcher_left_by_its_name_alone(scene, cloud):
    scene.submit(watch=False)
    launch = scene.scheduled()
    launch.note(handle="", state="preparing", attempt=7)  # it knows less than there is
    remove_scheduled(launch)
    assert nothing_left(cloud) and not scene.alive()


def test_the_store_is_reached_by_gcloud(cloud, tmp_path):
    (tmp_path / "a").write_text("text")
    for words in (["put", str(tmp_path / "a"), "gs://b/x/y"], ["get", "gs://b/x/y", str(tmp_path / "z")]):
        assert subprocess.run(["sh", str(script("start_worker.sh")), *words]).returncode == 0
    assert (tmp_path / "z").read_text() == "text" and re.search("storage", str(cloud.calls()))
    gone = ["get", "gs://b/none", str(tmp_path / "q")]
    assert subprocess.run(["sh", str(script("start_worker.sh")), *gone]).returncode == 1
