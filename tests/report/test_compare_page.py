"""The comparison says what differs and which number is best, never where that cannot be said; the page loads
nothing and escapes everything."""

import json
import os
import re

import pytest
import yaml
from web_page import Page, assert_loads_nothing, assert_pictures_suit_both_themes

from jaxops.core.failures import RunFailed
from jaxops.core.metrics_file import JsonlWriter
from jaxops.report.compare import MAX_RUNS, Side, compare_sides, yaml_of
from jaxops.report.compare_page import Line, render_comparison, write_compare
from jaxops.report.folder import read_run

pytestmark = pytest.mark.pictures

CONFIG = {
    "task": "rec",
    "model": {"kind": "sasrec", "dim": 64},
    "objective": {"kind": "softmax"},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.98]},
    "batch": {"global": 32},
    "checkpoint": {"best": "ndcg@10"},
    "run": {"name": "a", "dir": "runs", "steps": 400},
}
BASELINES = {"baseline/item_knn/test/ndcg@10": 0.06, "baseline/item_knn/test/hr@10": 0.16}


@pytest.fixture
def make(tmp_path):
    """Makes a run folder and gives it as a side: config entries by dotted path, numbers of the summary."""

    def made(name, config=None, results=None, *, curve=(), data="9b1c6a37", state="finished", **summary):
        folder = tmp_path / f"run{len(os.listdir(tmp_path))}"
        values = json.loads(json.dumps({**CONFIG, "run": {**CONFIG["run"], "name": name}}))
        for path, value in (config or {}).items():
            *parents, last = path.split(".")
            node = values
            for key in parents:
                node = node[key]
            node[last] = value
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        (folder / "data.json").write_text(json.dumps({"split": {"sha256": data, "test": 400, "valid": 400}}))
        (folder / "about.json").write_text(json.dumps({"labels": {"item_knn": "Item-kNN"}, "metrics": {}}))
        ended = {"name": name, "state": state, "step": 400, "best_step": 300, "device": "1 x cpu"}
        (folder / "summary.json").write_text(json.dumps({**ended, **(results or {}), **summary}))
        writer = JsonlWriter(folder / "metrics.jsonl")
        for step, line in curve:
            writer.write(step, line)
        writer.close()
        return Side(read_run(folder), name, state, "", 400, 400, 12.5)

    return made


def scores(comparison, split="test"):
    found = next(result for result in comparison.results if result.split == split)
    return {(row.label, row.note): row.values for row in found.rows}, found.best


def test_config_differences_are_by_path_as_written_and_without_name_and_folder(make):
    sides = [
        make("a"),
        make("b", {"optimizer.lr": 3e-4, "model.dim": 64.0, "run.dir": "elsewhere"}),
        make("c", {"objective": {"kind": "gbce", "negatives": 256}, "optimizer.betas": [0.9, 0.999]}),
    ]
    found = {difference.path: difference.values for difference in compare_sides(sides).differences}
    assert found == {
        "model.dim": {"a": 64, "b": 64.0, "c": 64},
        "objective.kind": {"a": "softmax", "b": "softmax", "c": "gbce"},
        "objective.negatives": {"c": 256},
        "optimizer.lr": {"a": 1e-3, "b": 3e-4, "c": 1e-3},
        "optimizer.betas": {"a": [0.9, 0.98], "b": [0.9, 0.98], "c": [0.9, 0.999]},
    }
    assert list(found)[1:3] == ["objective.kind", "objective.negatives"]  # together, whoever has them
    assert [yaml_of(value) for value in (3e-4, "gbce", [0.9, 0.98], None, True, "1")] == [
        *("0.0003", "gbce", "[0.9, 0.98]", "null", "true", "'1'")
    ]


def test_equal_configs_differ_in_nothing(make):
    assert compare_sides([make("a"), make("b")]).differences == []


def test_the_best_is_the_best_of_runs_and_baselines(make):
    comparison = compare_sides(
        [
            make("a", results={"test/ndcg@10": 0.09, "test/hr@10": 0.15, "test/loss": 2.5, **BASELINES}),
            make("b", results={"test/ndcg@10": 0.07, "test/hr@10": 0.12, "test/loss": 2.25, **BASELINES}),
        ]
    )
    rows, best = scores(comparison)
    assert best == {"ndcg@10": 0.09, "hr@10": 0.16, "loss": 2.25}
    assert list(rows) == [("a", ""), ("b", ""), ("Item-kNN", "")]  # the baselines agree: once
    assert comparison.headline == "ndcg@10" and comparison.warnings == []


def test_baselines_that_differ_are_shown_with_their_runs(make):
    other = {name: value + 0.01 for name, value in BASELINES.items()}
    measured = {"a": BASELINES, "b": other, "c": other}
    comparison = compare_sides([make(name, results={"test/ndcg@10": 0.09, **b}) for name, b in measured.items()])
    rows, _ = scores(comparison)
    assert {key: values["ndcg@10"] for key, values in rows.items() if key[0] == "Item-kNN"} == {
        ("Item-kNN", "of a"): 0.06,
        ("Item-kNN", "of b, c"): pytest.approx(0.07),
    }
    assert "same baseline" in comparison.warnings[0]


def test_nothing_is_called_best_where_the_data_differ(make):
    sides = [make("a", results={"test/hr@10": 0.2}), make("b", results={"test/hr@10": 0.1}, data="77aa")]
    comparison = compare_sides(sides)
    assert scores(comparison)[1] == {}
    assert "different data" in comparison.warnings[0] and "77aa: b" in comparison.warnings[0]
    page = render_comparison(comparison)
    assert 'class="best"' not in page and "Best test" not in page and "Before you compare" in page


def test_a_run_under_way_shows_its_best_so_far_and_a_longer_one_what_its_numbers_are_of(make):
    curve = [(step, {"valid/ndcg@10": value, "valid/hr@10": 2 * value}) for step, value in ((100, 0.04), (200, 0.03))]
    under_way = make("b", state="running", curve=curve)
    ended = {"valid/ndcg@10": 0.05, "valid/hr@10": 0.11}
    longer = make("c", results=ended, curve=[(450, {"train/loss": 2.0})])
    rows, best = scores(compare_sides([make("a", results=ended), under_way, longer]), "valid")
    assert rows[("b", "best so far, step 100")] == {"ndcg@10": 0.04, "hr@10": 0.08}
    assert rows[("c", "of step 400")] == rows[("a", "")] == {"ndcg@10": 0.05, "hr@10": 0.11}
    assert best == {"ndcg@10": 0.05, "hr@10": 0.11}


def test_certainty_is_that_of_the_number_of_queries(make):
    sides = [make("a", results={"test/hr@10": 0.2}), make("b", results={"test/hr@10": 0.1})]
    note = compare_sides(sides).results[0].note  # 1.96 * sqrt(0.2 * 0.8 / 400)
    assert note == "400 queries: each HR@10 is known to \u00b1 0.039 (95% interval)"


def test_runs_without_a_readable_config_are_left_out_of_the_differences(make):
    sides = [make("a"), make("b", {"model.dim": 32}), make("c"), make("d")]
    for side, text in ((sides[2], None), (sides[3], "a: &a [*a]\n")):
        config = side.run.path / "config.yaml"
        config.unlink() if text is None else config.write_text(text)
    sides[2:] = [Side(read_run(side.run.path), side.label, side.state) for side in sides[2:]]
    comparison = compare_sides(sides)
    assert [d.values for d in comparison.differences] == [{"a": 64, "b": 32}]
    left_out, unreadable = comparison.warnings
    assert unreadable.startswith("d: config.yaml is not YAML: a.0 [config.yaml:1]: an alias (*) inside the very thing")
    assert left_out == "c has no config.yaml: left out of the config differences."
    render_comparison(comparison)


@pytest.fixture
def page(make, tmp_path):
    odd = '<script>alert(1)</script> & "b" $x_1$'
    loss = lambda a: [(s, {"train/loss": a - s / 200 + s % 20 / 50}) for s in range(5, 401, 5)]
    valid = [(s, {"valid/ndcg@10": s / 4000}) for s in (100, 200, 400)]
    sides = [
        make("a", results={"test/ndcg@10": 0.09, "test/hr@10": 0.15, **BASELINES}, curve=loss(7) + valid),
        make(odd, {"optimizer.lr": 0.01, "batch.global": 64}, {"test/ndcg@10": 0.08}, curve=loss(6)),
    ]
    comparison = compare_sides([sides[0], Side(sides[1].run, odd, "failed", "RunFailed: <nan>", 200, 400, 9.0)])
    path = write_compare(comparison, tmp_path / "made" / "compare.html")
    assert os.listdir(path.parent) == ["compare.html"]
    return path.read_text(encoding="utf-8")


def test_the_page_says_it_all_loads_nothing_and_escapes(page):
    shown = Page(page)
    for words in (
        *("2 runs compared", "1 finished, 1 failed", "1 x cpu", "RunFailed: <nan>", "200 / 400"),
        *("Best test NDCG@10 0.0900 a, +12.5% over the next", "12.5 s", "9.0 s", "Item-kNN"),
        *("Training loss Bold: running mean.", "Validation NDCG@10", "Not logged by <script>alert(1)"),
        *("optimizer .lr 0.001 0.01", "batch .global 32 64", "examples seen", '& "b" $x_1$'),
    ):
        assert words in shown, words
    assert_loads_nothing(page)
    assert re.findall(r'<td class="best">([\d.]+)', page) == ["0.0900", "0.1600"]


def test_batch_sizes_that_differ_in_the_middle_alone_are_seen(make, tmp_path):
    """The curves of 1, 2 and 1 examples a step lie over the examples seen, and the axis says so."""
    loss = [(step, {"train/loss": 1.0 / step}) for step in (5, 10)]
    sides = [make(name, {"batch.global": size}, curve=loss) for name, size in (("a", 1), ("b", 2), ("c", 1))]
    assert "examples seen" in Page(write_compare(compare_sides(sides), tmp_path / "c.html").read_text(encoding="utf-8"))


def test_pictures_suit_light_and_dark_and_are_described(page):
    assert assert_pictures_suit_both_themes(page) == 2


def test_no_two_runs_are_drawn_alike():
    lines = [Line(place) for place in range(MAX_RUNS)]
    assert len({(line.colour, line.dash) for line in lines}) == MAX_RUNS
    assert len({str(line.key) for line in lines}) == MAX_RUNS


def test_a_page_that_cannot_be_written_is_said(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match=r"cannot write .*file/compare\.html"):
        write_compare(compare_sides([make("a"), make("b")]), tmp_path / "file" / "compare.html")
