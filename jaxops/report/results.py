"""The results of a run: the model against the baselines in tables, and a few headline values."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from jaxops.report.folder import EVALUATED, RunRecord, finite

TITLES = {"test": "Test", "valid": "Validation"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number of a table as it is shown; the best of its column is bold."""

    text: str
    best: bool


@dataclasses.dataclass(frozen=True)
class Row:
    """The numbers of the model or of a baseline.

    Attributes:
      label: its name.
      ours: True for the model.
      cells: a number for each column.
      within: True for a baseline on the slice of the row above.
    """

    label: str
    ours: bool
    cells: list[Cell]
    within: bool = False


@dataclasses.dataclass(frozen=True)
class Gain:
    """The gain over the best baseline, such as `+38.2%`, and True where that is an improvement."""

    text: str
    better: bool


@dataclasses.dataclass(frozen=True)
class Table:
    """One split: rows for the model and each baseline, on all examples and on each slice; a column for each metric."""

    title: str
    columns: list[str]
    rows: list[Row]
    gains: list[Gain | None]
    slices: list[Row]
    note: str


@dataclasses.dataclass(frozen=True)
class Card:
    """A headline value: its label, the value, and a note that puts it in proportion."""

    label: str
    value: str
    note: str = ""


def metric_label(run: RunRecord, name: str) -> str:
    """Returns a metric's name for people: `NDCG@10` for `ndcg@10`."""
    return run.metric(name).shown


def display(run: RunRecord, name: str) -> str:
    """Returns a baseline's name for people."""
    return run.label(name)


def model_name(run: RunRecord) -> str:
    """Returns the model's name for people: the family's name for it, else its kind or its import path."""
    known = run.about.get("model")
    return str(known or run.label(str(run.setting("model", "kind") or run.setting("model", "fn") or "model")))


def baseline_names(run: RunRecord) -> list[str]:
    """Returns the names of the baselines in the order of the summary."""
    found = (key.split("/")[1] for key in run.summary if key.startswith("baseline/") and key.count("/") >= 3)
    return list(dict.fromkeys(found))


def metrics(run: RunRecord, split: str) -> list[str]:
    """Returns a split's metrics in the summary (else in the log), without slices, ranking metrics first."""
    keys = [key for key in run.summary if key.startswith(f"{split}/") and finite(run.summary[key]) is not None]
    if not keys and split == "valid":
        keys = [key for key in run.series if key.startswith("valid/") and len(run.series[key])]
    names = [key.removeprefix(f"{split}/") for key in keys if "[" not in key]
    asked = run.setting("evaluate", "metrics")
    order = {str(name): at for at, name in enumerate(asked)} if isinstance(asked, list) else {}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def slices(run: RunRecord, split: str) -> list[str]:
    """Returns the parts of a split, or further labels, that the summary has metrics of."""
    keys = [key for key in run.summary if key.startswith(f"{split}/") and key.endswith("]") and "[" in key]
    return list(dict.fromkeys(key.partition("[")[2].removesuffix("]") for key in keys))


def headline(run: RunRecord) -> str | None:
    """Returns the metric of the best checkpoint or of early stopping, else NDCG@10, else the first."""
    there = dict.fromkeys(name for split in EVALUATED for name in metrics(run, split))
    wanted = (
        run.setting("checkpoint", "best"),
        run.setting("evaluate", "stop", "metric"),
        run.about.get("headline"),
        *there,
    )
    return next((name for name in wanted if isinstance(name, str) and name in there), None)


def best_step(run: RunRecord, metric: str) -> tuple[float, float] | None:
    """Returns (step, value) of the best evaluation on validation; among equal ones the kept step, else the first."""
    curve = run.curve(f"valid/{metric}")
    if not len(curve):
        return None
    best = run.metric(metric).best(curve.values.tolist())
    if best is None:
        return None
    steps = curve.steps[curve.values == best]
    kept = run.number("best_step")
    step = kept if kept is not None and kept in steps else steps[0]
    return float(step), float(best)


def tables(run: RunRecord) -> list[Table]:
    """Returns a table for each split that the summary has results of."""
    return [_table(run, split) for split in EVALUATED if run.summary and metrics(run, split)]


def cards(run: RunRecord) -> list[Card]:
    """Returns the headline values; for a run that has not finished, its progress comes first."""
    progress = [] if run.state == "finished" else [_progress(run)]
    return [*progress, *_result_cards(run), *_training_cards(run)]


def _result_cards(run: RunRecord) -> Iterator[Card]:
    metric = headline(run)
    if metric is None:
        return
    hit_rates = [name for name in metrics(run, "test") if name.startswith("hr@")]
    for name in dict.fromkeys([metric, *hit_rates[:1]]):
        value, gain = run.number(f"test/{name}"), _gain(run, "test", name)
        against = _best_baseline(run, "test", name)[0].replace("-", "\u2011")
        if value is not None:
            note = f"{gain.text} vs {against}" if gain else ""
            yield Card(f"Test {metric_label(run, name)}", score(value), note)
    best = best_step(run, metric)
    if best is not None:
        yield Card(f"Validation {metric_label(run, metric)}", score(best[1]), f"best, at step {best[0]:,.0f}")


def _training_cards(run: RunRecord) -> Iterator[Card]:
    loss, speed, mfu = (run.curve(f"train/{name}") for name in ("loss", "examples_per_s", "mfu"))
    if len(loss):
        yield Card("Training loss", f"{loss.values[-1]:.4g}", f"from {loss.values[0]:.4g}")
    if len(speed):
        note = f"median; MFU {np.median(mfu.values):.1%}" if len(mfu) else "median of the run"
        yield Card("Examples/s", amount(float(np.median(speed.values))), note)
    wall, steps = run.number("wall_s"), run.number("step")
    if wall is not None:
        yield Card("Wall time", duration(wall), f"{steps:,.0f} steps" if steps else "")
    elif run.first_time and run.last_time and run.last_time > run.first_time:
        logged = (run.last_time - run.first_time).total_seconds()
        yield Card("Time so far", duration(logged), "pauses included")


def score(value: float) -> str:
    """Writes a metric with four digits: `0.1973`."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def amount(value: float) -> str:
    """Writes an amount or a rate: `14,972`; three digits below a hundred."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Writes a time in its two largest units: `1 h 05 min`, `4 min 12 s`, `8.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def result_cell(value: float | None, best: float | None) -> Cell:
    """Returns a number as a table shows it: a dash for None, and marked where it is the best of its column."""
    return Cell("\u2013" if value is None else score(value), value is not None and value == best)


def _table(run: RunRecord, split: str) -> Table:
    names, shown = metrics(run, split), baseline_names(run)
    if shown:
        compared = [name for name in names if any(_baseline(run, b, split, name) is not None for b in shown)]
        names = compared or names
    rows = _rows(run, split, names, model_name(run))
    gains = [_gain(run, split, name) for name in names]
    parts: list[Row] = []
    for part in slices(run, split):
        parts += _rows(run, split, [f"{name}[{part}]" for name in names], f"of {part}", within=True)
    note = _certainty(run, split, names)
    return Table(TITLES[split], [metric_label(run, n) for n in names], rows, gains, parts, note)


def _rows(run: RunRecord, split: str, names: list[str], label: str, within: bool = False) -> list[Row]:
    """Returns rows of the model and the baselines (on a slice, of those that have it), each column's best marked."""
    values = [(label, [run.number(f"{split}/{name}") for name in names])]
    for baseline in baseline_names(run):
        found = [_baseline(run, baseline, split, name) for name in names]
        if not within or any(value is not None for value in found):
            values.append((display(run, baseline), found))
    columns = zip(*(row for _, row in values), strict=True)
    best = [
        _best(run, name, column) if len({*column} - {None}) > 1 else None
        for name, column in zip(names, columns, strict=True)
    ]
    return [
        Row(
            label=label,
            ours=place == 0 and not within,
            cells=[result_cell(value, top) for value, top in zip(row, best, strict=True)],
            within=place > 0 and within,
        )
        for place, (label, row) in enumerate(values)
    ]


def _best(run: RunRecord, metric: str, values: Sequence[float | None]) -> float | None:
    return run.metric(metric).best([value for value in values if value is not None])


def _baseline(run: RunRecord, baseline: str, split: str, metric: str) -> float | None:
    return run.number(f"baseline/{baseline}/{split}/{metric}")


def _best_baseline(run: RunRecord, split: str, metric: str) -> tuple[str, float | None]:
    values = {name: _baseline(run, name, split, metric) for name in baseline_names(run)}
    best = _best(run, metric, list(values.values()))
    name = next((name for name, value in values.items() if value == best), "")
    return (display(run, name) if name else ""), best


def _gain(run: RunRecord, split: str, metric: str) -> Gain | None:
    """Returns the gain over the best baseline.

    It is None without both numbers, over a baseline of zero, or where neither number is better.
    """
    ours, (_, best) = run.number(f"{split}/{metric}"), _best_baseline(run, split, metric)
    if ours is None or not best:
        return None
    gain = (ours - best) / abs(best)
    text = f"{gain:+.1%}".replace("-", "\u2212")
    return Gain(text, run.metric(metric).improves(ours, best))


def _certainty(run: RunRecord, split: str, names: list[str]) -> str:
    """Returns how far chance alone moves a hit rate over that many queries (normal approximation, 95 %)."""
    counts = run.data.get("split")
    n = finite(counts.get(split)) if isinstance(counts, dict) else None
    if not n or n < 1:
        return ""
    note = f"{n:,.0f} queries"
    rate = next((name for name in names if name.startswith(("hr@", "recall@"))), None)
    value = run.number(f"{split}/{rate}")
    if rate is None or value is None or not 0 <= value <= 1:
        return note
    margin = 1.96 * math.sqrt(value * (1 - value) / n)
    return f"{note}; {metric_label(run, rate)} of the model is {value:.3f} \u00b1 {margin:.3f} (95% interval)"


def _progress(run: RunRecord) -> Card:
    step = run.number("step")
    step = run.step if step is None else step
    total = run.number("steps") or finite(run.setting("run", "steps"))
    if step is None:
        return Card("Step", "\u2013", "nothing logged yet")
    return Card("Step", f"{step:,.0f}", f"of {total:,.0f} ({step / total:.0%})" if total else "so far")
