"""`jaxops train` from start to finish: what it leaves, what it prints, and that the same command again goes on."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxops.cli.main import main
from jaxops.core.metrics_file import read_metrics
from jaxops.run.load import load

pytestmark = pytest.mark.usefixtures("no_report")
METRICS = ("hr@10", "ndcg@10", "mrr@10")
NUMBERS = [f"{part}/{metric}" for part in ("valid", "test") for metric in METRICS]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def events(run: Path) -> list[str]:
    return [line["event"] for line in read_metrics(run / "metrics.jsonl") if "event" in line]


@pytest.mark.latest
def test_a_finished_run_leaves_everything_that_the_design_names(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "data.json",
        "summary.json",
        "report.html",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    found = summary(finished)
    assert found["version"] == 1 and found["name"] == "tiny" and found["state"] == "finished"
    assert found["step"] == found["steps"] == 20 and found["best_step"] in (10, 20)
    assert found["device"].startswith("8 x cpu, jax ")
    for name in [*NUMBERS, *(f"baseline/{b}/{n}" for b in ("most_popular", "item_knn") for n in NUMBERS)]:
        assert 0 <= found[name] <= 1
    assert found["baseline/item_knn/test/ndcg@10"] > found["baseline/most_popular/test/ndcg@10"]
    assert (finished / "report.html").read_text().count("ndcg@10") > 1
    data = json.loads((finished / "data.json").read_text())
    assert data["users"] == 60 and data["items"] == 30 and len(data["split"]["sha256"]) == 64


def test_metrics_have_a_line_for_each_window_and_each_evaluation(finished):
    lines = read_metrics(finished / "metrics.jsonl")
    assert {line["v"] for line in lines} == {1}
    windows = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in windows] == [5, 10, 15, 20]
    names = (
        "train/loss/softmax",
        "train/lr",
        "train/examples_per_s",
        "train/grad_norm",
        "train/tflops_per_s",
    )
    assert all(math.isfinite(line[name]) for line in windows for name in names)
    assert windows[0]["train/lr"] == pytest.approx(1e-3)
    assert windows[-1]["train/loss"] < windows[0]["train/loss"]
    valid = [line for line in lines if "valid/ndcg@10" in line]
    assert [line["step"] for line in valid] == [10, 20]
    assert valid[-1]["valid/ndcg@10"] == summary(finished)["valid/ndcg@10"]
    assert [line["step"] for line in lines if "test/ndcg@10" in line] == [20]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_again_says_finished_and_more_steps_go_on(finished, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert main(["train", "my.yaml", "--json"]) == 0
    told = capsys.readouterr()
    assert "runs/tiny is finished (step 20); nothing to do" in told.err and "compiling" not in told.err
    again = json.loads(told.out)
    assert again.pop("dir") == "runs/tiny" and again == summary(finished)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before

    assert main(["train", "my.yaml", "run.steps=null", "run.epochs=4"]) == 0
    told = capsys.readouterr()
    assert "resumed from step 20" in told.err and "report: runs/tiny/report.html" in told.err
    found = summary(finished)
    assert found["state"] == "finished" and found["step"] == found["steps"] > 20
    assert events(finished) == ["resumed"]
    assert "epochs: 4" in (finished / "config.yaml").read_text()


def test_json_is_one_object_and_people_read_stderr(folder, capsys):
    overrides = ["run.steps=2", "evaluate.every=2", "evaluate.baselines=false"]
    assert main(["train", "my.yaml", "--json", *overrides]) == 0  # overrides may follow a flag
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["dir"] == "runs/tiny" and found["step"] == 2 and set(NUMBERS) <= found.keys()
    assert "tiny: 8 x cpu, jax" in told.err and "parameters" in told.err
    assert "compiling train_step ..." in told.err and " s\n" in told.err
    assert "model" in told.err and "ndcg@10" in told.err
    assert f"{found['test/ndcg@10']:.4f}" in told.err


@pytest.mark.latest
def test_smoke_leaves_nothing(folder, capsys):
    before = sorted(folder.rglob("*"))
    warm_up = "optimizer.schedule={kind: constant, warmup: 500}"  # longer than any smoke test
    assert main(["train", "my.yaml", "--smoke", "run.epochs=3", "run.steps=null", warm_up]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("smoke test passed: 2 steps, restore, 1 more on 8 x cpu, jax")
    assert [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts] == before


def test_a_second_process_is_told_who_holds_the_run(finished, capsys):
    from jaxops.run.folder.run_folder import RunFolder

    with RunFolder(finished).locked():
        assert main(["train", "my.yaml", "run.steps=30"]) == 2
    said = capsys.readouterr().err
    assert "run runs/tiny is being trained by another process (pid " in said and "set run.name" in said
    assert summary(finished)["step"] == 20


def test_a_run_that_fails_says_why_with_status_1(folder, capsys):
    high = ["optimizer={kind: sgd, lr: 1e30, clip: null}", "run.steps=6", "run.log_every=1"]
    assert main(["train", "my.yaml", *high]) == 1
    said = capsys.readouterr().err
    assert "is not finite at step" in said and "lower optimizer.lr" in said and "Traceback" not in said
    found = summary(Path("runs/tiny"))
    assert found["state"] == "failed" and "not finite" in found["reason"]


def test_a_new_run_can_begin_with_the_parameters_of_another(finished, capsys):
    argv = [
        "train",
        "my.yaml",
        "run.name=next",
        "init_from.run=runs/tiny",
        "run.steps=1",
        "optimizer.lr=1e-9",
    ]
    assert main([*argv, "evaluate.baselines=false"]) == 0
    assert "init_from runs/tiny: 20 parameters loaded" in capsys.readouterr().err
    # one step of next to nothing: the model is still the other run's
    ours, theirs = load("runs/next").item_vectors(), load("runs/tiny").item_vectors()
    pairs = zip(ours["vector"].to_pylist(), theirs["vector"].to_pylist(), strict=True)
    assert max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)) < 1e-6


def test_early_stopping_is_the_end_until_its_rule_changes(folder, capsys):
    stop = [
        "evaluate.every=1",
        "evaluate.stop={metric: hr@10, patience: 2}",
        "optimizer.lr=1e-12",
        "run.steps=9",
    ]
    stop += ["evaluate.baselines=false", "run.log_every=1"]
    assert main(["train", "my.yaml", *stop]) == 0
    run = Path("runs/tiny")
    found = summary(run)
    assert found["step"] == 3 and found["reason"] == "no better valid/hr@10 in 2 evaluations"
    assert events(run) == ["stopped"]
    capsys.readouterr()
    assert main(["train", "my.yaml", *stop, "run.steps=20"]) == 0
    assert "is finished (step 3, no better valid/hr@10 in 2 evaluations)" in capsys.readouterr().err
    # more patience: the count of two goes on, and three more bad ones end it
    assert main(["train", "my.yaml", *stop, "evaluate.stop.patience=5"]) == 0
    assert summary(run)["step"] == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_anything_is_there_to_save_ends_with_a_word(folder, number):
    """In the middle of the imports: as a scheduler that changes its mind would send it."""
    code = f"import os; os.kill(os.getpid(), {int(number)})"
    (folder / "yaml.py").write_text(code)  # what jaxops imports first of all
    program = "import sys; sys.argv[0] = 'jaxops'; from jaxops.cli.main import script; script()"
    argv = [sys.executable, "-c", program, "train", "my.yaml"]
    repository = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(folder), str(repository)])
    done = subprocess.run(argv, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == f"jaxops: stopped by {number.name}: there was nothing to save\n"
    assert not (folder / "runs").exists()
