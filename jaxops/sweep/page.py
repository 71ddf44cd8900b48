"""Writes `sweep.html`: the points of a sweep in a table and in plots, in one file that loads nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from jaxops.report import figures
from jaxops.report.compare import yaml_of
from jaxops.report.figures import GRID, INK, LINES, Plot
from jaxops.report.html import fill_template, write_page
from jaxops.report.results import Card, score
from jaxops.sweep.importance import importance, is_number
from jaxops.sweep.results import Outcome, SeedGroup
from jaxops.sweep.space import SEED

MOST_ROWS, MOST_AXES, MOST_LINES, MOST_PLOTS = 200, 5, 300, 8
LOG_FROM = 20.0
"""Numbers that span at least this factor are drawn on a logarithmic axis."""
_TONES = {"failed": "bad", "running": "busy", "waiting": "warn", "unfinished": "warn", "pruned": "warn"}


def write_sweep_page(outcome: Outcome, shares: Sequence[tuple[str, float]] = ()) -> Path:
    """Writes the page of a sweep into its folder, whole or not at all, and returns its path.

    Args:
      outcome: what the sweep has come to.
      shares: the importance of each path by a search's own evaluator; by default it is computed from the points.

    Raises:
      RunFailed: it cannot be written.
    """
    return write_page(outcome.plan.folder / "sweep.html", render_sweep(outcome, shares))


def render_sweep(outcome: Outcome, searched: Sequence[tuple[str, float]] = ()) -> str:
    """Renders the page as HTML."""
    plan, metric = outcome.plan, outcome.plan.metric
    paths = [path for path in plan.swept if path != SEED]
    scored = [group for group in outcome.groups if group.mean is not None]
    shares = list(searched) or importance(scored, [path for path in paths if len(_kinds(scored, path)) > 1])
    first = [path for path, _ in shares] or [path for path in paths if len(_kinds(scored, path)) > 1]
    failed = [result for result in outcome.results if result.state == "failed"]
    test = any(_test(group, metric.name) for group in scored)
    return fill_template(
        "sweep.html",
        name=plan.name,
        facts=[f"{len(outcome.results)} runs: {outcome.counts}", f"{metric.shown}, {metric.better} is better"],
        verdict=outcome.verdict.words,
        problems=[],
        cards=_cards(outcome, scored),
        paths=paths,
        metric=metric.shown,
        searched=plan.trials is not None,
        test=test,
        rows=[_row(outcome, group, paths) for group in outcome.groups[:MOST_ROWS]],
        left_out=max(0, len(outcome.groups) - MOST_ROWS),
        overview=[_parallel(outcome, scored, first[:MOST_AXES])] if len(scored) > 2 and len(first) > 1 else [],
        parameters=[_against(outcome, scored, path) for path in first[:MOST_PLOTS]] if len(scored) > 1 else [],
        importance=[(path, f"{share:.0%}") for path, share in shares],
        evaluator="PED-ANOVA (Optuna)" if searched else "",
        curves=[*_curves(outcome), *([] if plan.trials is None else _trials(outcome))],
        failed=[{"id": one.point.id, "label": one.point.label, "reason": one.reason} for one in failed],
    )


def _cards(outcome: Outcome, scored: Sequence[SeedGroup]) -> list[Card]:
    if not scored:
        return []
    first, metric = scored[0], outcome.plan.metric
    margin = "one seed" if first.margin is None else f"± {score(first.margin)}, {len(first.numbers)} seeds"
    cards = [Card(f"Best validation {metric.shown}", score(first.mean or 0.0), margin)]
    if outcome.verdict.p is not None:
        told = "told from the next" if outcome.verdict.winner else "not told from the next"
        cards.append(Card("Welch's test", f"p = {outcome.verdict.p:.2g}", told))
    return cards


def _row(outcome: Outcome, group: SeedGroup, paths: Sequence[str]) -> dict[str, Any]:
    name, searched = outcome.plan.metric.name, outcome.plan.trials is not None
    test = _test(group, name)
    return {
        "winner": outcome.verdict.winner is group,
        "cells": [yaml_of(group.values[path]) if path in group.values else "" for path in paths],
        "valid": _so_far(group) if group.mean is None else f"{score(group.mean)}{_margin(group)}",
        "test": score(float(np.mean(test))) if test else "\u2013",
        "runs": [
            {
                "id": one.point.id,
                "name": one.point.id if searched else one.point.seed,
                "state": one.state,
                "tone": _TONES.get(one.state, ""),
            }
            for one in group.results
        ],
    }


def _so_far(group: SeedGroup) -> str:
    """Returns the best value yet of a run that has not finished, in parentheses; a dash without one."""
    found = [one.so_far for one in group.results if one.so_far is not None]
    return f"({score(found[0])})" if len(found) == 1 else "\u2013"


def _margin(group: SeedGroup) -> str:
    return "" if group.margin is None else f" ± {score(group.margin)}"


def _test(group: SeedGroup, name: str) -> list[float]:
    """Returns the values on the test data of the runs that finished."""
    runs = [one.run for one in group.results if one.value is not None and one.run is not None]
    return [value for run in runs if (value := run.number(f"test/{name}")) is not None]


def _kinds(groups: Sequence[SeedGroup], path: str) -> list[str]:
    return list(dict.fromkeys(yaml_of(group.values[path]) for group in groups if path in group.values))


class _Axis:
    """Where the values of a path stand: numbers by size (its logarithm where they span much), others in their order."""

    def __init__(self, groups: Sequence[SeedGroup], path: str) -> None:
        self.path = path
        values = [group.values[path] for group in groups if path in group.values]
        self.numbers = all(map(is_number, values))
        self.kinds = _kinds(groups, path)
        low, high = (min(values), max(values)) if self.numbers else (0, 0)
        self.log = self.numbers and low > 0 and high / low >= LOG_FROM
        self.bounds = (float(low), float(high))

    def place(self, group: SeedGroup) -> float | None:
        """Returns a position from 0 to 1; None for a point that has no value of the path."""
        if self.path not in group.values:
            return None
        value = group.values[self.path]
        if not self.numbers:
            return self.kinds.index(yaml_of(value)) / max(len(self.kinds) - 1, 1)
        low, high, value = (np.log(one) if self.log else one for one in (*self.bounds, value))
        return float((value - low) / (high - low)) if high > low else 0.5

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """The values that are written beside it, with their positions."""
        if self.numbers:
            return [(0.0, figures.compact(self.bounds[0])), (1.0, figures.compact(self.bounds[1]))]
        return [(at / max(len(self.kinds) - 1, 1), _short(kind)) for at, kind in enumerate(self.kinds[:6])]


def _short(text: str, most: int = 14) -> str:
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def _parallel(outcome: Outcome, scored: Sequence[SeedGroup], paths: Sequence[str]) -> Plot:
    """Draws each point as a line through its values, up to the metric; the best quarter in colour."""
    axes_of, metric = [_Axis(scored, path) for path in paths], outcome.plan.metric
    shown = scored[:MOST_LINES]
    means = np.array([group.mean for group in shown])
    low, high = float(means.min()), float(means.max())
    heights = (means - low) / (high - low) if high > low else np.full(len(means), 0.5)
    best = max(1, len(shown) // 4)

    def draw(axes: Axes) -> None:
        for at in reversed(range(len(shown))):
            points = [(x, y) for x, axis in enumerate(axes_of) if (y := axis.place(shown[at])) is not None]
            x, y = np.array([*points, (len(paths), heights[at])], np.float64).T
            colour, width = (LINES[1], 2.2) if at == 0 else (LINES[0], 1.2) if at < best else (INK, 0.8)
            axes.plot(x, y, color=colour, linewidth=width, alpha=1.0 if at < best else 0.35)
        for x, axis in enumerate(axes_of):
            axes.axvline(x, color=GRID, linewidth=1.0)
            for y, text in axis.ticks:
                axes.annotate(text, (x, y), xytext=(3, 2), textcoords="offset points", fontsize=8.5)
        axes.axvline(len(paths), color=GRID, linewidth=1.0)
        for y, value in ((0.0, low), (1.0, high)):
            style: dict[str, Any] = {"xytext": (-3, 2), "textcoords": "offset points", "ha": "right", "fontsize": 8.5}
            axes.annotate(score(value), (len(paths), y), **style)
        names = [*(path.rpartition(".")[2] for path in paths), metric.shown]
        axes.set_xticks(range(len(names)), [_short(name) for name in names])
        axes.set_yticks([])
        axes.margins(y=0.12)
        axes.grid(False)

    caption = "Each line is a point; the best is orange, and the best quarter blue."
    alt = f"{len(shown)} points over {', '.join(paths)}; the best is {shown[0].label}, {score(shown[0].mean or 0.0)}"
    return Plot("All parameters", caption, figures.picture(draw, "All parameters", alt))


def _against(outcome: Outcome, scored: Sequence[SeedGroup], path: str) -> Plot:
    """Draws the metric over the values of a path, with the interval over seeds where there are any."""
    axis, metric = _Axis(scored, path), outcome.plan.metric
    having = [group for group in scored if path in group.values]

    def draw(axes: Axes) -> None:
        values = [group.values[path] for group in having]
        x = values if axis.numbers else [axis.kinds.index(yaml_of(value)) for value in values]
        y = [group.mean or 0.0 for group in having]
        margins = [group.margin or 0.0 for group in having]
        axes.errorbar(x, y, yerr=margins, fmt="o", color=LINES[0], markersize=4.5, linewidth=1.2, alpha=0.75)
        if axis.log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if axis.numbers and len({*x}) <= 5:
            axes.set_xticks(sorted({*x}))
        if not axis.numbers:
            axes.set_xticks(range(len(axis.kinds)), [_short(kind) for kind in axis.kinds])
            axes.margins(x=0.2)
        else:
            axes.xaxis.set_major_formatter(lambda value, _: figures.compact(value))
        axes.yaxis.set_major_formatter(lambda value, _: figures.compact(value))
        axes.set_xlabel(path)
        axes.set_ylabel(metric.shown)

    shown = having[:12]
    alt = "; ".join(f"{yaml_of(group.values[path])}: {group.shown}" for group in shown)
    intervals = "Bars: 95% intervals over seeds." if any(group.margin for group in having) else ""
    return Plot(path, intervals, figures.picture(draw, f"{metric.shown} over {path}", alt))


def _curves(outcome: Outcome) -> Iterator[Plot]:
    """Yields the curve of the metric for the best groups, each with a band from its lowest to its highest seed."""
    name, shown = f"valid/{outcome.plan.metric.name}", outcome.plan.metric.shown
    best = enumerate(outcome.groups[: 2 * len(LINES)], start=1)
    drawn = [(rank, group, band) for rank, group in best if (band := _band(group, name)) is not None][: len(LINES)]
    if not drawn:
        return

    def draw(axes: Axes) -> None:
        for colour, (rank, _, (steps, low, mean, high)) in zip(LINES, drawn, strict=False):
            axes.plot(steps, mean, color=colour, linewidth=1.8, label=f"#{rank}")
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.xaxis.set_major_formatter(lambda value, _: figures.compact(value))
        axes.yaxis.set_major_formatter(lambda value, _: figures.compact(value))
        axes.set_xlabel("step")
        figures.legend(axes)

    alt = "; ".join(f"{group.label} ends at {mean[-1]:.4g}" for _, group, (_, _, mean, _) in drawn)
    caption = "The best points of the table: mean over seeds, and a band from the lowest to the highest."
    if outcome.plan.trials is not None:
        caption = "The best trials of the table."
    yield Plot(f"Validation {shown}", caption, figures.picture(draw, f"Validation {shown}", alt))


def _trials(outcome: Outcome) -> Iterator[Plot]:
    """Yields the curves of all trials of a search: where those that were pruned ended."""
    name, _shown = f"valid/{outcome.plan.metric.name}", outcome.plan.metric.shown
    curves = [
        (one.state == "pruned", curve)
        for group in outcome.groups
        for one in group.results
        if one.run is not None and len(curve := one.run.curve(name))
    ]
    if not curves:
        return

    def draw(axes: Axes) -> None:
        for at in reversed(range(len(curves[:MOST_LINES]))):
            pruned, curve = curves[at]
            colour = LINES[1] if at == 0 else INK if pruned else LINES[0]
            axes.plot(
                curve.steps,
                curve.values,
                color=colour,
                linewidth=2.2 if at == 0 else 1.0,
                alpha=1.0 if at == 0 else 0.4,
            )
            axes.plot(curve.steps[-1:], curve.values[-1:], "x" if pruned else "o", color=colour, markersize=4.0)
        axes.xaxis.set_major_formatter(lambda value, _: figures.compact(value))
        axes.yaxis.set_major_formatter(lambda value, _: figures.compact(value))
        axes.set_xlabel("step")

    count = sum(pruned for pruned, _ in curves)
    caption = f"The best is orange; a cross ends each of the {count} that were pruned, in grey."
    yield Plot(
        "All trials", caption, figures.picture(draw, "All trials", f"{len(curves)} curves, {count} of them pruned")
    )


def _band(group: SeedGroup, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Returns steps, lowest, mean and highest value over the seeds, at the steps that all of them have."""
    curves = [curve for one in group.results if one.run is not None and len(curve := one.run.curve(name))]
    if not curves:
        return None
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    if not len(steps):
        return None
    values = np.stack([curve.values[np.isin(curve.steps, steps)] for curve in curves])
    return steps, values.min(0), values.mean(0), values.max(0)
