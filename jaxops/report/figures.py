"""Plots as inline SVG whose colours are CSS variables, so that one picture suits a light and a dark page.

A plot is drawn as wide as a phone (and as half a desktop page), with real text: nothing shrinks below reading size.
"""

import dataclasses
import hashlib
import io
import itertools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxops.report.folder import Series

WIDTH, HEIGHT = 4.6, 2.6
"""Inches of 72 units; the page scales the picture to the column."""
MAX_POINTS = 500

INK, GRID = "#a10001", "#a10002"
LINES = ("#a10011", "#a10012", "#a10013", "#a10014")
_VARIABLES = {INK: "muted", GRID: "line"} | {colour: f"series-{i}" for i, colour in enumerate(LINES, 1)}
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.labelcolor": INK,
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture with its words; the SVG's label describes it to someone who cannot see it."""

    title: str
    caption: str
    svg: Markup


@dataclasses.dataclass(frozen=True)
class Mark:
    """A highlighted point of a curve, with its text."""

    step: float
    value: float
    text: str


def curves(
    series: Mapping[str, Series],
    *,
    title: str,
    caption: str = "",
    smooth: bool = False,
    levels: Mapping[str, float] | None = None,
    mark: Mark | None = None,
    resumed: Sequence[int] = (),
    from_zero: bool = False,
) -> Plot:
    """Draws curves over the steps, told apart by colour and dash.

    Args:
      series: the curves, by name; empty ones are left out.
      title: title of the plot.
      caption: sentence below the title.
      smooth: True draws the running mean of noisy curves boldly over the raw values.
      levels: dashed reference lines (baselines), by name.
      mark: a point to highlight.
      resumed: steps at which the run was resumed, each a thin line.
      from_zero: True starts the vertical axis at zero.
    """
    series = {name: points for name, points in series.items() if len(points)}

    def draw(axes: Axes) -> None:
        for step in resumed:
            axes.axvline(step, color=GRID, linewidth=1.2, linestyle=(0, (2, 2)))
        for number, (name, points) in enumerate(series.items()):
            colour, dash = LINES[number % len(LINES)], _DASHES[number % len(_DASHES)]
            _curve(axes, points, colour, dash, smooth, name)
        for number, (name, value) in enumerate((levels or {}).items(), start=len(series)):
            colour, dash = LINES[number % len(LINES)], _DASHES[number % len(_DASHES)]
            axes.axhline(value, color=colour, linestyle=dash, linewidth=1.5, label=name)
        if mark is not None:
            axes.plot([mark.step], [mark.value], "o", color=LINES[0], markersize=7)
            _annotate(axes, mark)
        if from_zero:
            axes.set_ylim(bottom=0.0)
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
        axes.yaxis.set_major_formatter(lambda value, _: compact(value))
        axes.set_xlabel("step")
        if len(series) + len(levels or {}) > 1:
            legend(axes)

    alt = "; ".join(_in_words(name, points) for name, points in series.items())
    alt += "".join(f"; {name} {value:.4g}" for name, value in (levels or {}).items())
    return Plot(title, caption, picture(draw, title, alt))


def path(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], steps: Float[np.ndarray, " n"], *, labels: Sequence[str]
) -> Plot:
    """Draws one metric against another, a point for each evaluation, joined in the order of the steps.

    Args:
      x: values of the metric that runs across.
      y: values of the metric that goes up.
      steps: the step of each evaluation, in rising order.
      labels: names of both metrics.
    """

    def draw(axes: Axes) -> None:
        axes.plot(x, y, "-o", color=LINES[0], linewidth=1.4, markersize=3.8)
        for at, filled in ((0, "none"), (-1, LINES[0])):
            axes.plot(x[at], y[at], "o", color=LINES[0], markerfacecolor=filled, markersize=8)
            axes.annotate(
                f"step {compact(steps[at])}",
                (x[at], y[at]),
                xytext=(-8 if x[at] > (x.min() + x.max()) / 2 else 8, 7),
                textcoords="offset points",
                ha="right" if x[at] > (x.min() + x.max()) / 2 else "left",
                color=LINES[0],
            )
        axes.margins(y=0.18)
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
        axes.yaxis.set_major_formatter(lambda value, _: compact(value))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])

    points = (f"{b:.4g} at {a:.4g} (step {step:.0f})" for a, b, step in zip(x, y, steps, strict=True))
    title = f"{labels[1]} against {labels[0]}"
    return Plot(title, "A point for each evaluation.", picture(draw, title, "; ".join(points)))


def histogram(
    edges: Float[np.ndarray, " bins_plus_1"], counts: Float[np.ndarray, " bins"], *, title: str, label: str
) -> Plot:
    """Draws bars of equal width, one for each bin of whole numbers [edge, next edge), however wide the bin.

    Args:
      edges: whole numbers where bins begin, and where the last one ends.
      counts: number of values in each bin.
      title: title of the plot.
      label: label of the horizontal axis.
    """

    def draw(axes: Axes) -> None:
        place = np.arange(len(counts))
        axes.bar(place, counts, width=0.86, color=LINES[0])
        every = -(-len(counts) // 5)
        axes.set_xticks(place[::every], [_bin(edges, i) for i in place[::every]])
        axes.yaxis.set_major_formatter(lambda value, _: compact(value))
        axes.set_xlabel(label)

    peak = int(np.argmax(counts))
    alt = f"{label} from {compact(edges[0])} to {compact(edges[-1])}; "
    alt += f"the fullest bin is {_bin(edges, peak)} with {compact(counts[peak])}"
    return Plot(title, "", picture(draw, title, alt))


def reliability_figure(values: Float[np.ndarray, "3 bins"], *, title: str = "Predicted against observed rate") -> Plot:
    """Draws the observed rate over the predicted rate, by bin, with each bin's share of the examples as bars.

    `values` are those of `reliability` in `evaluate/clicks.py`: predicted rate, observed rate and share, in equal steps
    of the predicted probability from 0 to 1; rates are NaN where a bin is empty. The axes end where the examples do.

    Raises:
      ValueError: no bin has examples.
    """
    predicted, observed, share = values
    full = np.flatnonzero(np.isfinite(values).all(axis=0) & (share > 0))
    if not len(full):
        raise ValueError("a reliability plot of no examples")
    bins = len(share)
    end = (full[-1] + 1) / bins
    top = min(1.0, 1.08 * max(end, float(observed[full].max())))
    distance = float(np.average(np.abs(predicted[full] - observed[full]), weights=share[full]))

    def draw(axes: Axes) -> None:
        bars = axes.twinx()
        bars.bar((full + 0.5) / bins, share[full], width=0.86 / bins, color=LINES[0], alpha=0.22)
        most = float(share[full].max())
        bars.set_ylim(0.0, 3.0 * most)  # The bars stay in the lower third, because the points matter more.
        bars.set_yticks([0.0, most], ["0", f"{most:.0%}" if most >= 0.1 else f"{most:.1%}"])
        bars.set_ylabel("share of examples", loc="bottom")
        bars.grid(False)
        axes.set_zorder(bars.get_zorder() + 1)
        axes.plot([0.0, top], [0.0, top], color=INK, linestyle=_DASHES[1], linewidth=1.2, label="as predicted")
        style: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linewidth": 1.6, "clip_on": False}
        axes.plot(predicted[full], observed[full], color=LINES[0], label="observed", **style)
        axes.set_xlim(0.0, end)
        axes.set_ylim(0.0, top)
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
        axes.yaxis.set_major_formatter(lambda value, _: compact(value))
        axes.set_xlabel("predicted rate")
        axes.set_ylabel("observed rate")
        legend(axes)

    points = (f"{predicted[i]:.3g} predicted, {observed[i]:.3g} observed, {share[i]:.1%} of the examples" for i in full)
    return Plot(title, f"Mean distance from the line: {distance:.4f}", picture(draw, title, "; ".join(points)))


def noisy(points: Series) -> bool:
    """Returns True where a curve goes up and down so much that its mean says more; a rate schedule does not."""
    path = np.abs(np.diff(points.values)).sum()
    return len(points) >= 12 and bool(path > 4 * np.ptp(points.values))


def smoothed(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Returns a mean whose weights halve every n / 60 points to both sides, so that it does not lag behind."""
    decay = 0.5 ** (1.0 / max(1.0, len(values) / 60))
    both_sides = lambda x: _decayed_sum(x, decay) + _decayed_sum(x[::-1], decay)[::-1] - x
    return both_sides(values) / both_sides(np.ones(len(values)))


def _decayed_sum(values: Float[np.ndarray, " n"], decay: float) -> Float[np.ndarray, " n"]:
    return np.array(list(itertools.accumulate(values, lambda total, value: decay * total + value)))


def thinned(points: Series) -> Series:
    """Reduces a series to at most `MAX_POINTS` points, each the mean of a run of neighbours; the last is kept."""
    n = len(points)
    if n <= MAX_POINTS:
        return points
    starts = np.unique(np.linspace(0, n - 1, MAX_POINTS).astype(int))
    sizes = np.diff(np.append(starts, n))
    steps, values = (np.add.reduceat(column, starts) / sizes for column in (points.steps, points.values))
    return Series(steps, values)


def compact(value: float) -> str:
    """Writes a number briefly: `12.5k` for 12500, `0.05` for 0.05."""
    for least, unit, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"


def _bin(edges: Float[np.ndarray, " bins_plus_1"], i: int) -> str:
    """Names a bin: `8-15` for the whole numbers from 8 up to but not including 16."""
    first, last = edges[i], edges[i + 1] - 1
    return compact(first) if last <= first else f"{compact(first)}\u2013{compact(last)}"


def _curve(axes: Axes, points: Series, colour: str, dash: Any, smooth: bool, name: str) -> None:
    """Draws a curve, with its points marked where they are few."""
    few: dict[str, Any] = {"marker": "o", "markersize": 3.2} if len(points) <= 30 else {}
    raw = thinned(points)
    if not smooth or not noisy(points):
        axes.plot(raw.steps, raw.values, color=colour, linestyle=dash, linewidth=1.8, label=name, **few)
        return
    axes.plot(raw.steps, raw.values, color=colour, linewidth=1.0, alpha=0.32)
    mean = thinned(Series(points.steps, smoothed(points.values)))
    axes.plot(mean.steps, mean.values, color=colour, linestyle=dash, linewidth=2.0, label=name)


def legend(axes: Axes) -> None:
    """Puts the legend above the plot, in as many columns as the names leave room for."""
    lines, names = axes.get_legend_handles_labels()
    names = [name if len(name) <= 36 else name[:35] + "\u2026" for name in names]
    columns = max(1, min(3, 40 // max(len(name) for name in names)))
    axes.legend(lines, names, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, handlelength=2.2)


def _annotate(axes: Axes, mark: Mark) -> None:
    """Writes the text of a mark on the side of it where there is room."""
    low, high = axes.get_xlim()
    right = mark.step > (low + high) / 2
    axes.margins(y=0.18)
    axes.annotate(
        mark.text,
        (mark.step, mark.value),
        xytext=(-8 if right else 8, 7),
        textcoords="offset points",
        ha="right" if right else "left",
        fontweight="bold",
        color=LINES[0],
    )


def _in_words(name: str, points: Series) -> str:
    first, last = points.values[0], points.values[-1]
    return (
        f"{name} goes from {first:.4g} at step {points.steps[0]:.0f} "
        f"to {last:.4g} at step {points.steps[-1]:.0f}, "
        f"lowest {points.values.min():.4g}, highest {points.values.max():.4g}"
    )


def picture(draw: Callable[[Axes], None], title: str, alt: str) -> Markup:
    """Draws a plot and makes its SVG fit for a page: no prologue, no unused ids, colours as variables."""
    scope = "f" + hashlib.sha256(f"{title}{alt}".encode()).hexdigest()[:10]
    file = io.StringIO()
    with rc_context(_STYLE | {"svg.hashsalt": scope}), warnings.catch_warnings():
        # The reader's browser has letters that matplotlib's font lacks; only their width is guessed here.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _cleaned(file.getvalue(), scope, f"{title}: {alt}")


def _cleaned(svg: str, scope: str, alt: str) -> Markup:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
    svg = re.sub(r"font-family: [^;\"]*;? ?| transform=\"rotate\(-0[^\"]*\"", "", svg)
    used = set(re.findall(r"(?:url\(|href=\")#([^\")]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{scope}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r"(url\(|href=\")#", rf"\g<1>#{scope}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    head = Markup('<svg {} role="img" aria-label="{}">').format(Markup(view[0]), alt)
    return head + Markup(re.sub(r"\s+", " ", svg[svg.index(">") + 1 :]))
