"""What a run says: lines that survive a log file, and a final table that no width cuts."""

import io

import pytest
from rich.console import Console

from jaxops.run.progress import Progress, results_table

METRICS = ("hr@10", "ndcg@10", "mrr@10", "recall@100", "sampled_ndcg@10", "hr@1")


def summary(metrics: tuple[str, ...]) -> dict:
    found = {"name": "run", "step": 3}
    for number, prefix in enumerate(("", "baseline/item_knn/", "baseline/most_popular/")):
        for part in ("valid", "test"):
            for place, metric in enumerate(metrics):
                found[f"{prefix}{part}/{metric}"] = (1 + number * 20 + place + (part == "test") * 10) / 100
    return found


@pytest.mark.parametrize("metrics", [METRICS[:1], METRICS[:3], METRICS])
def test_every_number_and_name_is_in_the_table_in_80_columns(metrics):
    values = summary(metrics)
    text = io.StringIO()
    Console(file=text, width=80).print(results_table(values, metrics))
    shown = text.getvalue()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    for name, value in values.items():
        if "/" in name:
            assert f"{value:.4f}" in shown
    assert all(metric in shown for metric in metrics)
    assert shown.index("model") < shown.index("most popular") < shown.index("item knn")


@pytest.mark.parametrize("metrics", [METRICS[:2], METRICS])
def test_slices_follow_with_their_baselines(metrics):
    values = summary(metrics)
    sliced = {f"{name}[cold_item]": value + 0.005 for name, value in values.items() if "/" in name}
    del values["name"]
    text = io.StringIO()
    Console(file=text, width=80).print(results_table(values | sliced | {"test/hr@10[other]": 0.7777}, metrics))
    shown = text.getvalue()
    assert all(f"{value:.4f}" in shown for value in sliced.values())
    assert shown.index(f"{values['test/hr@10']:.4f}") < shown.index("cold_item") < shown.index("0.7777")
    assert shown.count("item knn") == (2 if len(metrics) == 2 else 1), "a slice without baselines has no rows of them"


def test_what_is_not_known_is_an_empty_cell():
    values = summary(METRICS[:3])
    del values["baseline/item_knn/test/hr@10"]
    values |= {"test/hr@10[cold]": float("nan"), "baseline/item_knn/test/hr@10[cold]": float("nan")}
    text = io.StringIO()
    Console(file=text, width=80).print(results_table(values, METRICS[:3]))
    assert "None" not in text.getvalue() and "nan" not in text.getvalue()


def test_progress_is_plain_lines():
    text = io.StringIO()
    progress = Progress(console=Console(file=text, width=80, highlight=False, soft_wrap=True))
    progress.compiling("train_step")
    progress.compiled("something_else")
    progress.compiled("train_step")
    values = {"loss": 1.23456, "examples_per_s": 12345.6, "step_ms": 100.0}
    progress.step(50, 1000, values)
    progress.step(51, 1000, values)  # too soon to be worth a line
    progress.step(1000, 1000, values)
    progress.evaluated(1000, "valid", {"ndcg@10": 0.5}, "(best: step 900)")
    progress.say("[bold]not markup[/bold]")
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("compiling train_step ... ") and lines[0].endswith(" s")
    assert lines[1] == "step     50/1000  loss 1.2346  12,346 examples/s  1:35 left"
    assert lines[2].startswith("step   1000/1000")
    assert lines[3] == "step   1000  valid: ndcg@10 0.5000  (best: step 900)"
    assert lines[4] == "[bold]not markup[/bold]"


def test_quiet_says_nothing():
    text = io.StringIO()
    progress = Progress(quiet=True, console=Console(file=text))
    progress.compiling("x")
    progress.say("x")
    progress.table({}, ())
    progress.step(1, 2, {})
    assert text.getvalue() == ""
