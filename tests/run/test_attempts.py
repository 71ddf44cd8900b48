"""What a run records of the attempts that something else has started, and what a person sees of it."""

import json
import time

import pytest

from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.report.attempts import attempt_rows, read_attempts
from jaxops.report.folder import read_run
from jaxops.report.page import render_report
from jaxops.run.attempts import FILE, MOST, Attempts, attempt_facts
from jaxops.run.folder.run_folder import RunFolder

FACTS = {"attempt": 1, "chips": 16, "accelerator": "v6e-16", "price": "spot", "labels": {"team": "ranking"}, "began": 0}


def attempt(folder: RunFolder, began: float, seen: float, state: str | None, **facts) -> None:
    made = Attempts(folder, {**FACTS, "began": began, **facts}, now=lambda: seen)
    made.begin()
    made.update(state)


def test_chip_hours_count_from_the_start_of_each_worker_and_preemptions_are_those_that_went_on(tmp_path):
    folder = RunFolder(tmp_path)
    attempt(folder, 0, 3600, "preempted")
    attempt(folder, 4000, 4000 + 1800, None)  # killed
    attempt(folder, 6000, 6000 + 900, "interrupted")
    attempt(folder, 7000, 7000 + 900, "finished", chips=8)
    found = read_attempts(folder.read_json(FILE))
    assert (found.count, found.preemptions, found.chip_hours) == (4, 2, 16 * 1.75 + 8 * 0.25)
    rows = dict(attempt_rows(folder.read_json(FILE)))
    assert rows["Launched"] == "4 attempts, 2 preemptions, 30.00 chip-hours on v6e-16, spot"
    assert rows["Launch: labels"] == "team=ranking"


@pytest.mark.parametrize("text", ["[]", '{"attempts": 3}', '{"attempts": [4]}', '{"attempts": []}'])
def test_a_damaged_record_says_nothing(text):
    found = json.loads(text)
    assert read_attempts(found if isinstance(found, dict) else {}) is None


def test_unknown_chips_make_no_number_of_hours(tmp_path):
    folder = RunFolder(tmp_path)
    attempt(folder, 0, 3600, "preempted", chips=None)
    attempt(folder, 0, 3600, "finished")
    assert read_attempts(folder.read_json(FILE)).chip_hours is None


def test_a_run_that_nothing_started_writes_nothing(tmp_path):
    made = Attempts(RunFolder(tmp_path), attempt_facts({}))
    made.begin()
    made.update("finished")
    assert not list(tmp_path.iterdir())


def test_the_record_stays_small(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json(FILE, {"attempts": [{"attempt": n} for n in range(MOST)]})
    attempt(folder, 0, 1, None, attempt=MOST)
    kept = folder.read_json(FILE)["attempts"]
    assert len(kept) == MOST and (kept[0]["attempt"], kept[-1]["attempt"]) == (1, MOST)


@pytest.mark.parametrize("text", ["x", "[1]", "3"])
def test_facts_that_are_no_object_are_refused(text):
    with pytest.raises(UserError, match="JAXOPS_ATTEMPT: expected a JSON object"):
        attempt_facts({"JAXOPS_ATTEMPT": text})


def test_a_run_that_goes_on_adds_its_attempt_and_shows_both(finished, no_report, monkeypatch, capsys):
    earlier = {**FACTS, "began": 0, "seen": 360, "state": "preempted"}
    (finished / FILE).write_text(json.dumps({"attempts": [earlier]}))
    monkeypatch.setenv("JAXOPS_ATTEMPT", json.dumps({**FACTS, "attempt": 2, "began": time.time() - 3600}))
    assert main(["train", "my.yaml", "run.steps=22"]) == 0
    capsys.readouterr()
    assert main(["runs", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["state"], run["attempts"], run["preemptions"]) == ("finished", 2, 1)
    assert 16 * 1.1 <= run["chip_hours"] < 16 * 1.3
    assert json.loads((finished / FILE).read_text())["attempts"][1]["state"] == "finished"
    assert "2 attempts, 1 preemption" in render_report(read_run(finished))
