"""What someone who tries jaxops for the first time runs into: lengths, intervals, names of files and of runs, bases."""

import csv
import json
from pathlib import Path

import jax
import pyarrow.parquet as pq
import pytest
import yaml

from jaxops.cli.main import main
from jaxops.config.types import Every
from jaxops.core.metrics_file import read_metrics
from jaxops.run.build import build_task, load_config
from jaxops.run.fit import fit

pytestmark = pytest.mark.usefixtures("no_report")


def refused(*argv: str, capsys) -> str:
    assert main([*argv]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "steps", "back"),
    [
        (100, 100, 100),
        ("1epoch", 76, "1epoch"),
        ("0.5epoch", 38, "0.5epoch"),
        ("2 epochs", 152, "2 epochs"),
        ("100 or 1epoch", 76, "100 or 1epoch"),
        ("100 or 2epochs", 100, "100 or 2epochs"),
    ],
)
def test_every_is_steps_or_epochs_or_the_shorter(text, steps, back):
    every = Every.from_config(text)
    assert every.in_steps(75.9) == steps and every.to_config() == back
    assert Every(epochs=2.0).to_config() == "2epochs" and Every.from_config("10min").in_steps(76) is None
    assert Every(steps=9, epochs=1.0).to_config() == "9 or 1epoch"


@pytest.mark.parametrize(
    "text", ["0epochs", "-1epoch", "epoch", "1 epoc", "0 or 1epoch", "5 or 0epochs", "5 or 10min", "5 or 6", "5 or"]
)
def test_no_every(text):
    with pytest.raises(ValueError):
        Every.from_config(text)


@pytest.mark.parametrize("fields", [{}, {"steps": 1, "seconds": 1.0}, {"seconds": 1.0, "epochs": 1.0}])
def test_no_every_of_python(fields):
    with pytest.raises(ValueError, match="or seconds"):
        Every(**fields)


def test_the_shipped_base_evaluates_small_data_often_enough_to_stop_early(folder):
    """800 users are three to four steps an epoch: `100` alone would never evaluate in 30 epochs of them."""
    small = ["data.path=plays.csv", "data.min_count={user: 1, item: 1}", "run.loggers=[]", "evaluate.baselines=false"]
    small += ["model={dim: 8, layers: 1, heads: 1, length: 6}", "batch.global=24", "run.epochs=30"]
    small += ["optimizer.lr=1e-8", "evaluate.stop.patience=2"]  # nothing gets better, so it stops as soon as it may
    task = build_task(load_config("rec/my_interactions", small))
    epoch = round(task.source.examples / 24)
    assert epoch == 4 and task.steps == 119
    assert task.config.evaluate.every == Every(steps=100, epochs=1.0)
    run = fit(task, quiet=True)
    assert run.summary["reason"] == "no better valid/ndcg@10 in 2 evaluations" and run.summary["step"] == 12
    assert evaluated("my-interactions") == [4, 8, 12]


def evaluated(run: str) -> list[int]:
    return [line["step"] for line in read_metrics(f"runs/{run}/metrics.jsonl") if "valid/ndcg@10" in line]


def test_evaluation_by_epochs_and_by_the_clock(folder):
    task = build_task(load_config("my.yaml", ["evaluate.every=1epoch", "evaluate.baselines=false", "run.name=epochs"]))
    epoch = round(task.source.examples / 16)
    fit(task, quiet=True)
    assert 1 < epoch < 20 and evaluated("epochs") == [*range(epoch, 20, epoch), 20]
    clock = ["evaluate.baselines=false", "checkpoint.best=null"]
    for run, every, steps in (("fast", "1ms", [5, 10, 15, 20]), ("slow", "1h", [20])):
        fit(build_task(load_config("my.yaml", [*clock, f"evaluate.every={every}", f"run.name={run}"])), quiet=True)
        assert evaluated(run) == steps


def test_of_steps_and_epochs_the_one_written_later_holds_and_that_is_said(folder, capsys):
    Path("long.yaml").write_text("base: my.yaml\nrun: {epochs: 9}\n")
    loaded = load_config("long.yaml")
    assert (loaded.config.run.epochs, loaded.config.run.steps) == (9, None)
    assert loaded.notes == ("run.epochs=9 [long.yaml:2] takes the place of run.steps=20 [my.yaml:7]",)
    assert main(["train", "long.yaml", "run.steps=4", "evaluate.baselines=false"]) == 0
    said = capsys.readouterr().err
    assert "run.steps=4 [override 'run.steps=4'] takes the place of run.epochs=9 [long.yaml:2]" in said
    assert json.loads(Path("runs/tiny/summary.json").read_text())["steps"] == 4
    resolved = yaml.safe_load(Path("runs/tiny/config.yaml").read_text())
    assert resolved["run"]["epochs"] is None and resolved["run"]["steps"] == 4
    both = refused("train", "my.yaml", "run.steps=4", "run.epochs=2", capsys=capsys)
    assert "exactly one of run.epochs and run.steps" in both


@pytest.mark.parametrize("base", ["rec/movielens_clicks", "configs/rec/clicks.yaml", "rec/sasrec"])
def test_a_base_is_refused_in_words(folder, capsys, base):
    said = refused("train", base, capsys=capsys)
    name = base.removeprefix("configs/").removesuffix(".yaml")
    assert f"{name} is a base, not a run" in said and f"Write `base: {name}`" in said


def test_an_override_that_breaks_a_file_is_blamed(folder, capsys):
    said = refused("train", "my.yaml", "model.dim=65", capsys=capsys)
    assert "model.heads [my.yaml:3, override 'model.dim=65']: must divide dim 65" in said
    said = refused("train", "my.yaml", "model.heads=3", capsys=capsys)
    assert "model.heads [override 'model.heads=3']: must divide dim 8" in said


def test_a_mesh_that_wants_more_devices_mentions_virtual_ones(folder, capsys):
    said = refused("train", "my.yaml", "mesh.data=16", capsys=capsys)
    assert f"does not fit {len(jax.devices())} devices" in said and "--cpu-devices N" in said


def test_the_number_of_parameters_includes_tables(folder, capsys):
    tables = ["tables={item: {dim: 8}}", "model.inputs=[item]", "objective={kind: sampled_softmax, negatives: 8}"]
    assert main(["train", "my.yaml", *tables, "run.steps=2", "evaluate.baselines=false"]) == 0
    said = capsys.readouterr().err
    rows = sum(spec.rows * spec.dim for spec in build_task(load_config("my.yaml", tables)).tables.values())
    assert rows > 0 and f"({rows:,} of them in tables)" in said


def test_a_run_is_found_by_its_name_and_predictions_are_written_as_the_name_ends(finished, capsys):
    assert main(["evaluate", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 20
    for name in ("x.parquet", "x.csv", "x.tsv", "x.jsonl"):
        assert main(["predict", "tiny", "plays.csv", "--top", "3", "--out", name]) == 0, capsys.readouterr().err
        assert f"-> {name}" in capsys.readouterr().out and Path(name).is_file()
    rows = pq.read_table("x.parquet").to_pylist()
    assert [json.loads(line) for line in Path("x.jsonl").read_text().splitlines()] == rows
    for name, delimiter in (("x.csv", ","), ("x.tsv", "\t")):
        with open(name, newline="") as file:
            read = list(csv.DictReader(file, delimiter=delimiter))
        assert [(row["user"], row["item"]) for row in read] == [(row["user"], row["item"]) for row in rows]
        assert [float(row["score"]) for row in read] == pytest.approx([row["score"] for row in rows])
    said = refused("predict", "tiny", "plays.csv", "--out", "x.xlsx", capsys=capsys)
    assert "x.xlsx: nothing writes .xlsx files; give one of .parquet, .csv, .tsv, .jsonl, or a folder" in said
