"""The page holds the run's numbers, loads nothing, escapes everything, and is made from whatever a run has left."""

import itertools
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
from web_page import Page, assert_loads_nothing, assert_pictures_suit_both_themes

from jaxops.core.failures import RunFailed, UserError
from jaxops.core.metrics_file import JsonlWriter
from jaxops.data.interactions.inspect import describe, histogram_of
from jaxops.evaluate.ranking import ranking_metric
from jaxops.families.rec.ranking import SAMPLED_RANKED
from jaxops.report import figures, results
from jaxops.report.folder import Series, finite, read_run, utc_time
from jaxops.report.page import write_report

pytestmark = pytest.mark.pictures

CONFIG = """task: rec
model:
  kind: sasrec   # a comment
objective: {kind: softmax}
checkpoint:
  best: ndcg@10
run:
  name: night run
  steps: 400
  seed: 17
"""
DATA = {
    "version": 1,
    "source": {"title": "MovieLens-100K", "licence": "research"},
    "events": 99991,
    "users": 943,
    "items": 1682,
    "density": 0.063,
    "ids": {"user": "integer", "item": "integer"},
    "time": {"from": "1997-09-20T03:05:10Z", "to": "1998-04-22T23:10:38Z"},
    "ties": 0.758,
    "lengths": {
        "mean": 106.0,
        "q0": 20.0,
        "q25": 33.0,
        "q50": 65.0,
        "q75": 148.0,
        "q90": 244.0,
        "q99": 440.0,
        "q100": 737.0,
        "histogram": {"edges": [1, 2, 4, 8, 16, 32], "counts": [0, 0, 30, 12, 5]},
    },
    "events_per_item": {"mean": 59.4, "q0": 1.0, "q25": 6.0, "q50": 27.0, "q75": 80.0, "q100": 583.0},
    "dropped": {"duplicate_events": 4},
    "split": {
        "kind": "leave_one_out",
        "sha256": "9b1c6a37",
        "boundaries": None,
        "train_users": 943,
        "train_events": 98105,
        "train_items": 1680,
        "valid": 943,
        "valid_cold_user": 0,
        "valid_cold_item": 1,
        "test": 400,
        "test_cold_user": 0,
        "test_cold_item": 3,
    },
}
ABOUT = {
    "version": 1,
    "metrics": {"ndcg@10": {"better": "higher", "label": "NDCG@10"}},
    "labels": {"item_knn": "Item-kNN"},
    "model": "SASRec",
    "data": describe(DATA),
    "histogram": histogram_of(DATA),
    "notes": ["Seen items are left out."],
}
SUMMARY = {
    "version": 1,
    "name": "night run",
    "state": "finished",
    "step": 400,
    "wall_s": 252.0,
    "device": "8 x cpu, jax 0.10.2",
    "best_step": 300,
    "finished": "2026-11-23T15:46:00Z",
    "command": ["jaxops", "train", "my file.yaml"],
    "versions": {"jax": "0.10.2"},
    "valid/hr@10": 0.15,
    "valid/ndcg@10": 0.08,
    "valid/mrr@10": 0.06,
    "test/hr@10": 0.2,
    "test/ndcg@10": 0.09,
    "test/mrr@10": 0.03,
    "baseline/most_popular/test/hr@10": 0.05,
    "baseline/most_popular/test/ndcg@10": 0.02,
    "baseline/most_popular/test/mrr@10": 0.01,
    "baseline/most_popular/valid/ndcg@10": 0.02,
    "baseline/item_knn/test/hr@10": 0.16,
    "baseline/item_knn/test/ndcg@10": 0.06,
    "baseline/item_knn/test/mrr@10": 0.04,
    "baseline/item_knn/valid/ndcg@10": 0.05,
}


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    writer = JsonlWriter(folder / "metrics.jsonl")
    for step in range(10, 401, 10):
        loss = math.nan if step == 50 else 7.0 * math.exp(-step / 300)
        writer.write(step, {"train/loss": loss, "train/examples_per_s": 2000.0 + step, "train/lr": 1e-3})
        if step % 100 == 0:
            value = 0.08 - abs(step - 300) / 5000
            writer.write(step, {"valid/ndcg@10": value, "valid/hr@10": 2 * value})
    writer.event(200, "resumed", "from checkpoint 200")
    writer.close()
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "data.json").write_text(json.dumps(DATA))
    (folder / "about.json").write_text(json.dumps(ABOUT))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


@pytest.fixture
def bare_dir(run_dir):
    """The same with a log of three lines: one picture to draw instead of six."""
    (run_dir / "metrics.jsonl").unlink()
    writer = JsonlWriter(run_dir / "metrics.jsonl")
    writer.write(300, {"train/loss": 2.5})
    writer.event(300, "resumed", "from checkpoint 300")
    writer.write(400, {"train/loss": 2.25})
    writer.close()
    (run_dir / "data.json").write_text(json.dumps({**DATA, "lengths": {**DATA["lengths"], "histogram": None}}))
    return run_dir


def page_of(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    return Page(path.read_text(encoding="utf-8"))


def edit_summary(folder, **changes):
    kept = {k: v for k, v in {**SUMMARY, **changes}.items() if v is not None}
    (folder / "summary.json").write_text(json.dumps(kept))


@pytest.mark.latest
def test_the_page_has_the_numbers(run_dir):
    page = page_of(run_dir)
    for words in (
        *("night run", "finished", "8 x cpu, jax 0.10.2", "23 Nov 2026, 15:46 UTC", "SASRec", "4 min 12 s"),
        *("Test NDCG@10 0.0900 +50.0% vs Item\u2011kNN", "Test HR@10 0.2000 +25.0% vs"),
        *("Validation NDCG@10 0.0800 best, at step 300", "Examples/s 2,205", "best 0.0800"),
        *("Most popular 0.0500 0.0200 0.0100", "Item-kNN 0.1600 0.0600 0.0400"),
        *("SASRec 0.2000 0.0900 0.0300", "vs best baseline +25.0% +50.0% \u221225.0%"),
        *("400 queries; HR@10 of the model is 0.200 \u00b1 0.039 (95% interval)", "1 non-finite value"),
        *("99,991", "1,682", "MovieLens-100K", "9b1c6a37", "Users by number of events", "4 duplicate_events"),
        *("resumed", "from checkpoint 200", "jaxops train 'my file.yaml'", "Seed 17", "jax 0.10.2"),
        *("Configuration, resolved", "1 more curve", "train/lr"),
    ):
        assert words in page, words


def test_best_is_bold_even_where_it_is_a_baseline(bare_dir):
    text = write_report(bare_dir).read_text()
    test_table = text[text.index("<caption>Test") : text.index("<caption>Validation")]
    assert re.findall(r'<td class="best">([\d.]+)', test_table) == ["0.2000", "0.0900", "0.0400"]
    assert re.findall(r'class="(good|bad)">', test_table) == ["good", "good", "bad"]


def test_a_slice_has_rows_of_its_own_with_the_baselines_that_have_it(bare_dir):
    cold = {"test/hr@10[new]": 0.05, "baseline/item_knn/test/hr@10[new]": 0.07, "test/hr@10[late]": 0.06}
    cold |= {"test/hr@10[none]": 0.0, "baseline/item_knn/test/hr@10[none]": 0.0}
    edit_summary(bare_dir, **cold)
    page = page_of(bare_dir)
    assert "of new 0.0500 \u2013 \u2013 Item-kNN 0.0700 \u2013 \u2013 of late 0.0600 \u2013 \u2013 of none" in page
    text = (bare_dir / "report.html").read_text()
    assert '<td class="best">0.0700' in text and 'best">0.0000' not in text  # nobody is best of equals
    assert text.index("vs best baseline") < text.index("of new")


def test_the_page_loads_nothing_and_its_pictures_suit_light_and_dark(run_dir):
    text = write_report(run_dir).read_text()
    assert_loads_nothing(text)
    assert assert_pictures_suit_both_themes(text) == Page(text).tags.count("svg") == 6 and len(text) < 300_000


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_the_contrast_that_reading_needs(bare_dir):
    """WCAG AA: 4.5 for text, on the page and on a panel, light and dark."""
    css = write_report(bare_dir).read_text().split("</style>")[0]
    for scheme in css.split("prefers-color-scheme: dark"):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme.split("* { box-sizing")[0]))
        words = ("ink", "muted", "accent", "good", "bad", "warn", "busy")
        for name in (*words, *(f"series-{i}" for i in range(1, 5))):
            for ground in ("page", "surface"):
                a, b = sorted((luminance(colours[name]), luminance(colours[ground])))
                assert (b + 0.05) / (a + 0.05) >= 4.5, (name, ground)


@pytest.mark.parametrize("present", list(itertools.product([False, True], repeat=4)))
def test_any_file_may_be_missing(bare_dir, present):
    names = ("config.yaml", "metrics.jsonl", "data.json", "summary.json")
    for name, there in zip(names, present, strict=True):
        if not there:
            (bare_dir / name).unlink()
    page = page_of(bare_dir)
    assert ("night run" in page) == (present[0] or present[3])
    assert ("Training loss" in page) == present[1]
    assert "Reproduce" in page and "Not everything could be read" not in page


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "data.json", "summary.json"])
def test_a_file_cut_off_anywhere_does_not_stop_the_page(bare_dir, name):
    whole = (bare_dir / name).read_bytes()
    for share in (0, 0.01, 0.3, 0.77, 0.999):
        (bare_dir / name).write_bytes(whole[: int(len(whole) * share)])
        page_of(bare_dir)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "[1, 2]"),
        ("summary.json", '{"name": 3, "state": [], "wall_s": "x", "test/hr@10": "high", "step": null}'),
        ("summary.json", '{"test/hr@10": NaN, "test/ndcg@10": 1e400, "best_step": {}, "versions": [1]}'),
        ("summary.json", '{"baseline/": 1, "baseline/x": 1, "baseline/x/test/auc": 0, "test/auc": 0.5}'),
        (
            "summary.json",
            '{"step": ' + "9" * 400 + ', "wall_s": -1, "command": {"a": 1}, "finished": "soon"}',
        ),
        ("data.json", '{"users": "many", "split": 3, "lengths": []}'),
        ("data.json", '{"lengths": {"histogram": {"edges": [1], "counts": [1, 2]}}, "split": {"test": -4}}'),
        ("data.json", '{"lengths": {"histogram": {"edges": [1, 2], "counts": ["a"]}}, "a": [[1]]}'),
        ("data.json", '{"lengths": {"histogram": {"edges": [], "counts": []}}}'),
        ("config.yaml", "- 1\n- 2\n"),
        ("config.yaml", "run: [1\n"),
        ("config.yaml", "run: {steps: many, name: {a: 1}}\nmodel: 3\ncheckpoint: {best: [1]}\n"),
        ("config.yaml", "a: &a [*a]\n\x00: \x07"),
        ("metrics.jsonl", '{"v": 9, "step": 1}\n'),
        ("metrics.jsonl", '{"v": 1, "step": 1, "time": "now", "train/loss": "high", "valid/auc": [1]}\n'),
        ("metrics.jsonl", '{"v": 1, "step": 1, "time": 1e300, "train/loss": 1e308, "event": 3}\n'),
        ("metrics.jsonl", '{"v": 1, "step": ' + "9" * 400 + ', "x": 1}\n{"v": 1, "step": -3, "x": 1}'),
        ("metrics.jsonl", '{"v": 1, "step": 1, "train/loss": null}\n{"v": 1, "step": 2, "x": null}\n'),
    ],
)
def test_odd_contents_do_not_stop_the_page(bare_dir, name, content):
    (bare_dir / name).write_text(content)
    page_of(bare_dir)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("summary.json", '{"name": ', "summary.json is not JSON"),
        ("data.json", "[]", "data.json is not a JSON object"),
        ("config.yaml", "run: [1\n", "config.yaml is not YAML"),
        ("metrics.jsonl", '{"v": 9, "step": 1}\n', "metrics.jsonl:1: format 9"),
    ],
)
def test_what_cannot_be_read_is_told(bare_dir, name, content, told):
    (bare_dir / name).write_text(content)
    page = page_of(bare_dir)
    assert "Not everything could be read" in page and told in page


EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>&amp;{{ 7*7 }}'


def test_everything_is_escaped(run_dir):
    evil_data = {**DATA, "source": {"title": EVIL}, "split": {**DATA["split"], "sha256": EVIL}}
    (run_dir / "data.json").write_text(json.dumps(evil_data))
    config = f"model: {{kind: '{EVIL}'}}\n# {EVIL}\n'{EVIL}': 1\nrun: {{seed: '{EVIL}'}}\n"
    (run_dir / "config.yaml").write_text(config)
    texts = ("name", "state", "device", "command")
    named = {f"{split}/{EVIL}": 0.5 for split in ("valid", "test", f"baseline/{EVIL}/test")}
    edit_summary(run_dir, **dict.fromkeys(texts, EVIL), versions={EVIL: EVIL}, **named)
    writer = JsonlWriter(run_dir / "metrics.jsonl", resume_step=400)
    for step in (1, 2):
        writer.write(step, {f"valid/{EVIL}": 1.0, f"train/{EVIL}": 2.0})
    writer.event(2, EVIL, EVIL)
    writer.close()
    page = page_of(run_dir)
    assert EVIL in page and "49" not in "".join(t for t in page.text if "alert" in t)
    assert not {"script", "img"} & set(page.tags)


@pytest.mark.parametrize("name", ["a b", "100%", "日本", "x'y\"z", "$a_1$", "<b>&amp;", "-rf", "a" * 200])
def test_run_names_with_odd_characters(bare_dir, tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(bare_dir, folder)
    edit_summary(folder, name=None)
    (folder / "config.yaml").write_text("task: rec\n")
    assert name in page_of(folder)


def test_a_run_in_progress_shows_how_far_it_is(run_dir):
    (run_dir / "summary.json").unlink()
    page = page_of(run_dir)
    for words in ("in progress", "Step 400 of 400 (100%)", "Validation NDCG@10 0.0800 best, at step 300"):
        assert words in page, words
    assert "Results" not in page


def test_a_summary_older_than_the_metrics_does_not_say_finished(bare_dir):
    edit_summary(bare_dir, step=200)
    assert read_run(bare_dir).state == "in progress"
    edit_summary(bare_dir, state="failed")
    assert read_run(bare_dir).state == "failed"


def test_a_task_without_baselines_and_a_metric_to_minimise(run_dir):
    others = {name: None for name in SUMMARY if "/" in name or name == "best_step"}
    edit_summary(run_dir, **others, **{"test/nll": 2.5, "valid/nll": 2.25})
    (run_dir / "config.yaml").write_text("model: {fn: 'mypkg.models:Mine'}\n")
    (run_dir / "about.json").unlink()
    writer = JsonlWriter(run_dir / "metrics.jsonl")
    for step, value in ((100, 3.0), (200, 2.25), (300, 2.5)):
        writer.write(step, {"valid/nll": value})
    writer.close()
    page = page_of(run_dir)
    assert "Validation NLL 2.2500 best, at step 200" in page and "mypkg.models:Mine 2.5000" in page
    assert "Bold is best" not in page and "vs best baseline" not in page


def test_a_failed_run_says_why_and_how_far_it_came(bare_dir):
    reason = "loss is not finite at step 17 (nonfinite: raise)"
    edit_summary(bare_dir, state="failed", reason=reason, step=400, steps=1000)
    page = page_of(bare_dir)
    assert reason in page and "night run failed" in page and "Step 400 of 1,000 (40%)" in page
    edit_summary(bare_dir, state="failed", reason=reason, step=17)
    page = page_of(bare_dir)
    assert reason not in page and "night run in progress" in page


def test_the_best_point_is_the_curve_s_own(run_dir):
    """Without best retention the summary's step is the last one; that does not make it the best."""
    edit_summary(run_dir, best_step=400)
    page = page_of(run_dir)
    assert "best, at step 300" in page and "Results are of the parameters at step 400." in page
    writer = JsonlWriter(run_dir / "metrics.jsonl")
    writer.write(400, {"valid/ndcg@10": 0.08})
    writer.close()
    assert "best, at step 400" in page_of(run_dir)


def test_sampled_metrics_say_so(bare_dir):
    edit_summary(bare_dir, **{"test/sampled_ndcg@10": 0.6, "baseline/item_knn/test/sampled_ndcg@10": 0.5})
    label = ranking_metric("sampled_ndcg@10").label
    about = {"metrics": {"sampled_ndcg@10": {"better": "higher", "label": label}}, "notes": [SAMPLED_RANKED]}
    (bare_dir / "about.json").write_text(json.dumps(about))
    page = page_of(bare_dir)
    assert "NDCG@10 (sampled)" in page and "rank against 100 random items only" in page


def test_data_of_another_form_is_listed_plainly(bare_dir):
    data = {"prompts": 12000, "template": {"name": "chat"}, "files": ["a", "b"]}
    (bare_dir / "data.json").write_text(json.dumps(data))
    (bare_dir / "about.json").unlink()
    page = page_of(bare_dir)
    for words in ("prompts 12,000", "template name chat", "files a, b"):
        assert words in page, words


def test_no_folder_and_no_room(bare_dir, monkeypatch):
    with pytest.raises(UserError, match=r"no run folder at .*nowhere"):
        write_report(bare_dir / "nowhere")
    with pytest.raises(UserError, match="no run folder"):
        write_report(bare_dir / "config.yaml")
    write_report(bare_dir)
    before = (bare_dir / "report.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunFailed, match=r"cannot write .*report.html: No space left on device"):
        write_report(bare_dir)
    assert (bare_dir / "report.html").read_bytes() == before


def test_the_same_folder_gives_the_same_page(run_dir):
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


def test_long_runs_stay_small(run_dir):
    lines = [f'{{"v": 1, "step": {s}, "time": {s}, "train/loss": {5 + s % 7}}}' for s in range(30_000)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert write_report(run_dir).stat().st_size < 300_000


def test_smoothing():
    constant = np.full(50, 3.0)
    np.testing.assert_allclose(figures.smoothed(constant), constant, rtol=1e-12)
    line = np.arange(500.0)
    np.testing.assert_allclose(figures.smoothed(line)[120:-120], line[120:-120], atol=1e-2)
    decay = 0.5 ** (60 / 90)
    values = np.random.default_rng(0).normal(size=90)
    weights = decay ** np.abs(np.subtract.outer(np.arange(90), np.arange(90)))
    np.testing.assert_allclose(figures.smoothed(values), weights @ values / weights.sum(1), rtol=1e-9)


def test_only_noisy_curves_are_smoothed():
    steps = np.arange(200.0)
    warmup_cosine = np.minimum(1, steps / 20) * (0.5 + 0.5 * np.cos(np.pi * steps / 200))
    assert not figures.noisy(Series(steps, warmup_cosine)) and not figures.noisy(Series(steps, 0 * steps))
    jitter = 0.1 * np.random.default_rng(0).normal(size=200)
    assert figures.noisy(Series(steps, warmup_cosine + jitter))
    assert not figures.noisy(Series(steps[:5], jitter[:5]))


def test_thinning_keeps_the_mean_and_the_order():
    points = Series(np.arange(1234.0), np.random.default_rng(0).normal(size=1234))
    thin = figures.thinned(points)
    assert len(thin) == figures.MAX_POINTS and (np.diff(thin.steps) > 0).all()
    assert thin.steps[0] < 3 and thin.steps[-1] == 1233
    few = Series(np.arange(5.0), np.arange(5.0))
    assert figures.thinned(few) is few


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.05, "0.05"), (1500, "1500"), (12500, "12.5k"), (3_000_000, "3M"), (2e9, "2G"), (-20000, "-20k")],
)
def test_compact_numbers(value, text):
    assert figures.compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.31, "8.3 s"), (60, "1 min 00 s"), (252, "4 min 12 s"), (3900, "1 h 05 min"), (90_000, "1 d 01 h")],
)
def test_durations(seconds, text):
    assert results.duration(seconds) == text


def test_values_of_the_wrong_kind_are_no_numbers():
    assert [finite(v) for v in (True, "1", None, math.nan, math.inf, 1e39, 10**400)] == [None] * 7
    assert finite(3) == 3.0 and finite(-0.5) == -0.5
    assert [utc_time(v) for v in (None, "soon", 1e300, math.nan, [])] == [None] * 5
    assert utc_time(0) == utc_time("1970-01-01") == utc_time("1970-01-01T01:00:00+01:00")


@pytest.mark.parametrize(
    ("metric", "lower"),
    [("ndcg@10", False), ("loss", True), ("rmse", True), ("auc", False), ("ne", True), ("kl", True)],
)
def test_direction_of_metrics(metric, lower, bare_dir):
    """In folders from before a family wrote it down."""
    (bare_dir / "summary.json").write_text(json.dumps({"state": "finished", f"test/{metric}": 1.0}))
    assert (read_run(bare_dir).metric(metric).better == "lower") is lower
