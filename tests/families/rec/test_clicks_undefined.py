"""Clicks that cannot be judged are said to be, and cost no training; AUC is exact; predictions can be joined."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.evaluate.grouped import area_under_curve_exact

CONFIG = """
task: rec
data:
  kind: clicks
  path: rows.parquet
  labels: {click: {column: y}}
  columns: {user: who, item: what, time: at}
  categorical: [what, shop]
  split: {kind: fractions, valid: 0.2, test: 0.2, by: time}
tables: {what: {dim: 4}, shop: {dim: 4}}
model: {kind: dcnv2, cross_layers: 1, rank: 4, deep: [8]}
objective: {kind: clicks}
batch: {global: 16}
evaluate: {every: 4, metrics: [auc, gauc, log_loss], batch: 16, slices: [shop]}
checkpoint: {best: auc}
run: {name: tiny, dir: runs, steps: 8, log_every: 4, loggers: []}
"""


@pytest.fixture(autouse=True)
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(2)
    table = {
        "who": [f"u{x % 9}" for x in range(200)],
        "what": draw.integers(0, 12, 200),
        "shop": [["a", "b"][x] for x in draw.integers(0, 2, 200)],
        "at": range(200),
        "y": draw.integers(0, 2, 200),
        "session": [f"s{x}" for x in range(200)],
    }
    pq.write_table(pa.table(table), "rows.parquet")
    Path("my.yaml").write_text(CONFIG)
    return table


def write(rows, **changed):
    pq.write_table(pa.table({**rows, **changed}), "rows.parquet")


def test_validation_of_one_class(rows, capsys):
    """The run is finished and saved, what is undefined is called so, and the latest checkpoint is served."""
    one = [int(y) if at < 120 or at >= 160 else 0 for at, y in enumerate(rows["y"])]
    write(rows, y=one)
    assert main(["train", "my.yaml"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "valid/auc is undefined: all of its 40 examples are non-clicks" in said
    assert "checkpoint.best: auc is undefined on validation, so no checkpoint is the best by it" in said
    assert "take log_loss, or set" not in said and "valid: auc undefined gauc undefined log_loss 0." in said
    summary = json.loads(Path("runs/tiny/summary.json").read_text())
    assert summary["state"] == "finished" and summary["best_step"] == 8
    assert summary["valid/auc"] is None and 0 < summary["test/auc"] < 1
    assert "valid/auc is undefined: all of its 40" in Path("runs/tiny/report.html").read_text()
    assert main(["evaluate", "runs/tiny"]) == 0 and "undefined" in capsys.readouterr().out
    assert main(["ckpt", "verify", "runs/tiny"]) == 0
    assert main(["train", "my.yaml", "run.steps=12"]) == 0  # and it goes on
    early = ["run.name=early", "evaluate.stop={metric: auc, patience: 2}"]
    assert main(["train", "my.yaml", *early]) == 2
    said = capsys.readouterr().err
    assert "evaluate.stop.metric: auc is undefined on validation (all of its 40" in said and "take log_loss" in said
    assert not Path("runs/early").exists()


def test_no_user_of_both_classes(rows):
    write(rows, y=[x % 9 % 2 for x in range(200)])
    task = jx.build_task(jx.load_config("my.yaml"))
    assert task.undefined["valid"] == {"gauc": "no user of it has both a click and a non-click"}
    with pytest.raises(UserError, match=r"gauc is undefined on validation .no user of it has both"):
        jx.fit(jx.build_task(jx.load_config("my.yaml", ["evaluate.stop={metric: gauc}"])), quiet=True)


def test_auc_of_a_run_is_that_of_what_it_predicts(rows, monkeypatch):
    """Of validation, of test and of a slice, by the probabilities that `predict` gives for the rows in float64."""
    monkeypatch.setattr("jaxops.report.page.write_report", lambda run: run)
    run = jx.fit(jx.build_task(jx.load_config("my.yaml", ["optimizer.lr=1e-6", "checkpoint.best=null"])), quiet=True)
    model = jx.load(run.dir)
    table = model.predict("rows.parquet")
    p, y, shop = (table[name].to_numpy(zero_copy_only=False) for name in ("click", "y", "shop"))
    logit = np.log(p.astype(np.float64)) - np.log1p(-p.astype(np.float64))
    assert np.ptp(logit) < 1  # hardly trained: all scores are close to each other
    for part, at in (("valid", slice(120, 160)), ("test", slice(160, 200))):
        assert run.summary[f"{part}/auc"] == pytest.approx(area_under_curve_exact(y[at], logit[at]), abs=5e-3)
        inside = shop[at] == "a"
        expected = area_under_curve_exact(y[at][inside], logit[at][inside])
        assert run.summary[f"{part}/auc[shop=a]"] == pytest.approx(expected, abs=5e-3)
    assert model.evaluate() == pytest.approx({key: run.summary[key] for key in model.evaluate()}, abs=1e-6)


def test_predictions_have_the_columns_of_their_rows(rows, monkeypatch):
    monkeypatch.setattr("jaxops.report.page.write_report", lambda run: run)
    run = jx.fit(jx.build_task(jx.load_config("my.yaml", ["run.steps=2"])), quiet=True)
    model = jx.load(run.dir)
    table = model.predict("rows.parquet")
    assert table.column_names == ["user", "item", "who", "what", "shop", "at", "y", "session", "click"]
    assert table["session"].to_pylist() == rows["session"] and table["user"] == table["who"]
    found = model.predict(pa.table({**rows, "click": range(200), "user": range(200), "user_given": ["x"] * 200}))
    assert found["click"].equals(table["click"]) and found["user"].equals(table["user"])  # answers keep their names
    assert found["click_given"].to_pylist() == found["user_given_given"].to_pylist() == list(range(200))
    alone = model.predict(pa.table({name: rows[name] for name in ("what", "shop")}))
    assert alone.column_names == ["item", "what", "shop", "click"]
    with open("rows.csv", "w") as file:
        file.write("shop,key,what\na,007,3\nb,x,4\n")
    assert model.predict("rows.csv")["key"].to_pylist() == ["007", "x"]
