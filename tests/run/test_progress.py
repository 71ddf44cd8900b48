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


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("jaxops.run.progress.time.perf_counter", lambda: now[0])
    return now


def test_a_run_whose_first_window_is_far_says_something_within_ten_seconds(clock):
    """A step of 0.4 s and windows of 50: the first window ends after 20 s."""
    text = io.StringIO()
    progress = Progress(console=Console(file=text, width=80, highlight=False, soft_wrap=True))
    said = {}
    for step in range(1, 500):
        progress.at(step, 1000)
        clock[0] += 0.4
        said[step] = len(text.getvalue().splitlines())
    first = next(step for step, lines in said.items() if lines)
    assert 0.4 * first <= 10 and said[499] == 4  # the first, and one a minute after it
    line = text.getvalue().splitlines()[0]
    assert line.startswith(f"step {first:>6}/1000  2.5 steps/s  ") and line.endswith(" left")


def test_the_rate_is_not_that_of_calls_which_only_queue_a_step(clock):
    """The first calls after a compile return at once; then each waits for a step of 4 s. Seen: 1007.4 steps/s."""
    text = io.StringIO()
    progress = Progress(console=Console(file=text, width=80, highlight=False, soft_wrap=True))
    progress.say("compiled")
    clock[0] += 20.0
    for step in range(1, 10):
        progress.at(step, 10)
        clock[0] += 0.001 if step < 4 else 4.0
    lines = text.getvalue().splitlines()
    assert lines[1] == "step      1/10" and not any("steps/s" in line for line in lines)


def test_windows_are_lines_enough(clock):
    text = io.StringIO()
    progress = Progress(console=Console(file=text, width=80, highlight=False, soft_wrap=True))
    for step in range(1, 101):
        progress.at(step, 100)
        clock[0] += 0.4
        if step % 10 == 0:
            progress.step(step, 100, {"loss": 1.0, "examples_per_s": 10.0, "step_ms": 400.0})
    assert len(text.getvalue().splitlines()) == 10


def test_a_terminal_has_a_live_line_that_is_taken_away(clock):
    text = io.StringIO()
    progress = Progress(console=Console(file=text, width=80, force_terminal=True, highlight=False, soft_wrap=True))
    for step in range(1, 6):
        progress.at(step, 10)
        clock[0] += 2.0
        progress.step(step, 10, {"loss": 1.5, "examples_per_s": 10.0, "step_ms": 2000.0})
    shown = text.getvalue()
    assert "step      5/10  loss 1.5000  2.0 s a step  0:10 left" in shown
    progress.rest()
    progress.say("done")
    assert text.getvalue().rstrip().endswith("done") and progress._live is None


def test_a_terminal_that_is_gone_stops_nobody():
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    progress = Progress(console=Console(file=Gone(), width=80, force_terminal=True))
    progress.say("x")
    progress.compiling("x")
    progress.compiled("x")
    for step in range(3):
        progress.at(step, 3)
    progress.rest()


def test_quiet_says_nothing():
    text = io.StringIO()
    progress = Progress(quiet=True, console=Console(file=text))
    progress.compiling("x")
    progress.say("x")
    progress.table({}, ())
    progress.step(1, 2, {})
    assert text.getvalue() == ""
