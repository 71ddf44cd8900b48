"""The launch engine with local processes: started once, watched, tried again after a preemption, stopped, removed."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from fake_worker import STEPS, Scene

from jaxops.core.failures import RunFailed, UserError
from jaxops.launch import watch
from jaxops.launch.engine import remove, stop_and_wait, supervise
from jaxops.launch.record import find_launch, launches
from jaxops.launch.session import Session


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(watch, "SETTLE_SECONDS", 0.2)
    made = Scene(tmp_path).make()
    yield made
    if made.folder.load() is not None:
        made.session().stop("KILL")


def soon(action: Callable[[], object], when: Callable[[], bool]) -> threading.Thread:
    """Calls `action` once `when` is true, in the background."""

    def run() -> None:
        while not when():
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_it_runs_to_its_end_with_the_worker_before_each_line(scene, capsys):
    session, status = scene.launch()
    said = capsys.readouterr()
    assert status == 0 and session.record.state == "ended"
    assert {"[0] from step 0", "[1] from step 0", "[0] done", "[1] done"} <= set(said.out.splitlines())
    assert (scene.runs / "starts-0").read_text().rstrip() == f"{session.record.roots[0]}/code/{session.record.code}"
    assert [path.name for path in (scene.runs / "code").iterdir()] == [f"{session.record.code}.tar"]
    assert scene.folder.load() == session.record
    assert scene.launch()[1] == 0 and scene.starts() == 2  # again = the same command again, which finds all done


@pytest.mark.parametrize(("name", "saved"), [("KILL", False), pytest.param("TERM", True, marks=pytest.mark.slow)])
def test_one_preempted_worker_makes_all_preempted_and_all_go_on(scene, capsys, name, saved):
    thread = soon(lambda: scene.session().stop(name, [1]), lambda: scene.steps(1) >= 4)
    session, status = scene.launch()
    thread.join()
    out, err = capsys.readouterr()
    assert status == 0 and session.record.retried == 1 and session.record.attempt == 2
    assert (scene.starts(0), scene.starts(1), scene.steps(0), scene.steps(1)) == (2, 2, STEPS, STEPS)
    assert f"attempt 1: worker 1 (local-1) was {'told to stop, and saved' if saved else 'killed'}" in err
    assert out.count("[1] from step 0\n") == 1 and out.count("[1] from step") == 2  # it went on, not anew


def test_a_host_that_lost_its_disk_gets_all_again(scene, monkeypatch, tmp_path):
    monkeypatch.setattr(watch, "UNREACHABLE_SECONDS", 0.2)
    scene.launch(watch=False)
    while not scene.steps() >= 3:
        time.sleep(0.02)
    ask = Session.ask

    def one_disk_is_gone(self, worker, verb, *args, **more):
        if worker == 1 and verb == "poll" and gone.exists():
            raise RunFailed("local-1: poll failed: there is no worker.py")
        if verb == "unpack":
            gone.unlink(missing_ok=True)
        return ask(self, worker, verb, *args, **more)

    gone = tmp_path / "gone"
    gone.touch()
    monkeypatch.setattr(Session, "ask", one_disk_is_gone)
    with scene.folder.held():
        assert supervise(scene.session(), scene.code(), 0.05, adopted=True) == 0
    assert scene.folder.load().attempt == 2 and scene.steps(1) == STEPS


@pytest.mark.parametrize("code", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_mistake_of_ones_own_is_never_tried_again(scene, monkeypatch, capsys, code):
    monkeypatch.setenv("FAKE", str(code))
    session, status = scene.launch()
    assert status == code and scene.starts() == 1 and session.record.retried == 0
    assert not scene.alive() and "its log says why" in capsys.readouterr().err


def test_a_loss_is_tried_again_a_bounded_number_of_times(scene, monkeypatch, capsys):
    monkeypatch.setenv("FAKE", "76")
    session, status = scene.launch()
    assert status == 76 and scene.starts() == 2 and session.record.retried == session.record.retries == 1
    assert "(1 retries: enough)" in capsys.readouterr().err


def test_the_hours_end_it_saved_and_not_tried_again(scene, capsys):
    session, status = scene.launch(hours=0.7 / 3600)
    assert status == 75 and session.record.attempt == 1 and 0 < scene.steps() < STEPS
    assert "--max-hours are used up: it saved" in capsys.readouterr().err


def test_ctrl_c_has_the_workers_save_and_leaves_nothing_alive(scene, request):
    # A shell that starts the suite in the background has it ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    thread = soon(lambda: os.kill(os.getpid(), signal.SIGINT), lambda: scene.steps() >= 3)
    session, status = scene.launch()
    thread.join()
    assert status == 75 and not scene.alive() and session.record.why == "stopped: it saved"
    assert scene.launch()[1] == 0 and scene.steps() == STEPS and session.folder.load().attempt == 2


def test_job_stop_ends_it_whether_a_launcher_watches_or_not(scene):
    thread = soon(lambda: stop_and_wait(scene.session(), 0.05), lambda: scene.steps() >= 3)
    session, status = scene.launch()
    thread.join()
    assert status == 75 and session.record.attempt == 1 and not scene.alive()
    scene.launch(watch=False)
    while not scene.steps() >= 5:
        time.sleep(0.02)
    assert stop_and_wait(scene.session(), 0.05) == 0
    assert not scene.alive() and scene.session().record.state == "ended"


def test_a_second_launcher_adopts_what_runs(scene, capsys):
    first, _ = scene.launch(watch=False)
    second, status = scene.launch()
    assert status == 0 and scene.starts(0) == scene.starts(1) == 1
    assert second.record.attempt == 1 and second.record.deadline == first.record.deadline
    assert "found attempt 1 of this run (running, running)" in capsys.readouterr().err


def test_another_run_of_the_same_name_is_refused_with_what_differs(scene):
    scene.launch(watch=False)
    with pytest.raises(UserError, match=r"launched with another argv, .*running.*jaxops job stop tiny-"):
        scene.launch(argv=("train", "my.yaml", "optimizer.lr=1", f"run.dir={scene.runs}"))
    with pytest.raises(UserError, match=r"another hosts; this ends and removes that launch: jaxops job down"):
        scene.launch(hosts=("local-0",))
    with scene.folder.held(), pytest.raises(UserError, match=rf"being launched by process {os.getpid()}"):
        scene.launch()


def test_down_ends_and_removes_all_but_the_run(scene, tmp_path):
    scene.launch(watch=False)
    session = scene.session()
    with pytest.raises(RunFailed, match="still alive"):
        remove(session)
    stop_and_wait(session, 0.05)
    left = remove(session)
    assert any(str(scene.runs) in line for line in left) and (scene.runs / "code").is_dir()
    assert not [path for path in (tmp_path / "state").rglob("*") if "tiny-" in path.name] and not launches()


def test_a_launch_is_found_by_run_folder_and_id(scene):
    scene.folder.save(scene.record())
    for name in ("tiny", f"{scene.runs}/tiny/", scene.folder.id):
        assert find_launch(name)[0].id == scene.folder.id
    with pytest.raises(UserError, match=r"no launch of a run 'tinny'.*did you mean 'tiny'"):
        find_launch("tinny")


@pytest.mark.parametrize(
    ("fake", "says"),
    [
        ("disagree", "hosts disagree on jax: local-0 has"),
        pytest.param("full", "disk: full", marks=pytest.mark.slow),
    ],
)
def test_what_the_preflight_finds_stops_it_before_a_worker_starts(scene, monkeypatch, fake, says):
    monkeypatch.setenv("FAKE", fake)
    with pytest.raises(UserError, match=says):
        scene.launch()
    assert scene.starts() == 0 and scene.session().record.state == "preparing"


def test_a_folder_that_only_one_host_sees_is_refused(scene, monkeypatch):
    ask = Session.ask

    def blind(self, worker, verb, *args, **more):
        if verb == "shared" and worker == 1:
            return {"seen": False}
        return ask(self, worker, verb, *args, **more)

    monkeypatch.setattr(Session, "ask", blind)
    with pytest.raises(UserError, match=r"is not shared: local-1 cannot read what local-0 wrote"):
        scene.launch()
    assert list(scene.runs.iterdir()) == []


def test_a_damaged_record_is_said(scene):
    record = scene.folder.save(dataclasses.replace(scene.record(), attempt=7, roots=("/a", "/b")))
    assert scene.folder.load() == record
    (scene.folder.path / "record.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        scene.launch()
    (scene.folder.path / "record.json").unlink()
