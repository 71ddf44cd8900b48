"""Writes `compare.html`: several runs on one page with their curves overlaid, in one file that loads nothing."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from jaxops.report import figures, results
from jaxops.report.compare import Comparison, Difference, Results, Score, Side, metric_of, speed, yaml_of
from jaxops.report.figures import LINES, Plot
from jaxops.report.folder import Series
from jaxops.report.html import fill_template, write_page

TONES = {"finished": "good", "failed": "bad", "running": "busy"}
"""Colour of each state; any other state is a warning."""
RAW_BELOW = 4
"""With this many curves or more, raw values behind the running means would hide each other."""
MEAN_FROM = 60
"""Number of points from which a running mean tells noisy curves apart."""
_DASHES = ((), (5.0, 2.0), (1.5, 1.5), (6.0, 2.0, 1.5, 2.0))
_MORE = {
    "train/grad_norm": ("Gradient norm", True),
    "train/lr": ("Learning rate", False),
    "train/examples_per_s": ("Examples a second", True),
}
"""Titles of the curves behind the main ones, and True where a running mean says more."""


@dataclasses.dataclass(frozen=True)
class Line:
    """The style of a run's line, everywhere on the page: four colours, then the same four with other dashes."""

    place: int

    @property
    def colour(self) -> str:
        return LINES[self.place % len(LINES)]

    @property
    def dash(self) -> tuple[float, ...]:
        """Lengths of strokes and gaps, in line widths; empty for a full line."""
        return _DASHES[(self.place + self.place // len(LINES)) % len(_DASHES)]

    @property
    def key(self) -> Markup:
        """A piece of the line, for a legend."""
        dash = f"; stroke-dasharray: {' '.join(f'{2.2 * length:g}' for length in self.dash)}" if self.dash else ""
        return Markup(
            '<svg class="key" viewBox="0 0 30 8" aria-hidden="true"><line x1="1" y1="4" x2="29" y2="4" '
            'style="stroke: var(--series-{}){}"/></svg>'
        ).format(self.place % len(LINES) + 1, dash)


def write_compare(comparison: Comparison, path: str | os.PathLike[str]) -> Path:
    """Writes the page whole or not at all, makes its folder, and returns its path.

    Raises:
      RunFailed: it cannot be written there.
    """
    return write_page(Path(path), render_comparison(comparison), hint="; --out names another file")


def render_comparison(comparison: Comparison) -> str:
    """Renders the page as HTML."""
    sides = comparison.sides
    return fill_template(
        "compare.html",
        count=len(sides),
        names=[side.label for side in sides],
        keys=[Line(place).key for place in range(len(sides))],
        cards=_cards(comparison),
        problems=comparison.warnings,
        facts=list(_facts(sides)),
        runs=[_run(side, len(_devices(sides)) > 1) for side in sides],
        columns=["Steps", "Best step", "Training loss", "Examples/s", "Wall time"],
        tables=[_table(sides, found) for found in comparison.results],
        two=len(comparison.results) > 1 and all(len(found.metrics) <= 3 for found in comparison.results),
        bold=any(found.best for found in comparison.results),
        sampled=any(name.startswith("sampled_") for found in comparison.results for name in found.metrics),
        plots=list(_plots(comparison)),
        more=list(_more(comparison)),
        differences=[_difference(found, sides) for found in comparison.differences],
    )


def _cards(comparison: Comparison) -> list[results.Card]:
    """Returns cards on which run leads by the headline metric, and by how much; none where nothing is called best."""
    ahead = [card for found in comparison.results if (card := _ahead(comparison.sides, found, comparison.headline))]
    changed = str(len(comparison.differences))
    return [*ahead, results.Card("Config differences", changed, "name and folder left out")] if ahead else []


def _ahead(sides: Sequence[Side], found: Results, metric: str | None) -> results.Card | None:
    ranked = [row for row in found.rows if row.side is not None and metric in row.values]
    if metric is None or metric not in found.best or len(ranked) < 2:
        return None
    described = metric_of(sides, metric)
    ranked.sort(key=lambda row: row.values[metric], reverse=described.better == "higher")
    first, second = (row.values[metric] for row in ranked[:2])
    gain = f", {(first - second) / abs(second):+.1%} over the next".replace("-", "\u2212") if second else ""
    note = f"{ranked[0].label}{gain}" if first != second else "the same for the first two"
    label = f"Best {results.TITLES[found.split].lower()} {described.shown}"
    return results.Card(label, results.score(first), note)


def _facts(sides: Sequence[Side]) -> Iterator[str]:
    """Yields the facts on the line under the title."""
    states = [side.state for side in sides]
    yield ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    devices = _devices(sides)
    if len(devices) == 1:
        yield devices[0]


def _devices(sides: Sequence[Side]) -> list[str]:
    return sorted({str(side.run.summary["device"]) for side in sides if side.run.summary.get("device")})


def _run(side: Side, several_devices: bool) -> dict[str, Any]:
    """Returns a run's row of the first table, with its device where the runs' devices differ."""
    loss, best, examples = side.run.curve("train/loss"), side.run.number("best_step"), speed(side.run)
    total = "" if side.steps is None else f" / {side.steps:,}"
    cells = [
        None if side.step is None else f"{side.step:,}{total}",
        None if best is None else f"{best:,.0f}",
        f"{loss.values[-1]:.4g}" if len(loss) else None,
        None if examples is None else results.amount(examples),
        None if side.wall_s is None else results.duration(side.wall_s),
    ]
    return {
        "state": side.state,
        "tone": TONES.get(side.state, "warn"),
        "reason": side.reason,
        "cells": ["\u2013" if cell is None else cell for cell in cells],
        "device": str(side.run.summary.get("device") or "") if several_devices else "",
    }


def _table(sides: Sequence[Side], found: Results) -> dict[str, Any]:
    return {
        "title": results.TITLES[found.split],
        "columns": [metric_of(sides, name).shown for name in found.metrics],
        "rows": [(row, _cells(row, found)) for row in found.rows],
        "note": found.note,
    }


def _cells(row: Score, found: Results) -> list[results.Cell]:
    values = [(row.values.get(name), found.best.get(name)) for name in found.metrics]
    return [results.result_cell(value, best) for value, best in values]


def _difference(found: Difference, sides: Sequence[Side]) -> dict[str, Any]:
    """Returns a row with one cell for each run; `same` marks a value that equals the first run's."""
    texts = [yaml_of(found.values[s.label]) if s.label in found.values else None for s in sides]
    cells = [{"text": text, "same": place > 0 and text == texts[0]} for place, text in enumerate(texts)]
    return {"path": Markup("<wbr>.").join(found.path.split(".")), "cells": cells}


def _plots(comparison: Comparison) -> Iterator[Plot]:
    """Yields plots of the training loss and of the metric that the comparison is about."""
    kinds = {yaml_of(side.run.config.get("objective")) for side in comparison.sides if side.run.config}
    caption = "The objectives differ, and so may the scales of their losses." if len(kinds) > 1 else ""
    yield from _overlay(comparison, "train/loss", "Training loss", caption=caption, smooth=True)
    metric = comparison.headline
    if metric is not None:
        yield from _overlay(comparison, f"valid/{metric}", f"Validation {metric_of(comparison.sides, metric).shown}")


def _more(comparison: Comparison) -> Iterator[Plot]:
    """Yields plots of the other validation metrics, and of curves that explain a training that went wrong."""
    names = dict.fromkeys(n for side in comparison.sides for n in results.metrics(side.run, "valid"))
    for name in [name for name in names if name != comparison.headline][:8]:
        yield from _overlay(comparison, f"valid/{name}", f"Validation {metric_of(comparison.sides, name).shown}")
    for name, (title, smooth) in _MORE.items():
        yield from _overlay(comparison, name, title, smooth=smooth)


def _overlay(
    comparison: Comparison, name: str, title: str, *, caption: str = "", smooth: bool = False
) -> Iterator[Plot]:
    """Yields one metric of all runs that logged it; over examples seen where the batch sizes differ."""
    sides = comparison.sides
    sizes = [side.run.setting("batch", "global") for side in sides]
    whole = all(isinstance(size, int) and size > 0 for size in sizes)
    scales = sizes if whole and len(set(sizes)) > 1 else [1] * len(sides)
    drawn = {}
    for place, (side, scale) in enumerate(zip(sides, scales, strict=True)):
        curve = side.run.curve(name)
        if len(curve):
            drawn[place] = Series(curve.steps * scale, curve.values, curve.left_out)
    if not drawn:
        return
    mean = smooth and any(len(points) >= MEAN_FROM for points in drawn.values())
    words = [
        caption,
        "Bold: running mean." if mean and len(drawn) < RAW_BELOW else "Running means." if mean else "",
    ]
    absent = [side.label for place, side in enumerate(sides) if place not in drawn]
    words += [f"Not logged by {', '.join(absent)}." if absent else ""]
    lost = sum(points.left_out for points in drawn.values())
    words += [f"{lost} non-finite value{'s' * (lost > 1)} left out." if lost else ""]
    label = "step" if scales is not sizes else "examples seen"
    alt = f"over the {label}: " + "; ".join(
        f"{sides[place].label} ends at {points.values[-1]:.4g} after {points.steps[-1]:,.0f}, "
        f"lowest {points.values.min():.4g}, highest {points.values.max():.4g}"
        for place, points in drawn.items()
    )

    def draw(axes: Axes) -> None:
        for place, points in drawn.items():
            _curve(axes, points, Line(place), mean, raw=len(drawn) < RAW_BELOW)
        axes.xaxis.set_major_formatter(lambda value, _: figures.compact(value))
        axes.yaxis.set_major_formatter(lambda value, _: figures.compact(value))
        axes.set_xlabel(label)

    yield Plot(title, " ".join(word for word in words if word), figures.picture(draw, title, alt))


def _curve(axes: Axes, points: Series, line: Line, mean: bool, raw: bool) -> None:
    """Draws the values, marked as points where they are few, or their running mean (for all runs or for none)."""
    style: dict[str, Any] = {"color": line.colour, "linestyle": (0, line.dash) if line.dash else "-"}
    thin = figures.thinned(points)
    if not mean:
        few: dict[str, Any] = {"marker": "o", "markersize": 3.2} if len(points) <= 30 else {}
        axes.plot(thin.steps, thin.values, linewidth=1.8, **style, **few)
        return
    if raw:
        axes.plot(thin.steps, thin.values, color=line.colour, linewidth=0.9, alpha=0.25)
    smooth = figures.thinned(Series(points.steps, figures.smoothed(points.values)))
    axes.plot(smooth.steps, smooth.values, linewidth=2.0, **style)
