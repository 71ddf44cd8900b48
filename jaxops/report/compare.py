"""Compares several runs, as values: the differences between their configs and their results.

Nothing is drawn here (compare_page.py does that), so that printing a comparison is quick. Tested in
tests/report/test_compare_page.py.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from jaxops.config.dump import flatten_config
from jaxops.config.yaml_text import Dumper
from jaxops.core.metric import Metric, label_of
from jaxops.report import results
from jaxops.report.folder import EVALUATED, RunRecord, finite

MAX_RUNS = 8
"""More lines than this in one picture cannot be told apart."""
LEFT_OUT = ("run.name", "run.dir")
"""Config paths whose differences say nothing."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the compared runs.

    Attributes:
      run: the files of its run folder.
      label: a name that no other run of the comparison has.
      state: `finished`, `failed`, `running` and so on.
      reason: why it ended, where that is known.
      step: the last step.
      steps: length of the run in steps; None where that is not known.
      wall_s: seconds of training so far; None where that is not known.
    """

    run: RunRecord
    label: str
    state: str
    reason: str = ""
    step: int | None = None
    steps: int | None = None
    wall_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Difference:
    """A config value that is not the same in all runs; `values` is by label, without the runs that lack the path."""

    path: str
    values: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Score:
    """A row of results, of a run or a baseline.

    Attributes:
      label: name of the run or baseline.
      side: position of the run; None for a baseline.
      values: numbers by metric.
      note: a remark on the numbers.
    """

    label: str
    side: int | None
    values: dict[str, float]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Results:
    """The rows of one split; `best` holds each metric's best value where there are several to choose from."""

    split: str
    metrics: list[str]
    rows: list[Score]
    best: dict[str, float]
    note: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several runs: as given, the differences of their configs, their results, and what forbids comparing those."""

    sides: list[Side]
    differences: list[Difference]
    results: list[Results]
    warnings: list[str]

    @property
    def headline(self) -> str | None:
        """The metric that the comparison is about: that of the first run that has one."""
        return next((name for side in self.sides if (name := results.headline(side.run))), None)


def compare_sides(sides: Sequence[Side]) -> Comparison:
    """Compares runs; a run may still be running, or lack any of its files."""
    found = [_results(sides, split) for split in EVALUATED]
    return Comparison(list(sides), _differences(sides), [r for r in found if r.metrics], list(_warnings(sides, found)))


def _differences(sides: Sequence[Side]) -> list[Difference]:
    """Returns the differences over the runs whose config can be read, in the first run's order, compared as YAML."""
    configs = {side.label: values for side in sides if (values := _flat(side.run.config))}
    paths = dict.fromkeys(path for config in configs.values() for path in config)
    sections = list(dict.fromkeys(path.split(".")[0] for path in paths))
    together = sorted(paths, key=lambda path: sections.index(path.split(".")[0]))
    found = [
        Difference(path, {label: config[path] for label, config in configs.items() if path in config})
        for path in together
        if path not in LEFT_OUT
    ]
    return [
        difference
        for difference in found
        if len(difference.values) < len(configs) or len({yaml_of(x) for x in difference.values.values()}) > 1
    ]


def yaml_of(value: Any) -> str:
    """Writes a config value as a user would: `0.001`, `softmax`, `[hr@10, ndcg@10]`."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config by dotted path; nothing for a config that contains itself (YAML can express that)."""
    try:
        return dict(flatten_config(config)) if config else {}
    except RecursionError:
        return {}


def _results(sides: Sequence[Side], split: str) -> Results:
    rows = [_score(place, side, split) for place, side in enumerate(sides)]
    names = dict.fromkeys(name for side in sides for name in results.metrics(side.run, split))
    metrics = [name for name in names if any(name in row.values for row in rows)]
    rows += _baselines(sides, split, metrics)
    best = {}
    for name in metrics if len(set(_splits(sides).values())) < 2 else ():
        values = [row.values[name] for row in rows if name in row.values]
        if len(set(values)) > 1:
            top = metric_of(sides, name).best(values)
            if top is not None:
                best[name] = top
    return Results(split, metrics, rows, best, _chance(sides, rows, split, metrics))


def metric_of(sides: Sequence[Side], name: str) -> Metric:
    """Returns a metric as described by the first run whose family recorded it, else by the first run."""
    runs = [side.run for side in sides]
    return next((run for run in runs if run.describes(name)), runs[0]).metric(name)


def label_in(sides: Sequence[Side], name: str) -> str:
    """Returns a baseline's name for people, from the first run that has one for it."""
    labels = (side.run.label(name) for side in sides)
    return next((label for label in labels if label != label_of(name)), label_of(name))


def _score(place: int, side: Side, split: str) -> Score:
    """Returns the final numbers, or those of the best evaluation so far while there are none."""
    run = side.run
    names = results.metrics(run, split)
    values = {name: value for name in names if (value := run.number(f"{split}/{name}")) is not None}
    ended = run.number("step")
    if values:
        older = ended is not None and run.step is not None and run.step > ended
        return Score(side.label, place, values, f"of step {ended:,.0f}" if older else "")
    metric = results.headline(run)
    best = results.best_step(run, metric) if metric and split == "valid" else None
    if best is None:
        return Score(side.label, place, {})
    curves = {name: run.curve(f"valid/{name}") for name in names}
    so_far = {
        name: float(curve.values[curve.steps == best[0]][0]) for name, curve in curves.items() if best[0] in curve.steps
    }
    return Score(side.label, place, so_far, f"best so far, step {best[0]:,.0f}")


def _baselines(sides: Sequence[Side], split: str, metrics: Sequence[str]) -> Iterator[Score]:
    """Yields a row for each baseline; several rows where the runs have different numbers for it."""
    several = len(set(_splits(sides).values())) > 1
    for name in dict.fromkeys(name for side in sides for name in results.baseline_names(side.run)):
        groups: list[tuple[dict[str, float], list[str]]] = []
        for side in sides:
            values = _baseline(side, name, split, metrics)
            group = next((group for group in groups if _agree(group[0], values)), None)
            if group is not None:
                group[0].update(values)
            elif values:
                groups.append((values, []))
                group = groups[-1]
            if group is not None and values:
                group[1].append(side.label)
        for values, labels in groups:
            note = f"of {', '.join(labels)}" if several or len(groups) > 1 else ""
            yield Score(label_in(sides, name), None, values, note)


def _baseline(side: Side, name: str, split: str, metrics: Sequence[str]) -> dict[str, float]:
    found = {metric: side.run.number(f"baseline/{name}/{split}/{metric}") for metric in metrics}
    return {metric: value for metric, value in found.items() if value is not None}


def _agree(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Returns True where no metric has two values (rounding apart)."""
    return all(math.isclose(a[metric], b[metric], rel_tol=1e-6) for metric in a.keys() & b.keys())


def _warnings(sides: Sequence[Side], found: Sequence[Results]) -> Iterator[str]:
    """Yields what a reader must know before concluding that one number is better than another."""
    splits = _splits(sides)
    if len(set(splits.values())) > 1:
        groups = {sha: [label for label in splits if splits[label] == sha] for sha in splits.values()}
        listed = "; ".join(f"{sha[:12]}: {', '.join(labels)}" for sha, labels in groups.items())
        yield f"The runs were evaluated on different data: none is called best. Splits by SHA-256: {listed}."
    elif any(row.side is None and row.note for result in found for row in result.rows):
        yield "The same baseline has different numbers: the runs were not evaluated on the same data."
    for side in sides:
        for problem in side.run.problems:
            yield f"{side.label}: {problem}"
        if not side.run.config_text:
            yield f"{side.label} has no config.yaml: left out of the config differences."


def _splits(sides: Sequence[Side]) -> dict[str, str]:
    """Returns the SHA-256 of each run's evaluation data, by label, where it is known."""
    return {side.label: str(sha) for side in sides if (sha := _split(side.run).get("sha256"))}


def _chance(sides: Sequence[Side], rows: Sequence[Score], split: str, metrics: Sequence[str]) -> str:
    """Returns how far chance alone moves a hit rate over that many queries: the widest 95 % interval of the runs."""
    counts = {finite(_split(side.run).get(split)) for side in sides}
    n = counts.pop() if len(counts) == 1 else None
    if n is None or n < 1:
        return ""
    rate = next((name for name in metrics if name.startswith(("hr@", "recall@"))), "")
    values = [row.values[rate] for row in rows if row.side is not None and rate in row.values]
    inside = [value for value in values if 0 <= value <= 1]
    if not inside:
        return f"{n:,.0f} queries"
    margin = 1.96 * math.sqrt(max(value * (1 - value) for value in inside) / n)
    return f"{n:,.0f} queries: each {metric_of(sides, rate).shown} is known to \u00b1 {margin:.3f} (95% interval)"


def _split(run: RunRecord) -> Mapping[str, Any]:
    found = run.data.get("split")
    return found if isinstance(found, Mapping) else {}


def speed(run: RunRecord) -> float | None:
    """Returns the median of training examples per second, None where none were logged."""
    curve = run.curve("train/examples_per_s")
    return float(np.median(curve.values)) if len(curve) else None
