"""What a sweep came to: intervals and tests against scipy and by hand, the sentence of the verdict, and the page."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from web_page import Page

from jaxops.cli.main import main
from jaxops.core.metric import Metric
from jaxops.report.folder import read_run
from jaxops.sweep.importance import importance
from jaxops.sweep.points import Point
from jaxops.sweep.results import Result, SeedGroup, judge, welch

NLL = Metric("nll", "lower", "NLL")


def group(name: str, *numbers: float, runs: int = 0, **values) -> SeedGroup:
    points = [Point(f"{name}{seed}", {}, name, seed) for seed in range(runs or len(numbers))]
    results = [Result(point, "finished", "", None, None, None) for point in points]
    return SeedGroup(name, {"name": name, **values}, results, list(numbers))


def test_the_interval_is_students():
    three = group("a", 1.0, 2.0, 4.5)
    low, high = stats.t.interval(0.95, 2, loc=2.5, scale=stats.sem([1.0, 2.0, 4.5]))
    assert three.mean == 2.5 and three.margin == pytest.approx((high - low) / 2)
    assert three.margin == pytest.approx(4.302653 * math.sqrt(3.25) / math.sqrt(3), rel=1e-6)  # t(0.975, 2) of a table
    assert group("a", 1.0).margin is None and group("a").mean is None
    assert group("a", 1.0, 2.0, runs=3).shown == "1.5000 ± 6.3531 (2 of 3 seeds)"


def test_welchs_test_by_hand():
    a, b = [3.0, 4.0, 5.5], [6.0, 8.0, 7.0, 9.5]
    va, vb = np.var(a, ddof=1) / 3, np.var(b, ddof=1) / 4
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 3)
    t = (np.mean(a) - np.mean(b)) / math.sqrt(va + vb)
    assert welch(a, b) == pytest.approx(2 * stats.t.sf(abs(t), freedom))
    assert welch([1.0, 1.0], [2.0, 2.0]) == 0 and welch([1.0, 1.0], [1.0, 1.0]) == 1


def test_a_winner_is_named_only_where_seeds_tell_it_from_the_next():
    clear = judge(NLL, [group("a", 1.0, 1.1, 0.9), group("b", 2.0, 2.1, 1.9), group("c", 3.0, 3.0)])
    assert clear.winner.id == "a" and "differ by more than their seeds do" in clear.words and "out of 3" in clear.words
    near = judge(NLL, [group("a", 1.0, 1.5, 0.5), group("b", 1.1, 1.6, 0.6)])
    assert near.winner is None and near.words.startswith("No winner: ") and near.p > 0.5
    single = judge(NLL, [group("a", 1.0), group("b", 2.0, 2.1)])
    assert single.winner is None and "one seed does not say" in single.words
    same = judge(NLL, [group("a", 1.0, 1.0), group("b", 1.0, 1.0)])
    assert same.winner is None and same.p == 1
    assert judge(NLL, [group("a", 1.0, 1.0), group("b", 2.0, 2.0)]).winner.id == "a"  # seeds change nothing here
    assert judge(NLL, [group("a", 1.0, 1.0), group("b")]).winner is None
    assert judge(NLL, [group("a")]).words == "No run has finished with a number yet."


def test_nothing_is_best_on_different_data(tmp_path):
    """Two groups whose evaluation data differ cannot be compared, whatever their numbers say."""
    groups = []
    for place, name in enumerate("ab"):
        results = []
        for seed in range(2):
            run = tmp_path / f"{name}{seed}"
            run.mkdir()
            (run / "data.json").write_text(json.dumps({"split": {"sha256": name}}))
            results.append(Result(Point(f"{name}{seed}", {}, name, seed), "finished", "", 1.0, None, read_run(run)))
        groups.append(SeedGroup(name, {"name": name}, results, [1.0 + place, 1.01 + place]))
    verdict = judge(NLL, groups)
    assert verdict.winner is None and "different data" in verdict.words
    for seed in range(2):  # the same data again, by seed
        (tmp_path / f"b{seed}" / "data.json").write_text(json.dumps({"split": {"sha256": "a"}}))
    points = [one.point for one in groups[1].results]
    again = [Result(point, "finished", "", 1.0, None, read_run(tmp_path / point.id)) for point in points]
    groups[1] = SeedGroup("b", groups[1].values, again, groups[1].numbers)
    assert judge(NLL, groups).winner.id == "a"


def test_importance_is_of_what_explains_the_differences():
    random = np.random.default_rng(0)
    grid = [
        group("g", float(lr) + 0.01 * random.normal(), lr=lr, depth=depth, kind=kind)
        for lr in (1, 2, 3)
        for depth in (2, 4)
        for kind in ("x", "y")
    ]
    (first, share), *rest = importance(grid, ["depth", "kind", "lr"])
    assert first == "lr" and share > 0.98 and all(other < 0.1 for _, other in rest)
    lrs, noise = random.uniform(size=30), random.uniform(size=30)
    drawn = [group("d", math.exp(x), lr=float(x), noise=float(y)) for x, y in zip(lrs, noise, strict=True)]
    shares = dict(importance(drawn, ["lr", "noise"]))
    assert shares["lr"] == pytest.approx(1.0) and shares["noise"] < 0.2
    assert importance(grid[:5], ["lr"]) == []  # too few to say


@pytest.mark.pictures
@pytest.mark.usefixtures("quick_fit")
def test_the_page_shows_points_parameters_curves_and_what_failed(toy, capsys):
    Path("s.yaml").write_text(
        "base: toy.yaml\nruns:\n  grid: {optimizer.lr: [1.0, 2.0, 40.0, 200.0], letters: [6, 8]}\n"
        "  seeds: 2\nrunner: {kind: in_process}\n"
    )
    assert main(["sweep", "s.yaml"]) == 1
    assert "page: runs/s/sweep.html" in capsys.readouterr().err
    text = Path("runs/s/sweep.html").read_text()
    page = Page(text)
    said = " ".join(" ".join(page.text).split())
    assert len(page.loads) == 12 and all(link.endswith("/report.html") for link in page.loads)  # of what has one
    assert text.count("<svg") == 1 + 2 + 1
    assert "16 runs: 12 finished, 4 failed" in said and "NLL, lower is better" in said
    assert "the loss is not finite at step 4 (lr 200.0)" in said and said.count("optimizer.lr=200.0, letters=6") == 2
    assert "0.1050 ± 0.0635" in said  # 4 / 40 and 0.01 for the second seed, times t(0.975, 1) / 2
    assert "Importance" in said and "#1" in text and "All parameters" in said


@pytest.mark.usefixtures("quick_fit")
def test_best_and_status_say_what_is_known(toy, capsys):
    assert main(["sweep", "lr.yaml", "runner.kind=in_process"]) == 0
    capsys.readouterr()
    assert main(["sweep", "lr.yaml", "--best", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["winner"] == {"optimizer.lr": 4.0} and found["metric"] == "valid/nll" and found["better"] == "lower"
    assert [one["mean"] for one in found["groups"]] == [pytest.approx(1.005), pytest.approx(4.005)]
    assert found["p"] == pytest.approx(stats.ttest_ind([1.0, 1.01], [4.0, 4.01], equal_var=False).pvalue)
    assert main(["sweep", "runs/lr", "--best"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("The best is optimizer.lr=4.0: NLL 1.0050") and said.count("runs/lr/") == 2
    assert main(["sweep", "lr.yaml", "runs.seeds=3", "--status"]) == 0
    assert "4 finished, 2 waiting" in capsys.readouterr().out
