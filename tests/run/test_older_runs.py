"""Run folders and checkpoints that an older version wrote load, evaluate, predict and go on.

`tests/fixtures/runs_45a0086` holds two runs of ten steps, written before rooms and contracts were redrawn, and in
expected.json what that version said of them.
"""

import json
import shutil
from pathlib import Path

import pytest

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.metrics_file import read_metrics

OLD = Path(__file__).parents[1] / "fixtures" / "runs_45a0086"
EXPECTED = json.loads((OLD / "expected.json").read_text())
SOURCE = {"sasrec": "plays.csv", "clicks": "clicks.csv"}


@pytest.fixture(params=["sasrec", "clicks"])
def kind(request, tmp_path, monkeypatch):
    """A folder with the data, the config and `runs/tiny` of an older version, which is the current one."""
    for file in (OLD / request.param).iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    shutil.copytree(OLD / request.param / "tiny_run", tmp_path / "runs" / "tiny")
    monkeypatch.chdir(tmp_path)
    return request.param


def test_it_evaluates_to_the_same_numbers(kind):
    """But for AUC, which bins made inexact then: of 30 examples, one pair that they tied is told apart now."""
    found = jx.load("runs/tiny").evaluate()
    assert found.keys() == EXPECTED[kind]["evaluate"].keys()
    for name, value in EXPECTED[kind]["evaluate"].items():
        assert found[name] == pytest.approx(value, abs=3e-3 if name.endswith("auc") else 1e-6), name


def test_it_predicts_the_same(kind):
    model = jx.load("runs/tiny")
    table = model.predict(SOURCE[kind], top=3) if kind == "sasrec" else model.predict(SOURCE[kind])
    for name, values in EXPECTED[kind]["predict"].items():
        found = table[name].to_pylist()[: len(values)]
        assert found == (pytest.approx(values, abs=1e-5) if isinstance(values[0], float) else values)


def test_it_goes_on(kind, no_report):
    assert main(["train", "my.yaml", "checkpoint.keep=1", "run.steps=20"]) == 0
    summary = json.loads(Path("runs/tiny/summary.json").read_text())
    assert summary["step"] == 20
    for name, value in EXPECTED[kind]["resumed"].items():
        assert summary[name] == pytest.approx(value, abs=3e-3 if name.endswith("auc") else 2e-3), name
    assert {name: summary[name] for name in EXPECTED[kind]["baselines"]} == EXPECTED[kind]["baselines"]
    events = [line["event"] for line in read_metrics("runs/tiny/metrics.jsonl") if "event" in line]
    assert events == ["resumed"]
    about = json.loads(Path("runs/tiny/about.json").read_text())
    assert about["metrics"]["ndcg@10" if kind == "sasrec" else "log_loss"]["better"] == (
        "higher" if kind == "sasrec" else "lower"
    )


def test_its_checkpoints_are_listed_and_verified(kind, capsys):
    assert main(["ckpt", "verify", "runs/tiny"]) == 0 and main(["ckpt", "list", "runs/tiny"]) == 0
    assert main(["runs"]) == 0 and "tiny" in capsys.readouterr().out
