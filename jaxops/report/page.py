"""Writes `report.html`: one page about a run, fit to send to a colleague, in one file that loads nothing."""

import dataclasses
import datetime as dt
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from jaxops.report import figures, results
from jaxops.report.attempts import attempt_rows
from jaxops.report.figures import Mark, Plot
from jaxops.report.folder import EVALUATED, RunRecord, Series, read_run, utc_time
from jaxops.report.html import fill_template, write_page
from jaxops.report.pictures import reliability_bins
from jaxops.report.samples import sample_table

MAX_EVENTS = 200
MAX_SMALL_PLOTS = 24
_MAIN = ("train/loss", "train/examples_per_s")


@dataclasses.dataclass(frozen=True)
class StateBadge:
    """A run's state, as a word and a tone (good, bad, warn, busy)."""

    text: str
    tone: str


_TONES = {
    "finished": "good",
    "stopped": "good",
    "failed": "bad",
    "interrupted": "warn",
    "preempted": "warn",
    "paused": "warn",
    "in progress": "busy",
}


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Writes `report.html` into a run folder, finished or not, and returns its path.

    It reads `config.yaml`, `metrics.jsonl`, `data.json`, `attempts.json` and `summary.json`; any may be missing or cut
    off. Besides the results it shows of the summary: name, state, reason, device, step, steps, best_step (the step of
    the parameters that were evaluated), wall_s, finished (Unix or ISO), command, versions (by package), seed. Lists
    named `valid/reliability` or `test/reliability` (evaluate/clicks.py) are drawn.

    Raises:
      UserError: there is no such folder.
      RunFailed: the page cannot be written.
    """
    run = read_run(run_dir)
    return write_page(run.path / "report.html", render_report(run))


def render_report(run: RunRecord) -> str:
    """Renders the page as HTML."""
    shown = run.events[-MAX_EVENTS:]
    return fill_template(
        "report.html",
        name=run.name,
        state=StateBadge(run.state, _TONES.get(run.state, "warn")),
        facts=list(_facts(run)),
        reason=run.reason,
        problems=run.problems,
        cards=results.cards(run),
        tables=results.tables(run),
        kept=run.number("best_step"),
        notes=_notes(run),
        samples=sample_table(run),
        plots=[*_main_plots(run), *_paths(run)],
        small_plots=list(_small_plots(run)),
        reliability_plots=list(_reliability_plots(run)),
        data_rows=_data_rows(run),
        data_plot=_lengths(run),
        events=[(event.step, _time(event.time), event.kind, event.text) for event in shown],
        events_hidden=len(run.events) - len(shown),
        config=_highlighted(run.config_text),
        reproduce=list(_reproduce(run)),
    )


def _notes(run: RunRecord) -> list[str]:
    """Returns the family's sentences on how the run's figures were made."""
    found = run.about.get("notes")
    return [str(note) for note in found] if isinstance(found, list) else []


def _facts(run: RunRecord) -> Iterator[str]:
    """Yields the facts on the line under the name: device, date, model and objective."""
    finished = utc_time(run.summary.get("finished")) or run.last_time
    if run.summary.get("device"):
        yield str(run.summary["device"])
    if finished is not None:
        yield _time(finished)
    kinds = [run.setting(part, "kind") for part in ("model", "objective")]
    yield from (results.display(run, str(kind)) for kind in kinds if kind)


def _time(time: dt.datetime | None) -> str:
    return "" if time is None else f"{time.day} {time:%b %Y, %H:%M} UTC"


def _main_plots(run: RunRecord) -> Iterator[Plot]:
    resumed = [event.step for event in run.events if event.kind == "resumed"]
    loss = run.curve("train/loss")
    if len(loss):
        caption = "Bold: running mean." if figures.noisy(loss) else ""
        if loss.left_out:
            caption += f" {loss.left_out} non-finite value{'s' * (loss.left_out > 1)} left out."
        if resumed:
            caption += " Dotted: resumed."
        yield figures.curves(
            {"training loss": loss},
            title="Training loss",
            caption=caption.strip(),
            smooth=True,
            resumed=resumed,
        )
    metric = results.headline(run)
    curves = {name: run.curve(f"valid/{name}") for name in results.metrics(run, "valid")}
    present = {name: curve for name, curve in curves.items() if len(curve)}
    if metric in present:
        yield _headline_plot(run, metric, present.pop(metric))
    others = {results.metric_label(run, name): curve for name, curve in list(present.items())[:4]}
    if others:
        yield figures.curves(others, title="Other validation metrics")
    speed = run.curve("train/examples_per_s")
    if len(speed):
        median = float(np.median(speed.values))
        yield figures.curves(
            {"examples a second": speed},
            title="Throughput",
            levels={f"median {results.amount(median)}": median},
            from_zero=True,
        )


def _headline_plot(run: RunRecord, metric: str, curve: Series) -> Plot:
    label = results.metric_label(run, metric)
    best = results.best_step(run, metric)
    levels = {}
    for name in results.baseline_names(run):
        value = run.number(f"baseline/{name}/valid/{metric}")
        if value is not None:
            levels[results.display(run, name)] = value
    return figures.curves(
        {results.model_name(run): curve},
        title=f"Validation {label}",
        caption=f"Best: {results.score(best[1])} at step {best[0]:,.0f}." if best else "",
        levels=levels,
        mark=Mark(*best, text=f"best {results.score(best[1])}") if best else None,
    )


def _paths(run: RunRecord) -> Iterator[Plot]:
    """Yields a plot of one metric against another over the evaluations, for each pair that the run's family names."""
    wanted = run.about.get("curves")
    for pair in wanted if isinstance(wanted, list) else ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            continue
        across, up = (run.curve(f"valid/{name}") for name in pair)
        shared = np.intersect1d(across.steps, up.steps)
        if len(shared) < 2:
            continue
        x, y = (series.values[np.isin(series.steps, shared)] for series in (across, up))
        yield figures.path(x, y, shared, labels=[results.metric_label(run, name) for name in pair])


def _small_plots(run: RunRecord) -> Iterator[Plot]:
    """Yields a plot of every other curve that has two or more points."""
    shown = {*_MAIN, *(f"valid/{name}" for name in results.metrics(run, "valid"))}
    rest = [(name, curve) for name, curve in run.series.items() if name not in shown and len(curve) > 1]
    for name, curve in rest[:MAX_SMALL_PLOTS]:
        yield figures.curves({name: curve}, title=name, smooth=True)


def _reliability_plots(run: RunRecord) -> Iterator[Plot]:
    """Plots `test/reliability` and `valid/reliability`, and `test/NAME/reliability` in a task of several labels."""
    for split in EVALUATED:
        for key, value in run.summary.items():
            if not key.startswith(f"{split}/") or not key.endswith("/reliability"):
                continue
            if (values := reliability_bins(value)) is None:
                continue
            label = key.removeprefix(f"{split}/").removesuffix("reliability").strip("/")
            title = results.TITLES[split] + (f", {label}" if label else "")
            yield figures.reliability_figure(values, title=title)


def _data_rows(run: RunRecord) -> list[tuple[str, str]]:
    """Returns the rows that the run's family recorded about its data, or the bare values where it recorded none."""
    rows = run.about.get("data")
    if isinstance(rows, list) and rows and all(isinstance(row, list) and len(row) == 2 for row in rows):
        return [(str(what), str(value)) for what, value in rows]
    return [(path, text) for path, text in _flat(run.data) if path != "version"]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path} {key}".strip())
    elif isinstance(value, list):
        yield path, ", ".join(str(inner) for inner in value[:12]) + (", ..." if len(value) > 12 else "")
    else:
        yield path, f"{value:,}" if isinstance(value, int) else str(value)


def _lengths(run: RunRecord) -> Plot | None:
    """Plots the histogram that the run's family recorded, if there is one."""
    found = run.about.get("histogram") or _older_histogram(run.data)
    try:
        edges, counts = (np.array(found[key], np.float64) for key in ("edges", "counts"))
        title, label = str(found["title"]), str(found["label"])
    except (TypeError, KeyError, ValueError):
        return None
    if counts.ndim != 1 or len(counts) < 1 or edges.shape != (len(counts) + 1,):
        return None
    full = np.flatnonzero(counts)
    if not len(full):
        return None
    first, last = full[0], full[-1] + 1
    edges, counts = edges[first : last + 1], counts[first:last]
    return figures.histogram(edges, counts, title=title, label=label)


def _older_histogram(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the lengths in `data.json`, for run folders without `about.json`."""
    lengths = data.get("lengths")
    found = lengths.get("histogram") if isinstance(lengths, Mapping) else None
    return {"title": "Lengths", "label": "length", **found} if isinstance(found, Mapping) else {}


def _highlighted(text: str) -> Markup:
    """Marks the keys and comments of the config."""
    lines = []
    for line in text.rstrip().split("\n") if text.strip() else []:
        key = re.match(r"^(\s*(?:- )?)([^\s#:][^:#]*)(:)(?=\s|$)(.*)$", line)
        if line.lstrip().startswith("#"):
            lines.append(Markup('<span class="comment">{}</span>').format(line))
        elif key:
            lines.append(Markup('{}<span class="key">{}</span>{}{}').format(*key.groups()))
        else:
            lines.append(escape(line))
    return Markup("\n").join(lines)


def _reproduce(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Yields (name, value) rows; the page shows commands and hashes as code."""
    command = run.summary.get("command")
    if isinstance(command, list):
        command = shlex.join(str(word) for word in command)
    if command:
        yield "Command", str(command)
    if run.config_text:
        yield "The same again", f"jaxops train {shlex.quote(str(run.path / 'config.yaml'))} run.name=again"
    seed = run.summary.get("seed", run.setting("run", "seed"))
    if seed is not None:
        yield "Seed", str(seed)
    versions = run.summary.get("versions")
    if isinstance(versions, dict):
        yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    if run.summary.get("device"):
        yield "Device", str(run.summary["device"])
    yield from attempt_rows(run.attempts)
    split = run.data.get("split")
    if isinstance(split, dict) and split.get("sha256"):
        yield "Split SHA-256", str(split["sha256"])
    # A run in an object store is written to a local folder first; the reader needs its place in the store.
    home = str(run.setting("run", "dir"))
    yield "Folder", f"{home.rstrip('/')}/{run.name}" if "://" in home else str(run.path)
