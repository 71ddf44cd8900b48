"""A controller that is killed at any moment loses no trial, asks nothing twice and runs no point twice.

Quick: every write to the journal fails once, before it, in the middle of its line and after it, in one process. Slow: a
real controller with real (short) processes is killed with -9 at ten moments, with a file and with Postgres.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in import SEARCH, TASK, Trainer, events_of, search_plan, searched

from jaxops.core.failures import RunFailed, UserError
from jaxops.sweep.records import SweepFolder, read_plan
from jaxops.sweep.results import read_outcome
from jaxops.sweep.search.events import SearchEvent
from jaxops.sweep.search.journal import FileJournal, leading

pytest.importorskip("optuna")
ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.mark.parametrize(
    ("where", "step"),
    [
        ("torn", 5),
        ("after", 5),
        *(pytest.param(where, 1, marks=pytest.mark.slow) for where in ("before", "torn", "after")),
    ],
)
def test_a_controller_that_dies_at_any_write_loses_nothing(toy, monkeypatch, where, step):
    """optuna/optuna#6283: what ran at a crash is forgotten; optuna/optuna#5138: a torn line ends the journal."""
    small = ["search.trials=4"]
    searched(toy, *small, "name=whole")
    whole = events_of("runs/whole")
    assert {event.what for event in whole} == {"begin", "ask", "report", "prune", "tell"}
    append = FileJournal.append
    moments = [at for at, event in enumerate(whole) if event.what != "report" or at % 6 == 0]
    for moment in moments[::step]:
        shutil.rmtree("runs/find", ignore_errors=True)
        count = 0

        def dies(journal, event, *, durable=True, moment=moment):
            nonlocal count
            count += 1
            if count != moment + 1:
                return append(journal, event, durable=durable)
            if where == "torn":
                os.write(journal._file, event.line().encode()[:30])
            elif where == "after":
                append(journal, event, durable=durable)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(FileJournal, "append", dies)
            with pytest.raises(Killed):
                searched(toy, *small)
        first = {run.parent.name for run in Path("runs/find").glob("*/summary.json") if finished(run)}
        trainer = searched(toy, *small)
        assert not first & set(trainer.started)  # what had finished is not run again
        events = events_of("runs/find")
        assert [e for e in events if e.what == "ask"] == [e for e in whole if e.what == "ask"], (moment, where)
        told = [event.trial for event in events if event.what == "tell"]
        assert sorted(told) == list(range(4))
        outcome = read_outcome(read_plan(Path("runs/find")))
        assert outcome.left == 0 and outcome.count("finished") + outcome.count("pruned") == 4


def finished(summary: Path) -> bool:
    return json.loads(summary.read_text())["state"] == "finished"


def lines_of(run: str) -> list[dict]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def test_a_point_that_ended_while_nobody_led_is_told(toy, monkeypatch):
    """Its process outlived the controller, and finished."""
    plan = search_plan("search.trials=3")
    searched(toy, "search.trials=3")
    lines = Path("runs/find/search.jsonl").read_bytes().splitlines(keepends=True)
    tell = max(at for at, line in enumerate(lines) if b'"event": "tell"' in line)
    Path("runs/find/search.jsonl").write_bytes(b"".join(lines[:tell]))  # as if it had been killed just before
    assert not searched(toy, "search.trials=3").started
    assert [event.line() for event in events_of("runs/find") if event.what == "tell"] and plan.space is not None
    assert len([event for event in events_of("runs/find") if event.what == "tell"]) == 3


def test_a_pruned_point_whose_controller_died_is_not_started_again(toy):
    """The decision is written before the signal is sent: whoever leads next stands by it."""
    searched(toy, "search.trials=12")
    lines = Path("runs/find/search.jsonl").read_bytes().splitlines(keepends=True)
    prune = next(at for at, line in enumerate(lines) if b'"event": "prune"' in line)
    run = next(
        e.fields["point"]
        for e in events_of("runs/find")
        if e.what == "ask" and e.trial == json.loads(lines[prune])["trial"]
    )
    Path("runs/find/search.jsonl").write_bytes(b"".join(lines[: prune + 1]))
    (Path("runs/find/.sweep/outcomes") / f"{run}.json").unlink()
    trainer = searched(toy, "search.trials=12")
    assert run not in trainer.started
    assert (
        SweepFolder(Path("runs/find")).state(next(p for p in read_plan(Path("runs/find")).points if p.id == run))[0]
        == "pruned"
    )


def test_one_process_leads_at_a_time_and_the_next_takes_over(toy, monkeypatch):
    monkeypatch.setattr("jaxops.sweep.search.journal.WAIT", 0.01)
    plan = search_plan()
    folder = SweepFolder(plan.folder)
    folder.begin_search(plan)
    first, second, said = FileJournal(plan.folder), FileJournal(plan.folder), []
    assert first.lead() and not second.lead()
    first.append(SearchEvent("begin", 0, {"a": 1}))
    with pytest.raises(RunFailed, match="another process leads"):
        second.append(SearchEvent("begin", 0, {}))

    def say(line):
        said.append(line)
        first.close()

    with leading(second, say) as journal:
        assert [event.fields for event in journal.read()] == [{"a": 1}]
    assert "another process leads this search" in said[0] and len(said) == 1


def test_a_broken_journal_is_told_and_a_torn_line_is_cut(toy):
    searched(toy, "search.trials=2")
    journal = Path("runs/find/search.jsonl")
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"v": 1, "event": "ask", "tri')
    assert not searched(toy, "search.trials=2").started and journal.read_bytes() == whole
    first, _, rest = whole.partition(b"\n")
    journal.write_bytes(first + b"\n{broken}\n" + rest)
    with pytest.raises(UserError, match=r"search\.jsonl:2 is broken"):
        searched(toy, "search.trials=2")


PROGRAM = """
import sys
import jaxops.cli.sweep as command
command.CHILD = open('child.py').read()
from jaxops.sweep.search import lead
lead.LOOK = 0.05
from jaxops.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def lead(*overrides: str) -> subprocess.Popen:
    """`jaxops sweep find.yaml` as a process of its own, whose points train for a moment without importing anything."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.getcwd()]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, "sweep", "find.yaml", *overrides, "runner.jobs=2", "--json"]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def killed_at_ten_moments(overrides: list[str], count) -> None:
    """Kills a controller again and again, and checks what is left at the end.

    Args:
      overrides: of the sweep.
      count: returns the number of events of the journal.
    """
    Path("find.yaml").write_text(SEARCH.replace("trials: 12", "trials: 16"))
    Path("child.py").write_text("import ctypes, signal\nctypes.CDLL(None).prctl(1, signal.SIGTERM)\n" + TASK)
    for _ in range(10):
        before, process = count(), lead(*overrides)
        end = time.monotonic() + 60
        while count() < before + 7 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    out, err = lead(*overrides).communicate()
    found = json.loads(out)
    assert {point["state"] for point in found["points"]} <= {"finished", "pruned"}, err
    assert len(found["points"]) == 16 and len({point["id"] for point in found["points"]}) == 16
    for point in found["points"]:  # no evaluation of a run was made twice, however often it was stopped
        steps = [line["step"] for line in lines_of(point["dir"])]
        assert steps == list(range(1, len(steps) + 1))
        assert (point["state"] == "finished") == (len(steps) == 6 and point["value"] is not None)
    done = [point["id"] for point in found["points"] if point["state"] == "finished"]
    summary = {run: Path("runs/find", run, "summary.json").stat().st_mtime_ns for run in done}
    out, err = lead(*overrides).communicate()
    assert json.loads(out or "{}").get("points") == found["points"], err
    assert {run: Path("runs/find", run, "summary.json").stat().st_mtime_ns for run in done} == summary


@pytest.mark.slow
def test_a_controller_killed_with_9_at_ten_moments_loses_no_trial(toy):
    journal = Path("runs/find/search.jsonl")
    killed_at_ten_moments([], lambda: journal.read_bytes().count(b"\n") if journal.exists() else 0)
    events = events_of("runs/find")
    assert [e.trial for e in events if e.what == "ask"] == list(range(16))
    assert sorted(e.trial for e in events if e.what == "tell") == list(range(16))


@pytest.mark.slow
def test_two_controllers_on_one_search_run_each_trial_once(toy):
    Path("child.py").write_text("import ctypes, signal\nctypes.CDLL(None).prctl(1, signal.SIGTERM)\n" + TASK)
    both = [lead(), lead()]
    told = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    started = Path("started.txt").read_text().split()
    assert len(started) == len(set(started)) == 12
    assert any("another process leads this search" in err for _, err in told)


def test_the_stand_in_trains_what_it_is_given(toy):
    trainer = searched(toy, "search.trials=2", "search.pruner=none")
    assert isinstance(trainer, Trainer) and [len(trainer.curve(run)) for run in trainer.started] == [6, 6]
