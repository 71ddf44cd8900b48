"""What is one's own comes in by import path, from a package in the current folder: loss, data, logger."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.metrics_file import read_metrics
from jaxops.objectives.ranking import softmax
from jaxops.run.build import build_task, load_config
from jaxops.run.fit import fit
from jaxops.run.load import load

pytestmark = pytest.mark.usefixtures("no_report")
QUICK = ["evaluate.baselines=false", "run.log_every=1"]


def summary(name: str = "tiny") -> dict:
    return json.loads(Path(f"runs/{name}/summary.json").read_text())


def losses(name: str = "tiny") -> list[float]:
    return [line["train/loss"] for line in read_metrics(f"runs/{name}/metrics.jsonl") if "train/loss" in line]


def test_a_loss_of_ones_own_trains(folder):
    focal = "objective={fn: 'ownpkg.losses:focal', gamma: 2.0}"
    assert main(["train", "my.yaml", focal, "run.steps=10", "optimizer.lr=0.03", *QUICK]) == 0
    lines = [line for line in read_metrics("runs/tiny/metrics.jsonl") if "train/loss" in line]
    assert all(line["train/loss/focal"] == line["train/loss"] for line in lines)
    assert losses()[-1] < losses()[0]
    # (1 - p)^2 is all but one at the start, where every item is as likely: -log(1/30)
    assert losses()[0] == pytest.approx(np.log(30) * (29 / 30) ** 2, rel=0.02)
    assert "fn: ownpkg.losses:focal" in Path("runs/tiny/config.yaml").read_text()
    assert load("runs/tiny").step == summary()["best_step"]
    # another gamma is another run
    assert main(["train", "my.yaml", focal.replace("2.0", "3.0"), "run.steps=10", *QUICK]) == 2


def test_a_loss_can_be_handed_over_in_python(folder):
    def weighted(model, scale):
        inner = softmax(model)

        def objective(params, batch, key):
            term = inner(params, batch, key)["loss/softmax"]
            return {"loss/weighted": jx.Sum(scale * term.total, term.count)}

        return objective

    plain = fit(build_task(load_config("my.yaml", ["run.name=plain", "run.steps=1", *QUICK])), quiet=True)
    loaded = load_config("my.yaml", ["run.name=own", "run.steps=1", *QUICK])
    found = fit(build_task(loaded, objective=functools.partial(weighted, scale=2.0)), quiet=True)
    assert plain.state == found.state == "finished"
    assert losses("own")[0] == pytest.approx(2 * losses("plain")[0], rel=1e-6)
    text = Path("runs/own/config.yaml").read_text()
    assert "weighted" in text and "scale: 2.0" in text
    # the same again is the same run; another scale is not
    assert fit(build_task(loaded, objective=functools.partial(weighted, scale=2.0)), quiet=True).state == "finished"
    with pytest.raises(jx.UserError, match=r"objective.scale: 2.0 there, 3.0 here"):
        fit(build_task(loaded, objective=functools.partial(weighted, scale=3.0)), quiet=True)


def test_data_of_ones_own_trains_and_evaluates(folder, capsys):
    own = ["data={fn: 'ownpkg.data:make', seed: 3}", "optimizer.lr=0.02", "run.steps=30", *QUICK]
    assert main(["train", "my.yaml", *own]) == 0
    found = summary()
    assert found["test/hr@10"] == found["valid/hr@10"] > 0.5  # every walk goes on as it began, so it is learnt
    assert losses()[-1] < losses()[0]
    capsys.readouterr()
    assert main(["evaluate", "runs/tiny", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["test/ndcg@10"] == pytest.approx(found["test/ndcg@10"], abs=1e-7)
    assert json.loads(Path("runs/tiny/data.json").read_text())["source"] == "ownpkg.data:make"
    assert main(["export", "runs/tiny", "v.parquet"]) == 0
    # its items are rows 1 to n_items, so that is what a prediction takes and gives
    Path("e.csv").write_text("user,item,time\n7,1,1\n7,3,2\n")
    assert main(["predict", "runs/tiny", "e.csv", "--top", "3", "--out", "p.parquet"]) == 0
    table = load("runs/tiny").predict("e.csv", 28)
    assert sorted(table["item"].to_pylist()) == [item for item in range(1, 31) if item not in (1, 3)]


def test_a_logger_of_ones_own_gets_every_record(folder):
    logger = "run.loggers=[{fn: 'ownpkg.loggers:Lines', path: mine.jsonl}]"
    assert main(["train", "my.yaml", logger, "run.steps=4", "evaluate.every=2", *QUICK]) == 0
    mine = [json.loads(line) for line in Path("mine.jsonl").read_text().splitlines()]
    theirs = [line for line in read_metrics("runs/tiny/metrics.jsonl") if "event" not in line]
    assert mine == [{name: value for name, value in line.items() if name not in ("v", "time")} for line in theirs]
    assert [line["step"] for line in mine if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in mine if "valid/ndcg@10" in line] == [2, 4]


def test_a_bug_in_code_of_ones_own_is_its_own_traceback_and_leaves_no_run(folder):
    with pytest.raises(KeyError, match="no_such_key"):
        main(["train", "my.yaml", "objective={fn: 'ownpkg.losses:crash'}"])
    assert not Path("runs").exists()
