"""A search at work: trials are proposed, followed, pruned and judged; folder and page say what became of them."""

import json
import math
from pathlib import Path

import pytest
from stand_in import SEARCH, Trainer, events_of, search_plan, searched
from test_sweep_runs import begun
from web_page import Page

from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.core.metrics_file import read_metrics
from jaxops.sweep.plan import make_plan
from jaxops.sweep.records import SweepFolder, read_plan
from jaxops.sweep.results import read_outcome
from jaxops.sweep.search.lead import MetricTail

pytest.importorskip("optuna")
HERE = ["runner.kind=in_process"]


def test_trials_are_run_pruned_and_judged(toy):
    """wandb/sweeps#59: runs that were stopped early count as crashed ones."""
    trainer = searched(toy)
    outcome = read_outcome(read_plan(Path("runs/find")))
    assert len(trainer.started) == len(set(trainer.started)) == 12
    assert outcome.count("finished") + outcome.count("pruned") == 12 and outcome.count("pruned") >= 3
    assert outcome.left == 0 and outcome.counts.startswith(f"{outcome.count('finished')} finished, ")
    assert all("pruned at step" in one.reason for one in outcome.results if one.state == "pruned")
    assert all(one.value is None and one.so_far is not None for one in outcome.results if one.state == "pruned")
    events = events_of("runs/find")
    told = [event.fields["state"] for event in events if event.what == "tell"]
    assert told.count("pruned") == outcome.count("pruned") and "failed" not in told
    best = min(one.value for one in outcome.results if one.value is not None)
    assert outcome.groups[0].mean == best
    longest = max(len(trainer.curve(run)) for run in trainer.started)
    assert all(len(trainer.curve(one.point.id)) < longest for one in outcome.results if one.state == "pruned")


def test_a_larger_number_of_trials_goes_on_with_the_same_search(toy):
    first = searched(toy, "search.trials=5")
    again = searched(toy, "search.trials=5")
    assert len(first.started) == 5 and not again.started
    more = searched(toy, "search.trials=9", "search.pruner=none")
    assert len(more.started) == 4 and not set(more.started) & set(first.started)
    searched(toy, "search.trials=9", "name=whole", "search.pruner=median")
    asked = lambda name: [e.fields["values"] for e in events_of(f"runs/{name}") if e.what == "ask"]
    assert asked("whole")[:5] == asked("find")[:5]


def test_a_config_that_was_tried_is_not_run_again(toy):
    """wandb/wandb#3467: a search over few values runs the same ones again and again."""
    Path("find.yaml").write_text(SEARCH.replace("loguniform, low: 0.1, high: 10.0", "choice, of: [1.0, 2.0, 4.0]"))
    trainer = searched(toy, "search.pruner=none", slots=2)
    assert len(trainer.started) == 3 and len(set(trainer.started)) == 3
    events = events_of("runs/find")
    told = {event.trial: event.fields.get("value") for event in events if event.what == "tell"}
    points = {event.trial: event.fields["point"] for event in events if event.what == "ask"}
    assert len(told) == 12 and all(value is not None for value in told.values())
    assert len({(points[trial], value) for trial, value in told.items()}) == 3
    assert read_outcome(read_plan(Path("runs/find"))).left == 0


def test_a_trial_that_measures_no_number_is_told_and_the_search_goes_on(toy):
    """optuna/optuna#3205, ray-project/ray#11670: NaN ends the search, or is the best."""
    trainer = searched(toy, loss=lambda lr: math.nan if lr < 1 else (math.log(lr) - 1) ** 2)
    outcome = read_outcome(read_plan(Path("runs/find")))
    assert len(trainer.started) == 12 and any(trainer.lr[run] < 1 for run in trainer.started)
    odd = [one for one in outcome.results if trainer.lr[one.point.id] < 1]
    assert all(one.value is None for one in odd) and all(one.state != "finished" or one.reason for one in odd)
    assert outcome.groups[0].mean is not None and outcome.groups[0].values["optimizer.lr"] >= 1


def test_the_direction_is_the_metrics_own(toy, monkeypatch):
    """hydra-ecosystem/hydra#2047: the sweeper minimises, whatever is asked for."""
    family = Path("toy_family.py")
    family.write_text(family.read_text().replace('Metric(name, "lower", "NLL")', 'Metric(name, "higher", "AUC")'))
    trainer = searched(toy, "search.trials=30", loss=lambda lr: -((math.log10(lr) - 0.5) ** 2))
    late = [trainer.lr[run] for run in trainer.started[15:]]
    assert sum(abs(math.log10(lr) - 0.5) < 0.4 for lr in late) > 7
    assert abs(math.log10(read_outcome(read_plan(Path("runs/find"))).groups[0].values["optimizer.lr"]) - 0.5) < 0.3


def test_a_failed_trial_is_told_and_tried_again_on_request(toy):
    broken = searched(toy, "search.trials=4", failing=1)
    outcome = read_outcome(read_plan(Path("runs/find")))
    assert outcome.count("failed") == 1 and outcome.left == 0
    assert not searched(toy, "search.trials=4").started
    again = searched(toy, "search.trials=4", retry=True)
    assert again.started == broken.started[:1]
    outcome = read_outcome(read_plan(Path("runs/find")))
    assert outcome.count("failed") == 0 and len(outcome.results) == 4


def test_a_point_that_is_no_valid_run_is_told_and_not_started(toy, monkeypatch):
    monkeypatch.setattr("jaxops.sweep.search.space.SearchSpace.checked", lambda self: self._resolver.all([{}]))
    Path("find.yaml").write_text(SEARCH.replace("loguniform, low: 0.1, high: 10.0", "choice, of: [1.0, fast]"))
    said = []
    trainer = searched(toy, "search.pruner=none", say=said.append)
    assert len(trainer.started) == 1
    assert any("is no valid run (optimizer.lr=fast): " in line and "expected a number" in line for line in said)


def test_another_search_does_not_go_on_with_this_journal(toy):
    searched(toy, "search.trials=3")
    for change, said in [
        (["search.seed=1"], "search.seed has changed"),
        (["optimizer.clip=1.0"], "asked with another base config"),
        (["letters=6"], "asked with another base config"),
    ]:
        with pytest.raises(UserError, match=said):
            searched(toy, *change)
    Path("grid.yaml").write_text("base: toy.yaml\nname: find\nruns: {seeds: 2}\n")
    with pytest.raises(UserError, match="is the folder of a search"):
        SweepFolder(Path("runs/find")).begin(make_plan("grid.yaml"))
    SweepFolder(Path("runs/lr")).begin(make_plan("lr.yaml"))
    with pytest.raises(UserError, match="folder of another sweep, not of a search"):
        searched(toy, "name=lr")


WRONG = {
    "runs too": ("runs: {seeds: 2}", "has `search` or `runs`"),
    "an unknown path": (
        "search: {kind: tpe, values: {optimizer.lrr: {kind: uniform, low: 1, high: 2}}}",
        "did you mean 'lr'?",
    ),
    "bounds turned": (
        "search: {kind: tpe, values: {optimizer.lr: {kind: uniform, low: 2, high: 1}}}",
        "must be below high 1",
    ),
    "a wrong corner": (
        "search: {kind: tpe, values: {letters: {kind: choice, of: [6, six]}}}",
        "expected an integer, got 'six'",
    ),
    "seeds": ("search: {kind: tpe, values: {run.seed: {kind: int, low: 0, high: 9}}}", "finds the luckiest one"),
    "a first trial outside": (
        "search: {kind: tpe, first: [{optimizer.lr: 20}], values: {optimizer.lr: {kind: uniform, low: 1, high: 9}}}",
        "search.first.0.optimizer.lr [s.yaml:2]: must be one that the search may suggest (1 to 9), got 20",
    ),
    "a first trial of another": (
        "search: {kind: tpe, first: [{letters: 6}], values: {optimizer.lr: {kind: uniform, low: 1, high: 9}}}",
        "is not among search.values",
    ),
    "a condition on nothing": (
        "search: {kind: tpe, values: {optimizer.lr: {kind: uniform, low: 1, high: 9}}, when: [{if: {optimizer.kin:"
        " sgd}, values: {letters: {kind: choice, of: [6, 8]}}}]}",
        "no point has optimizer.kin; did you mean 'optimizer.kind'?",
    ),
    "an unknown pruner": (
        "search: {kind: tpe, pruner: hyperbande, values: {optimizer.lr: {kind: uniform, low: 1, high: 9}}}",
        "did you mean 'hyperband'?",
    ),
    "another database": (
        "search: {kind: tpe, storage: 'mysql://host/db', values: {optimizer.lr: {kind: uniform, low: 1, high: 9}}}",
        "expected postgresql://HOST/NAME, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER",
    ),
    "the run's name": ("search: {kind: tpe, values: {run.name: {kind: choice, of: [a, b]}}}", "a sweep sets it itself"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_search_is_told_before_anything_is_written(toy, capsys, case):
    text, said = WRONG[case]
    if not text.startswith("search"):
        text = f"search: {{kind: tpe, values: {{optimizer.lr: {{kind: uniform, low: 1, high: 9}}}}}}\n{text}"
    Path("s.yaml").write_text(f"base: toy.yaml\n{text}\n")
    assert main(["sweep", "s.yaml"]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and not list(Path().glob("runs/*/*/config.yaml")), err


def test_conditional_values_are_those_of_their_condition(toy):
    Path("find.yaml").write_text(
        "base: toy.yaml\nsearch:\n  kind: random\n  trials: 12\n  pruner: none\n"
        "  values: {optimizer: {kind: choice, of: [sgd, {kind: adamw}]}}\n"
        "  when: [{if: {optimizer.kind: adamw}, values: {optimizer.b1: {kind: uniform, low: 0.5, high: 0.9}}}]\n"
    )
    searched(toy)
    points = read_plan(Path("runs/find")).points
    assert len(points) > 3 and any("optimizer.b1" in point.values for point in points)
    assert all(("optimizer.b1" in one.values) == (one.values["optimizer"] != "sgd") for one in points)


def test_the_command_shows_what_is_searched_and_what_came_of_it(toy, capsys):
    assert main(["sweep", "find.yaml", "--dry-run"]) == 0 and not Path("runs").exists()
    said = capsys.readouterr().out
    assert "loguniform: 0.1 to 10" in said and "12 trials by tpe, pruning: median -> runs/find" in said
    assert main(["sweep", "find.yaml", "--status"]) == 2
    searched(toy, "search.trials=6")
    capsys.readouterr()
    assert main(["sweep", "find.yaml", "--status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {point["state"] for point in found["points"]} <= {"finished", "pruned"} and len(found["points"]) == 6
    assert main(["sweep", "runs/find", "--best"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    best = min(found["groups"], key=lambda group: math.inf if group["mean"] is None else group["mean"])
    assert said.startswith(f"The best of 6 trials is optimizer.lr={best['values']['optimizer.lr']}")
    assert "with seeds of its own: jaxops sweep runs/find/points/" in said


@pytest.mark.pictures
def test_the_page_of_a_search_has_its_pruned_trials(toy, capsys):
    searched(toy, "search.trials=14", "search.values.letters={kind: int, low: 5, high: 9}")
    assert (
        main(["sweep", "find.yaml", "search.trials=14", "search.values.letters={kind: int, low: 5, high: 9}", *HERE])
        == 0
    )
    text = Path("runs/find/sweep.html").read_text()
    said = " ".join(" ".join(Page(text).text).split())
    assert "14 runs: " in said and "pruned" in said and "PED-ANOVA" in said and "All trials" in said


def test_the_tail_of_a_log_is_read_once_and_again_where_it_was_cut(tmp_path):
    log = tmp_path / "metrics.jsonl"
    line = lambda step, value: json.dumps({"v": 1, "step": step, "valid/nll": value}) + "\n"
    tail = MetricTail(log, "valid/nll")
    assert list(tail.new()) == []
    log.write_text(line(1, 0.5) + '{"v": 1, "step": 1, "loss": 3}\n' + line(2, 0.25)[:10])
    assert list(tail.new()) == [(1, 0.5)] and list(tail.new()) == []
    log.write_text(log.read_text() + line(2, 0.25)[10:])
    assert list(tail.new()) == [(2, 0.25)]
    new = tmp_path / "new"
    new.write_text(line(1, 0.5) + line(3, None))
    new.replace(log)
    steps = list(tail.new())
    assert steps[0] == (1, 0.5) and steps[1][0] == 3 and math.isnan(steps[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("runner", [["runner.jobs=2"], HERE])
def test_real_trainings_are_pruned_by_a_signal_and_have_saved(toy, runner):
    """Each point trains by itself and knows nothing of the search; what is stopped early could go on by hand."""
    text = SEARCH.replace("loguniform, low: 0.1, high: 10.0", "loguniform, low: 0.01, high: 10.0")
    Path("find.yaml").write_text(text.replace("trials: 12", "trials: 6"))
    long = ["run.steps=60", "evaluate.stop=null", "search.pruner.startup=1"]
    first = "search.first=[{optimizer.lr: 8.0}, {optimizer.lr: 0.02}, {optimizer.lr: 0.05}]"
    out, err = begun("find.yaml", *long, first, *runner, "--json").communicate(timeout=500)
    found = json.loads(out)["points"]
    assert found[0]["state"] == "finished" and {point["state"] for point in found} == {"finished", "pruned"}, err
    for point in found:
        summary = json.loads(Path(point["dir"], "summary.json").read_text())
        logged = [line["step"] for line in read_metrics(Path(point["dir"], "metrics.jsonl")) if "valid/nll" in line]
        if point["state"] == "pruned":
            assert summary["state"] == "preempted" and 2 <= summary["step"] < 60 and logged[-1] <= summary["step"]
        else:
            assert summary["state"] == "finished" and logged[-1] == 60 and point["value"] == summary["valid/nll"]
    told = {event.fields["state"] for event in events_of("runs/find") if event.what == "tell"}
    assert told == {"complete", "pruned"}


def test_several_trials_at_once_are_proposed_apart(toy):
    trainer = searched(toy, slots=4)
    assert len(set(trainer.started)) == 12 and trainer.most == 4
    assert isinstance(trainer, Trainer) and search_plan().trials == 12
