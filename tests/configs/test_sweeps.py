"""The shipped sweeps: planned as they are, and one of them run on small data."""

import json

import pytest
from small_data import movielens
from test_golden_configs import SWEEPS
from tiny_runs import no_report, working_in  # noqa: F401 (fixtures)

from jaxops.cli.main import main
from jaxops.run.build import load_config
from jaxops.sweep.plan import make_plan

POINTS = {"sweep/movielens_losses": 18, "sweep/movielens_lr": 9, "sweep/movielens_search": 0}


def test_each_shipped_sweep_has_its_points(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plans = {name: make_plan(name) for name in SWEEPS}
    assert {name: len(plan.points) for name, plan in plans.items()} == POINTS
    assert {plan.metric.name for plan in plans.values()} == {"ndcg@10"} and not [*tmp_path.iterdir()]
    search = plans["sweep/movielens_search"].space
    assert search.search.trials == 30 and search.search.pruner.most == 15  # 30 epochs, two an evaluation
    first = search.load(search.search.first[0]).config
    shipped = load_config("rec/movielens_sasrec").config
    assert (first.model, first.optimizer, first.batch) == (shipped.model, shipped.optimizer, shipped.batch)
    assert first.run.epochs == shipped.run.epochs == 30 and first.evaluate.every.epochs == 2
    losses = plans["sweep/movielens_losses"]
    kinds = [losses.configs[point.id]["objective"] for point in losses.points]
    assert [kind.get("negatives") for kind in kinds if kind["kind"] == "sampled_softmax"] == [*[64, 256] * 6]
    assert len({point.values["model.dropout"] for point in losses.points}) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_a_shipped_sweep_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "cache"))
    movielens(monkeypatch)
    short = ["runner.kind=in_process", "run.steps=4", "evaluate.every=2", "evaluate.baselines=false", "run.loggers=[]"]
    with working_in(tmp_path):
        assert main(["sweep", "sweep/movielens_lr", "runs.seeds=2", *short, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
    assert [point["state"] for point in found["points"]] == ["finished"] * 6 and found["better"] == "higher"
    assert [group["seeds"] for group in found["groups"]] == [2, 2, 2]
    means = [group["mean"] for group in found["groups"]]
    assert means == sorted(means, reverse=True)
