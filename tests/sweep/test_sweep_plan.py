"""The plan: which points a file has, their ids, and every way to write it wrongly, told before anything is written."""

import itertools
import math
from pathlib import Path

import pytest
import yaml

from jaxops.core.failures import UserError
from jaxops.run.build import load_config
from jaxops.sweep.plan import make_plan
from jaxops.sweep.points import group_id, run_id


def plan(runs: dict, *overrides: str, **more):
    """The plan of a file with these `runs`."""
    Path("s.yaml").write_text(yaml.safe_dump({"base": "toy.yaml", "runs": runs, **more}, sort_keys=False))
    return make_plan("s.yaml", overrides)


def values(found) -> list[dict]:
    return [point.values for point in found.points]


def test_a_grid_has_every_combination_once(toy):
    """Nested paths among them: wandb/wandb#11445 has a first parameter that never varies, and duplicates."""
    axes = {
        "optimizer.lr": [1.0, 2.0, 4.0],
        "optimizer.schedule.warmup": [0, 2],
        "batch.global": [16, 32],
        "letters": [6, 8],
    }
    found = plan({"grid": axes})
    assert [tuple(point.values.values()) for point in found.points] == list(itertools.product(*axes.values()))
    assert len({point.id for point in found.points}) == 24
    assert [found.configs[p.id]["optimizer"]["schedule"]["warmup"] for p in found.points[:3]] == [0, 0, 0]


def test_zip_walks_its_lists_together_and_seeds_multiply(toy):
    found = plan({"zip": {"letters": [6, 8], "optimizer.lr": [1.0, 2.0]}, "seeds": 2})
    lines = [(point.values["letters"], point.values["optimizer.lr"], point.seed) for point in found.points]
    assert lines == [(6, 1.0, 0), (6, 1.0, 1), (8, 2.0, 0), (8, 2.0, 1)]
    assert [p.group for p in found.points] == [found.points[0].group] * 2 + [found.points[2].group] * 2
    assert [point.seed for point in plan({"seeds": [3, 5]}).points] == [3, 5]
    assert [point.seed for point in plan({"grid": {"run.seed": "2..4"}}).points] == [2, 3, 4]


def test_draws_stay_in_their_bounds_and_a_larger_count_only_adds(toy):
    kinds = {
        "optimizer.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-1},
        "optimizer.weight_decay": {"kind": "uniform", "low": 0.0, "high": 0.1},
        "optimizer.schedule.warmup": {"kind": "int", "low": 0, "high": 2},
        "batch.global": {"kind": "choice", "of": [16, 32]},
    }
    many = plan({"random": {"count": 200, "values": kinds}})
    lr = [point.values["optimizer.lr"] for point in many.points]
    assert 1e-4 <= min(lr) < 3e-4 and 3e-2 < max(lr) <= 1e-1
    assert 0.35 < sum(math.log10(rate) < -2.5 for rate in lr) / 200 < 0.65  # half below the geometric middle
    assert {point.values["optimizer.schedule.warmup"] for point in many.points} == {0, 1, 2}
    assert {point.values["batch.global"] for point in many.points} == {16, 32}
    few = plan({"random": {"count": 20, "values": {name: kinds[name] for name in reversed(kinds)}}})
    assert [p.id for p in few.points] == [p.id for p in many.points[:20]]
    assert few.points[0].id != plan({"random": {"count": 20, "seed": 1, "values": kinds}}).points[0].id


def test_whole_sections_and_parts_for_some_points_only(toy):
    when = [{"if": {"optimizer.kind": "adamw"}, "grid": {"optimizer.b1": [0.8, 0.9]}}]
    found = plan({"grid": {"optimizer.lr": [1.0, 2.0], "optimizer": ["sgd", {"kind": "adamw"}]}, "when": when})
    assert [(p.values["optimizer.lr"], p.values.get("optimizer.b1")) for p in found.points] == [
        *[(1.0, None), (1.0, 0.8), (1.0, 0.9)],
        *[(2.0, None), (2.0, 0.8), (2.0, 0.9)],
    ]
    optimizers = [found.configs[point.id]["optimizer"] for point in found.points]
    assert [one["kind"] for one in optimizers] == ["sgd", "adamw", "adamw"] * 2
    assert [one["lr"] for one in optimizers] == [1.0] * 3 + [2.0] * 3  # the section first, then what is set inside


def test_overrides_sweep_a_config_as_a_file_would(toy):
    line = make_plan("toy.yaml", ["optimizer.lr=1.0,4.0", "run.seed=0..1", "letters=6"])
    file = plan({"grid": {"optimizer.lr": [1.0, 4.0]}, "seeds": 2}, "letters=6", name="other", dir="elsewhere")
    assert [p.id for p in line.points] == [p.id for p in file.points]
    assert line.folder == Path("runs/toy-sweep") and file.folder == Path("elsewhere/other")
    sections = make_plan("toy.yaml", ["optimizer={kind: sgd, lr: 1.0},{kind: adamw}"])
    assert [sections.configs[p.id]["optimizer"]["kind"] for p in sections.points] == ["sgd", "adamw"]
    assert len(make_plan("lr.yaml", ["runs.seeds=3"]).points) == 6


def test_an_id_is_of_what_the_run_does(toy):
    resolved = load_config("toy.yaml").resolved
    turned = {name: resolved[name] for name in reversed(resolved)}
    moved = load_config("toy.yaml", ["run.dir=elsewhere", "run.name=other"]).resolved
    assert run_id(resolved) == run_id(turned) == run_id(moved)
    seeded = load_config("toy.yaml", ["run.seed=3"]).resolved
    assert run_id(resolved) != run_id(seeded) and group_id(resolved) == group_id(seeded)
    assert run_id(resolved) != run_id(load_config("toy.yaml", ["optimizer.lr=1.0"]).resolved)


def test_the_base_need_not_be_a_run_by_itself(toy):
    """facebookresearch/hydra#2888: overrides are held against the base before the swept values are in it."""
    Path("toy.yaml").write_text(Path("toy.yaml").read_text().replace("steps: 4, ", ""))
    found = plan({"grid": {"run.steps": [2, 4], "optimizer": ["sgd", "adamw"]}}, "optimizer.lr=0.5")
    assert [found.configs[p.id]["run"]["steps"] for p in found.points] == [2, 2, 4, 4]


@pytest.mark.parametrize("field", ["checkpoint.best", "evaluate.stop.metric", "the first"])
def test_the_metric_is_that_of_the_base_in_its_own_direction(toy, field):
    given = {"checkpoint.best": [], "evaluate.stop.metric": ["checkpoint.best=null"]}
    overrides = given.get(field, ["checkpoint.best=null", "evaluate.stop=null"])
    assert make_plan("lr.yaml", overrides).metric.better == "lower"
    assert make_plan("lr.yaml", ["metric=valid/nll"]).metric.name == "nll"


@pytest.mark.slow
def test_a_thousand_points_are_planned_from_one_reading_of_the_base(toy):
    found = make_plan("toy.yaml", ["optimizer.lr=1.0,2.0", "run.seed=0..499"])
    assert len({point.id for point in found.points}) == 1000 and not Path("runs").exists()


WRONG = {
    "an unknown path": ({"grid": {"optimizer.lrr": [1, 2]}}, "did you mean 'lr'?"),
    "a wrong type": ({"grid": {"optimizer.lr": [1.0, "fast"]}}, "expected a number, got 'fast' (in 1 of 2 points"),
    "a value out of bounds": ({"grid": {"run.seed": [0, -1]}}, "must be at least 0"),
    "an empty list": ({"grid": {"optimizer.lr": []}}, "runs.grid.optimizer.lr [s.yaml:4]: an empty list"),
    "no list": ({"grid": {"optimizer.lr": 1.0}}, "expected a list of values, or a range such as 0..4, got 1.0"),
    "zip of two lengths": ({"zip": {"letters": [6, 8], "run.seed": [0, 1, 2]}}, "need one length; they have letters 2"),
    "one value twice": ({"grid": {"optimizer.lr": [1.0, 2.0, 1.0]}}, "the same point twice"),
    "a range backwards": ({"grid": {"run.seed": "3..1"}}, "a range is two whole numbers, the lower first"),
    "a range without end": ({"grid": {"run.seed": "0.."}}, "a range is two whole numbers, the lower first"),
    "a path in two parts": ({"grid": {"letters": [6, 8]}, "zip": {"letters": [6, 8]}}, "given twice"),
    "seeds and run.seed": ({"grid": {"run.seed": [0, 1]}, "seeds": 2}, "given twice"),
    "no seeds": ({"seeds": 0}, "must be at least 1"),
    "bounds turned": (
        {"random": {"count": 1, "values": {"optimizer.lr": {"kind": "uniform", "low": 2, "high": 1}}}},
        "must be below high 1, got 2",
    ),
    "an unknown distribution": (
        {"random": {"count": 1, "values": {"optimizer.lr": {"kind": "loguniformm", "low": 1, "high": 2}}}},
        "did you mean 'loguniform'?",
    ),
    "the name of a run": ({"grid": {"run.name": ["a", "b"]}}, "a sweep sets it itself"),
    "a path without a name": ({"grid": {"optimizer..lr": [1, 2]}}, "expected a dotted path"),
    "an unknown part": ({"gird": {"optimizer.lr": [1, 2]}}, "did you mean 'grid'?"),
    "a condition on nothing": (
        {"seeds": 2, "when": [{"if": {"optimizer.kin": "sgd"}, "grid": {"letters": [6, 8]}}]},
        "no point has optimizer.kin; did you mean 'optimizer.kind'?",
    ),
    "too many points": ({"grid": {"run.seed": "0..999", "optimizer.lr": list(range(1, 101))}}, "100,000 points"),
    "too long a range": ({"grid": {"run.seed": "0..99999999999"}}, "at most 20,000 of them"),
    "too many seeds": ({"seeds": 10**12}, "must be at most 20000"),
    "too many draws": (
        {"random": {"count": 10**12, "values": {"optimizer.lr": {"kind": "uniform", "low": 0, "high": 1}}}},
        "must be at most 20000",
    ),
    "nothing": ({}, "nothing is swept"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_sweep_is_told_before_anything_is_written(toy, case):
    runs, said = WRONG[case]
    with pytest.raises(UserError) as caught:
        plan(runs)
    assert said in str(caught.value) and not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("runs: {seeds: 2}", [], "a sweep needs `base: CONFIG`"),
        ("base: toy.yml\nruns: {seeds: 2}", [], "no such configuration"),
        ("base: lr.yaml\nruns: {seeds: 2}", [], "a sweep cannot sweep a sweep"),
        ("base: toy.yaml\ngrid: {letters: [6, 8]}", [], "grid [s.yaml:2]: unknown key"),
        ("base: toy.yaml\nruns: {seeds: 2}\nmetric: nnl", [], "did you mean 'nll'?"),
        ("base: toy.yaml\nruns: {seeds: 2}\nmetric: test/nll", [], "would choose on the test data"),
        ("base: toy.yaml\nruns: {seeds: 2}\ndir: gs://bucket/runs", [], "keeps its runs in a local folder"),
        ("base: toy.yaml\nruns: {seeds: 2}\nrunner: {kind: locale}", [], "did you mean 'local'?"),
        ("base: toy.yaml\nruns: {grid: {letters: [6, 8]}}", ["letters=6"], "it is swept already, at s.yaml:2"),
        ("base: toy.yaml\nruns: {grid: {letters: [6, 8]}}", ["letters=6,7"], "given twice"),
        ("base: toy.yaml\nruns: {seeds: 2}", ["optimizer.lr"], "there is no '='"),
    ],
)
def test_a_wrong_file_or_override_is_told(toy, text, overrides, said):
    Path("s.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        make_plan("s.yaml", overrides)
    assert said in str(caught.value)


def test_all_problems_of_all_points_are_told_at_once_and_each_once(toy):
    with pytest.raises(UserError) as caught:
        plan({"grid": {"optimizer.lr": [1.0, "fast"], "letters": [6, "x", "y"]}})
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 problems in the points of the sweep; nothing was started:" and len(lines) == 4
    assert "'fast' (in 3 of 6 points, the first: optimizer.lr=fast, letters=6)" in lines[1] + lines[2] + lines[3]
    assert "'x' (in 2 of 6 points" in str(caught.value)


def test_a_folder_that_is_a_run_is_not_taken(toy):
    (toy / "runs/lr").mkdir(parents=True)
    (toy / "runs/lr/config.yaml").write_text("task: rec")
    with pytest.raises(UserError, match="is a run"):
        make_plan("lr.yaml")
