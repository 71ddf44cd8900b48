"""Queued resources, against a gcloud that is faked from google.md: waited for, preempted, made anew, removed."""

import dataclasses
import threading
import time

import fake_gcloud
import pytest
from fake_worker import STEPS, Scene

from jaxops.core.failures import RunFailed, UserError
from jaxops.launch import engine, watch
from jaxops.launch.backends import queued_resources
from jaxops.launch.engine import remove, stop_and_wait
from jaxops.launch.record import LaunchFolder

OPTIONS = {"project": "good-project", "zone": "us-east5-b"}


class QueuedScene(Scene):
    """A launch on a slice of two hosts of the stand-in for the training."""

    def record(self, **changes):
        given = {"backend": "queued-resources", "type": "v4-16", "devices": None, "price": "spot", "options": OPTIONS}
        return super().record(hosts=tuple(f"host-{n}" for n in range(self.workers)), **{**given, **changes})


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    return fake_gcloud.install(tmp_path, monkeypatch)


@pytest.fixture
def scene(cloud, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(queued_resources, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(watch, "SETTLE_SECONDS", 0.2)
    made = QueuedScene(tmp_path).make()
    yield made
    if (record := made.folder.load()) is not None:
        made.session().backend.remove(record, print)


@pytest.mark.slow
@pytest.mark.parametrize("price", ["spot", "flex", "reservation", "on demand"])
def test_preempted_it_is_deleted_asked_for_again_and_goes_on(scene, cloud, capsys, price):
    scene.slow(0.5)

    def preempt() -> None:
        while scene.steps(1) < 4:
            time.sleep(0.05)
        scene.slow(0.05)
        cloud.preempt()

    thread = threading.Thread(target=preempt, daemon=True)
    thread.start()
    session, status = scene.launch(price=price)
    thread.join()
    out, err = capsys.readouterr()
    assert status == 0 and session.record.attempt == 2 and scene.steps(0) == scene.steps(1) == STEPS
    assert "is SUSPENDED: it is deleted, and asked for again" in err
    assert out.count("[1] from step 0\n") == 1 and out.count("[1] from step") == 2
    asked = [call for call in cloud.calls() if "queued-resources" in call and "create" in call]
    assert len(asked) == 2 and all(("--spot" in call) == (price == "spot") for call in asked)
    assert all(("--provisioning-model=flex-start" in call) == (price == "flex") for call in asked)
    engine.give_back(session)
    assert not cloud.look()["queued"]


@pytest.mark.slow
def test_one_that_does_not_come_is_removed_at_the_wait_limit(scene, cloud, monkeypatch):
    cloud.home.mkdir(exist_ok=True)
    (cloud.home / "hosts").write_text("0")
    monkeypatch.setattr(queued_resources, "_WAIT", dict.fromkeys(queued_resources._WAIT, 2 / 60))
    with pytest.raises(RunFailed, match="still WAITING_FOR_RESOURCES after 0 minutes, and was removed"):
        scene.launch()
    assert not cloud.look()["queued"] and not scene.starts()


@pytest.mark.slow
def test_stop_and_down_where_it_was_preempted_meanwhile(scene, cloud):
    scene.slow(0.5)
    scene.launch(watch=False)
    while not scene.steps() >= 2:
        time.sleep(0.05)
    cloud.preempt()
    session = scene.session()
    assert stop_and_wait(session, 0.1) == 0 and not scene.alive()
    remove(session)
    assert not cloud.look()["queued"] and scene.folder.load() is None


@pytest.mark.slow
def test_another_zone_is_refused_while_the_old_machines_may_be_there(scene, cloud):
    scene.launch(watch=False)
    with pytest.raises(UserError, match=r"another options; this ends and removes that launch: jaxops job down"):
        scene.launch(options={**OPTIONS, "zone": "us-east5-a"})


def test_asking_again_makes_nothing_twice_and_down_removes_what_nobody_reached(scene, cloud):
    """As in skypilot-org/skypilot#1716 (a second TPU after a failed ssh) and marin-community/levanter#666 (Ctrl-C)."""
    record, folder = scene.record(), scene.folder
    fresh = dataclasses.replace(record, machines=True, hours=1.0)
    folder.save(fresh)  # as a launcher does before it asks
    assert fresh.spec.options == OPTIONS
    session = scene.session()
    assert session.backend.create(fresh, print, False) is True
    assert session.backend.create(fresh, print, False) is False
    assert len([call for call in cloud.calls() if "create" in call]) == 1
    assert stop_and_wait(session, 0.05) == 0
    remove(session)
    assert not cloud.look()["queued"] and folder.load() is None


def test_an_unknown_project_is_told_in_one_message(scene):
    with pytest.raises(UserError, match="no such project"):
        scene.launch(options={**OPTIONS, "project": "bogus-project"})
    LaunchFolder(scene.record().spec.id).remove()
