"""How a run stands is told rightly from whatever it left: a lock, a summary, a log, or pieces of them."""

import datetime as dt
import fcntl
import json
import os
import subprocess
import sys
import time

import pytest
import yaml

from jaxops.core.failures import UserError
from jaxops.report.folder import read_run
from jaxops.run.folder.listing import Standing, compare_runs, is_held, list_runs, standing

CONFIG = {
    "evaluate": {"metrics": ["hr@10", "ndcg@10"], "stop": None},
    "checkpoint": {"best": None},
    "run": {"steps": 400},
}
NOW = 1_800_000_000.0
"""When the runs here are made to have logged."""


def make(folder, *, log=(), summary=None, config=CONFIG, written=NOW, start=NOW - 400):
    """A run folder: `log` holds (step, values) or (step, values, time); the summary is written at `written`."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if log:
        lines = [{"v": 1, "step": s, "time": (at or [start + s])[0], **values} for s, values, *at in log]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
        os.utime(folder / "summary.json", (written, written))
    return folder


LOSS = [(step, {"train/loss": 1.0}) for step in (100, 200, 300)]


@pytest.mark.parametrize(
    ("summary", "log", "state", "step", "reason"),
    [
        ({"state": "finished", "reason": "finished", "step": 300}, LOSS, "finished", 300, ""),
        ({"state": "finished", "reason": "no better valid/hr@10", "step": 300}, LOSS, "finished", 300, "no better"),
        ({"state": "interrupted", "step": 300, "finished": NOW}, LOSS, "interrupted", 300, ""),
        # A failed run's summary has the step of its last checkpoint; the log has gone further.
        ({"state": "failed", "reason": "RunFailed: nan", "step": 100}, LOSS, "failed", 300, "RunFailed: nan"),
        ({"state": "failed", "reason": "RunFailed: nan", "step": 0}, [], "failed", 0, "RunFailed: nan"),
        (None, LOSS, "stopped", 300, "killed"),
        (None, [], "stopped", None, "killed"),
        # Resumed after the summary, then killed.
        ({"state": "finished", "step": 200, "finished": NOW - 200}, LOSS, "stopped", 300, "killed"),
        ({"state": "interrupted", "step": 300, "finished": NOW - 150}, LOSS, "stopped", 300, "killed"),
        ({"state": "rolled back", "step": 300, "finished": "2027-01-15T08:00:00Z"}, LOSS, "rolled back", 300, ""),
        ({"step": 300}, LOSS, "stopped", 300, "killed"),
    ],
)
def test_states_without_a_holder(tmp_path, summary, log, state, step, reason):
    found = standing(read_run(make(tmp_path / "r", summary=summary, log=log)))
    assert (found.state, found.step) == (state, step)
    assert reason in found.reason if reason else found.reason == ""


def test_a_failed_run_that_was_resumed_and_killed_has_not_failed(tmp_path):
    summary = {"state": "failed", "reason": "RunFailed: nan", "step": 100}
    run = read_run(make(tmp_path / "r", summary=summary, log=LOSS, written=NOW - 250))
    assert standing(run).state == "stopped"


HOLD = (
    "import fcntl, sys, time\nf = open(sys.argv[1], 'a+')\nfcntl.flock(f, 2)\nprint('held', flush=True)\ntime.sleep(60)"
)


def test_running_is_whose_lock_a_live_process_holds(tmp_path):
    folder = make(tmp_path / "r", summary={"state": "interrupted", "step": 300}, log=LOSS)
    (folder / ".lock").write_text("pid 1")  # left behind by a run that ended
    assert is_held(folder) is False and standing(read_run(folder)).state == "interrupted"
    holder = subprocess.Popen([sys.executable, "-S", "-c", HOLD, str(folder / ".lock")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        assert is_held(folder) is True
        assert standing(read_run(folder)) == Standing("running", "", 300)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert standing(read_run(folder)).state == "interrupted"


def test_asking_leaves_the_lock_free_and_askers_are_no_trainers(tmp_path):
    (tmp_path / ".lock").write_text("")
    with open(tmp_path / ".lock") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert is_held(tmp_path) is False
    with open(tmp_path / ".lock") as trainer:
        fcntl.flock(trainer, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert is_held(tmp_path) is True


def test_a_lock_that_cannot_be_read_leaves_it_open(tmp_path):
    folder = make(tmp_path / "r", log=LOSS)
    (folder / ".lock").mkdir()
    assert is_held(folder) is None and standing(read_run(folder)).state == "unknown"


def test_runs_are_found_below_and_sorted_by_last_activity(tmp_path):
    make(tmp_path / "old", log=[(1, {}, NOW - 500)])
    make(tmp_path / "sweep" / "lr=0.1", log=[(1, {}, NOW - 20)])
    make(tmp_path / "sweep" / "lr=0.2", log=[(1, {}, NOW - 10)])
    make(tmp_path / "new", log=[(1, {}, NOW - 30)], summary={"state": "finished", "finished": NOW})
    make(tmp_path / "new" / "inside")  # within a run: not another one
    make(tmp_path / ".hidden")
    (tmp_path / "empty").mkdir()
    (tmp_path / "compare.html").write_text("")
    found = list_runs(tmp_path)
    assert [run.name for run in found] == ["new", "sweep/lr=0.2", "sweep/lr=0.1", "old"]
    assert found[1].path == tmp_path / "sweep" / "lr=0.2"
    assert found[0].last_activity == dt.datetime.fromtimestamp(NOW, dt.UTC)
    assert [run.name for run in list_runs(tmp_path / "old")] == ["old"]
    assert list_runs(tmp_path / "empty") == []


def test_last_activity_is_that_of_the_files_where_nothing_was_logged(tmp_path):
    folder = make(tmp_path / "r")
    os.utime(folder / "config.yaml", (NOW, NOW))
    assert list_runs(tmp_path)[0].last_activity == dt.datetime.fromtimestamp(NOW, dt.UTC)


CURVES = [
    (100, {"valid/hr@10": 0.3, "valid/ndcg@10": 0.1, "valid/rmse": 1.5}),
    (200, {"valid/hr@10": 0.2, "valid/ndcg@10": 0.2, "valid/rmse": 1.25}),
    (300, {"valid/hr@10": 0.3, "valid/ndcg@10": 0.15, "valid/rmse": 1.75}),
]


@pytest.mark.parametrize(
    ("best", "stop", "expected"),
    [
        (None, None, ("hr@10", 0.3, 100)),
        (None, "ndcg@10", ("ndcg@10", 0.2, 200)),
        ("rmse", "ndcg@10", ("rmse", 1.25, 200)),
        ("hr@20", None, ("hr@20", None, None)),
    ],
)
def test_the_best_is_of_the_metric_that_the_run_goes_by(tmp_path, best, stop, expected):
    config = {
        **CONFIG,
        "checkpoint": {"best": best},
        "evaluate": {**CONFIG["evaluate"], "stop": stop and {"metric": stop}},
    }
    make(tmp_path / "r", log=CURVES, config=config)
    (run,) = list_runs(tmp_path)
    assert (run.metric, run.best, run.best_step) == expected


def test_without_a_log_the_best_is_the_summary_s(tmp_path):
    make(tmp_path / "r", summary={"state": "finished", "step": 9, "best_step": 7, "valid/hr@10": 0.5})
    (run,) = list_runs(tmp_path)
    assert (run.best, run.best_step, run.step) == (0.5, 7, 9)


def test_wall_time_is_the_summary_s_else_the_log_s_without_pauses(tmp_path):
    make(tmp_path / "done", log=LOSS, summary={"state": "finished", "wall_s": 77.5})
    event = {"event": "resumed", "text": ""}
    log = [(100, {}, NOW), (200, {}, NOW + 10), (200, event, NOW + 5000), (300, {}, NOW + 5020)]
    make(tmp_path / "killed", log=log)
    make(tmp_path / "bare")
    assert {run.name: run.wall_s for run in list_runs(tmp_path)} == {"done": 77.5, "killed": 30.0, "bare": None}


def test_the_length_is_not_claimed_of_a_run_that_went_past_it(tmp_path):
    make(tmp_path / "a", log=LOSS)
    make(tmp_path / "b", log=[(500, {})])
    make(tmp_path / "c", log=[(500, {})], summary={"state": "finished", "step": 500, "steps": 600})
    assert {run.name: run.steps for run in list_runs(tmp_path)} == {"a": 400, "b": None, "c": 600}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "[1, 2]"),
        ("summary.json", '{"state": [], "step": "x", "wall_s": {}, "finished": "soon", "reason": 3}'),
        ("summary.json", '{"state": "finished", "step": NaN, "steps": 1e400, "best_step": {}}'),
        ("summary.json", '{"state": "fini'),
        ("config.yaml", "- 1\n"),
        ("config.yaml", "run: [1\n"),
        ("config.yaml", "run: {steps: many}\nevaluate: {metrics: [[1]]}\ncheckpoint: 4\n"),
        ("config.yaml", "a: &a [*a]\n"),
        ("metrics.jsonl", '{"v": 9, "step": 1}\n'),
        ("metrics.jsonl", '{"v": 1, "step": 1, "time": 1e300, "valid/hr@10": "x"}\n'),
        ("metrics.jsonl", '{"v": 1, "step": -3, "event": "resumed"}\nhalf a li'),
        ("metrics.jsonl", "\x00\xff"),
    ],
)
def test_no_folder_stops_the_listing(tmp_path, name, content):
    for broken in ("only", "beside"):
        folder = tmp_path / broken
        if broken == "only":
            folder.mkdir()
        else:
            make(folder, log=CURVES, summary={"state": "finished", "step": 300})
        (folder / name).write_text(content, encoding="latin-1")
    made = make(tmp_path / "good", log=CURVES)
    other = tmp_path / "strange"
    other.mkdir()
    (other / "config.yaml").mkdir()
    assert {run.name for run in list_runs(tmp_path)} == {"only", "beside", "good", "strange"}
    compare_runs([tmp_path / "only", tmp_path / "beside", made, other])


def test_what_cannot_be_read_is_named(tmp_path):
    folder = make(tmp_path / "r", log=LOSS)
    (folder / "summary.json").write_text("{")
    (run,) = list_runs(tmp_path)
    assert run.state == "unknown" and "summary.json is not JSON" in run.reason and run.step == 300
    assert run.problems == [run.reason]


def test_a_folder_that_is_not_there_is_said_with_the_nearest(tmp_path):
    (tmp_path / "movielens").mkdir()
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "movilens", "did you mean 'movielens'"),
        (tmp_path / "no" / "where", "there is no folder"),
        (tmp_path / "file", "is a file"),
        ("ftp://host/runs", "ftp:// is not known"),
    ):
        with pytest.raises(UserError, match=message):
            list_runs(path)


def test_what_cannot_be_compared_is_refused(tmp_path):
    runs = [make(tmp_path / f"r{i}", log=LOSS) for i in range(9)]
    (tmp_path / "bare").mkdir()
    for paths, message in (
        (runs[:1], "2 to 8 runs .*got 1"),
        (runs, "2 to 8 runs .*got 9"),
        ([runs[0], tmp_path / "bare" / ".." / "r0"], "given twice"),
        ([runs[0], tmp_path / "bare"], "not a run: it holds none of config.yaml"),
        ([runs[0], tmp_path / "r10"], "there is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            compare_runs(paths)
    assert len(compare_runs(runs[:8]).sides) == 8


def test_labels_are_names_or_what_tells_the_paths_apart(tmp_path):
    named = {**CONFIG, "run": {"name": "a"}}
    paths = [make(tmp_path / place, config=named) for place in ("x/a", "y/a", "y/b")]
    assert [side.label for side in compare_runs(paths[::2]).sides] == ["a", "b"]
    assert [side.label for side in compare_runs(paths).sides] == ["x/a", "y/a", "y/b"]
    other = make(tmp_path / "z", config={**CONFIG, "run": {"name": "other"}})
    assert [side.label for side in compare_runs([paths[0], other]).sides] == ["a", "other"]


def test_sides_stand_as_listed(tmp_path):
    now = time.time()
    paths = [
        make(tmp_path / "a", log=LOSS, summary={"state": "failed", "reason": "why", "step": 0, "wall_s": 5.0}),
        make(tmp_path / "b", log=LOSS, start=now),
    ]
    a, b = compare_runs(paths).sides
    assert (a.state, a.reason, a.step, a.steps, a.wall_s) == ("failed", "why", 300, 400, 5.0)
    assert (b.state, b.step, b.steps, b.wall_s) == ("stopped", 300, 400, 200.0)
