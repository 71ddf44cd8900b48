"""A family that jaxops does not know: every command and every promise holds for it, and no shared file was touched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.metrics_file import read_metrics
from jaxops.core.sharding import named_leaves

CONFIG = """\
task: toy_family:FAMILY
letters: 8
optimizer: {kind: sgd, lr: 4.0, clip: null}
batch: {global: 16}
checkpoint: {every: 2, best: nll}
run: {name: toy, steps: 12, log_every: 2, loggers: []}
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with the family's module and a config, which is the current one."""
    shutil.copy(Path(__file__).parents[1] / "toy_family.py", tmp_path)
    (tmp_path / "toy.yaml").write_text(CONFIG)
    (tmp_path / "letters.csv").write_text("letter\na\nc\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("toy_family", None)


def saved(run: str) -> dict:
    with Checkpoints(f"runs/{run}/checkpoints") as checkpoints:
        return dict(named_leaves(checkpoints.load_params(checkpoints.latest(), "")))


def samples(run: str) -> list:
    lines = Path(f"runs/{run}/samples.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "time"} for line in lines]


def test_it_trains_evaluates_stops_loads_predicts_exports_and_reports(toy, capsys):
    assert main(["train", "toy.yaml"]) == 0
    summary = json.loads(Path("runs/toy/summary.json").read_text())
    assert summary["state"] == "finished" and summary["step"] == summary["best_step"] == 12  # falling is better
    nll = [line["valid/nll"] for line in read_metrics("runs/toy/metrics.jsonl") if "valid/nll" in line]
    assert len(nll) == 6 and nll == sorted(nll, reverse=True)
    assert [line["step"] for line in samples("toy")] == [2, 4, 6, 8, 10, 12, 12]
    assert samples("toy")[-1] == {"v": 1, "step": 12, "part": "test", "prompt": "a", "completion": "abcdef"}
    capsys.readouterr()

    assert main(["evaluate", "runs/toy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test/nll"] == pytest.approx(summary["test/nll"], abs=1e-6)
    assert main(["predict", "runs/toy", "letters.csv", "--out", "out.parquet", "--length", "3"]) == 0
    assert pq.read_table("out.parquet")["text"].to_pylist() == ["abcd", "cdef"]
    assert main(["predict", "runs/toy", "letters.csv", "--out", "no.parquet", "--lenght", "3"]) == 2
    assert "did you mean 'length'?" in capsys.readouterr().err and not Path("no.parquet").exists()
    assert main(["export", "runs/toy", "table.npy"]) == 0 and np.load("table.npy").shape == (8, 8)
    assert jx.load("runs/toy").predict("letters.csv", length=1)["text"].to_pylist() == ["ab", "cd"]

    page = Path("runs/toy/report.html").read_text()
    assert "Letters" in page and "Less is better." in page and "NLL" in page
    for command in (["runs"], ["ckpt", "verify", "runs/toy"], ["config", "toy.yaml"], ["shardings", "toy.yaml"]):
        assert main(command) == 0
    assert main(["train", "toy.yaml", "run.name=other", "letters=6", "run.steps=4"]) == 0
    capsys.readouterr()
    assert main(["compare", "runs/other", "runs/toy", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["results"]["test"]["best"]
    assert best["nll"] == summary["test/nll"]  # the least
    assert main(["train", "toy.yaml", "--smoke"]) == 0


def test_it_stops_where_nothing_gets_better(toy):
    assert main(["train", "toy.yaml", "run.steps=40", "optimizer.lr=1e-12", "run.name=still"]) == 0
    assert json.loads(Path("runs/still/summary.json").read_text())["reason"] == "no better valid/nll in 3 evaluations"
    assert main(["train", "toy.yaml", "run.steps=40", "run.name=falls"]) == 0
    assert json.loads(Path("runs/falls/summary.json").read_text())["step"] == 40


def test_killed_in_the_middle_it_ends_the_same(toy):
    """Parameters bit for bit, metrics and samples line by line."""
    assert main(["train", "toy.yaml", "run.name=whole", "run.steps=40"]) == 0
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(jx.__file__).parents[1]), str(toy)])}
    script = "import time, toy_family\nbatch = toy_family.Letters.batch\n"
    script += "toy_family.Letters.batch = lambda *a: (time.sleep(0.05), batch(*a))[1]\n"
    script += "import sys\nfrom jaxops.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    command = [sys.executable, "-c", script, "train", "toy.yaml", "run.name=cut", "run.steps=40", "--cpu-devices", "8"]
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    file = Path("runs/cut/metrics.jsonl")
    until = time.monotonic() + 120
    while time.monotonic() < until and not (file.exists() and '"step": 10' in file.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 10 <= max(line["step"] for line in read_metrics(file)) < 40
    assert main(["train", "toy.yaml", "run.name=cut", "run.steps=40"]) == 0
    whole, cut = saved("whole"), saved("cut")
    assert whole.keys() == cut.keys() and all(np.array_equal(whole[name], cut[name]) for name in whole)
    assert samples("whole") == samples("cut")
    figures = lambda run: {
        line["step"]: line["valid/nll"] for line in read_metrics(f"runs/{run}/metrics.jsonl") if "valid/nll" in line
    }
    assert figures("whole") == figures("cut")


def test_the_run_names_no_family(toy):
    """Importing what trains loads no family; `run`, `report` and `cli` say none of their names."""
    code = "import sys, jaxops.run.fit, jaxops.run.load, jaxops.report.page, jaxops.cli.commands\n"
    code += "print([name for name in sys.modules if name.startswith('jaxops.families')])"
    env = os.environ | {"PYTHONPATH": str(Path(jx.__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("toy_family:FAMILIE", "'toy_family' has no 'FAMILIE'; did you mean 'FAMILY'?"),
        ("toy_family:Model", "expected a jaxops Family, got type"),
        ("toy_familly:FAMILY", "no module 'toy_familly'"),
        ("reck", "did you mean 'rec'?"),
    ],
)
def test_a_family_that_is_none_is_told(toy, capsys, task, said):
    Path("toy.yaml").write_text(CONFIG.replace("toy_family:FAMILY", task))
    assert main(["train", "toy.yaml"]) == 2
    assert said in capsys.readouterr().err and not Path("runs").exists()


def test_it_is_one_file():
    lines = (Path(__file__).parents[1] / "toy_family.py").read_text().splitlines()
    assert len(lines) < 170 and jax.__version__
