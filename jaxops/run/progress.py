"""What a run says while it runs: one line a window, compiles with their seconds, and the final table."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

QUIET_SECONDS = 2.0
"""Windows closer together than this share a line."""


class Progress:
    """Plain lines to a console, so that a log file reads like the terminal did; `quiet` says nothing."""

    def __init__(self, quiet: bool = False, console: Console | None = None):
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.quiet = quiet
        self._last = 0.0
        self._began: tuple[str, float] | None = None

    def say(self, text: str) -> None:
        """One line."""
        if not self.quiet:
            self._break()
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A line that is said even where the rest is not."""
        self._break()
        self.console.print(text, markup=False)

    def compiling(self, name: str) -> None:
        """Announces a compile that is about to happen."""
        if not self.quiet:
            self._break()
            self._began = (name, time.perf_counter())
            self.console.print(f"compiling {name} ...", end="", markup=False)

    def compiled(self, name: str) -> None:
        """Says how long the announced compile took, tracing included."""
        if self._began and self._began[0] == name:
            self.console.print(f" {time.perf_counter() - self._began[1]:.1f} s", markup=False)
            self._began = None

    def _break(self) -> None:
        if self._began:
            self.console.print()
            self._began = None

    def step(self, step: int, steps: int, values: Mapping[str, Any]) -> None:
        """A window of training: loss, speed, and the time that is left."""
        now = time.perf_counter()
        if self.quiet or (now - self._last < QUIET_SECONDS and step < steps):
            return
        self._last = now
        left = (steps - step) * values["step_ms"] / 1e3
        self.say(
            f"step {step:>6}/{steps}  loss {values['loss']:.4f}  {values['examples_per_s']:,.0f} examples/s"
            f"  {_clock(left)} left"
        )

    def evaluated(self, step: int, part: str, values: Mapping[str, float], note: str = "") -> None:
        """One evaluation."""
        shown = "  ".join(f"{name} {figure(value)}" for name, value in values.items())
        self.say(f"step {step:>6}  {part}: {shown}{'  ' + note if note else ''}")

    def table(self, summary: Mapping[str, Any], metrics: tuple[str, ...], note: str = "") -> None:
        """Prints the final numbers, model and baselines, on validation and test; `note` says how they were made."""
        if not self.quiet:
            self._break()
            self.console.print(results_table(summary, metrics, note))


def figure(value: float | None) -> str:
    """A metric as people read it; of one that has no value (NaN, or null in JSON), that it is undefined."""
    return "undefined" if value is None or math.isnan(value) else f"{value:.4f}"


def results_table(summary: Mapping[str, Any], metrics: tuple[str, ...], note: str = "") -> Table:
    """Rows: the model and each baseline, of everything and then of each slice; columns: the metrics on validation and
    test.

    More than six of those become the rows, since 80 columns would cut them, and the models the columns.
    """
    table = Table(title=escape(f"{summary.get('name', '')}{': ' if note else ''}{note}"))
    parts = [part for part in ("valid", "test") if any(key.startswith(part + "/") for key in summary)]
    values = [(part, metric) for part in parts for metric in metrics]
    names = sorted({key.split("/")[1] for key in summary if key.startswith("baseline/")}, reverse=True)
    models = [("model", ""), *((name.replace("_", " "), f"baseline/{name}/") for name in names)]
    slices = dict.fromkeys(key.partition("[")[2].removesuffix("]") for key in summary if "[" in key)
    groups = [("", ""), *((name, f"[{name}]") for name in slices)]

    def cells(prefix: str, suffix: str) -> list[str]:
        found = [summary.get(f"{prefix}{part}/{metric}{suffix}") for part, metric in values]
        if suffix:  # most slices of most parts have no examples
            return ["" if value is None or math.isnan(value) else figure(value) for value in found]
        there = [f"{prefix}{part}/{metric}" in summary for part, metric in values]
        return [figure(value) if known else "" for value, known in zip(found, there, strict=True)]

    table.add_column("")
    if len(values) <= 6:
        for part, metric in values:
            table.add_column(f"{part}\n{metric}", justify="right")
        for name, suffix in groups:
            table.add_section()
            for label, prefix in models:
                row = cells(prefix, suffix)
                if not name or any(row):
                    shown = label if not name else name if label == "model" else f"  {label}"
                    table.add_row(escape(shown), *row, style="bold" if label == "model" else None)
        return table
    for label, _ in models:
        table.add_column(label, justify="right", style="bold" if label == "model" else None)
    for _, suffix in groups:
        table.add_section()
        columns = [cells(prefix, suffix) for _, prefix in models]
        for (part, metric), *row in zip(values, *columns, strict=True):
            if suffix and not any(row):
                continue
            table.add_row(escape(f"{part} {metric}{suffix}"), *row)
    return table


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
