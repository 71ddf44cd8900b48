"""The console output of a run: a line for each window, a live line in a terminal, compile times, the final table."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

QUIET_SECONDS = 2.0
"""A window that ends sooner than this after the last line prints none."""
FIRST_SECONDS, AGAIN_SECONDS = 8.0, 60.0
"""How long a console that is no terminal stays silent before a line is printed though no window has ended: once, then
between later ones."""
LIVE_SECONDS = 0.25
QUEUED = 3
"""Calls of the step that return before any of them is done (core/flight.py)."""


class Progress:
    """Prints plain lines, so that a log file reads like the terminal did; `quiet` prints warnings alone.

    In a terminal a live line below them shows the step, the loss of the last window, the rate and the time left. A run
    goes on where its terminal is gone (a closed connection).
    """

    def __init__(self, quiet: bool = False, console: Console | None = None):
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.quiet = quiet
        self._last = 0.0
        self._began: tuple[str, float] | None = None
        self._live: Live | None = None
        self._drawn = 0.0
        self._heard: float | None = None
        self._wait = FIRST_SECONDS
        self._loss = ""
        self._start: tuple[int, float] | None = None
        self._queued = 0

    def say(self, text: str) -> None:
        """Prints one line, unless `quiet` is set."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Prints one line, also where `quiet` is set."""
        self._break()
        self._print(text, markup=False)
        self._heard = time.perf_counter()

    def compiling(self, name: str) -> None:
        """Announces a compile that is about to begin."""
        if not self.quiet:
            self.rest()
            self._break()
            self._began = (name, time.perf_counter())
            self._print(f"compiling {name} ...", end="", markup=False)

    def compiled(self, name: str) -> None:
        """Prints how long the announced compile took, including tracing."""
        if self._began and self._began[0] == name:
            self._print(f" {time.perf_counter() - self._began[1]:.1f} s", markup=False)
            self._began = None

    def _break(self) -> None:
        if self._began:
            self._print()
            self._began = None

    def _print(self, *what: Any, **options: Any) -> None:
        with contextlib.suppress(OSError, SystemExit):  # rich ends the program where nobody reads it any more
            self.console.print(*what, **options)

    def at(self, step: int, steps: int) -> None:
        """Shows that training has come to `step`: in the live line, or elsewhere in a line after a long silence.

        The rate counts calls of the step, from the call on at which as many steps are in flight as may be: those before
        it return at once. Until then no rate is shown.
        """
        if self.quiet or self._began:
            return
        now = time.perf_counter()
        self._heard = now if self._heard is None else self._heard
        if self._start is None or step <= self._start[0]:
            self._start, self._queued = (step, now), QUEUED
        elif self._queued:
            self._start, self._queued = (step, now), self._queued - 1
        first, since = self._start
        each = (now - since) / (step - first) if step > first else None
        if self.console.is_terminal:
            if now - self._drawn > LIVE_SECONDS:
                self._drawn = now
                self._draw(self._line(step, steps, each))
        elif now - (self._heard or now) > self._wait:
            self._wait = AGAIN_SECONDS
            self.say(self._line(step, steps, each))

    def _line(self, step: int, steps: int, each: float | None) -> str:
        if each is None:
            return f"step {step:>6}/{steps}{self._loss}"
        rate = f"{1 / each:.1f} steps/s" if each < 1 else f"{each:.1f} s a step"
        return f"step {step:>6}/{steps}{self._loss}  {rate}  {_clock((steps - step) * each)} left"

    def _draw(self, text: str) -> None:
        with contextlib.suppress(OSError, SystemExit):
            if self._live is None:
                self._live = Live(console=self.console, transient=True, auto_refresh=False)
                self._live.start()
            self._live.update(Text(text, style="dim"), refresh=True)

    def rest(self) -> None:
        """Removes the live line, because training pauses or is over."""
        self._start = None
        if self._live is not None:
            with contextlib.suppress(OSError, SystemExit):
                self._live.stop()
            self._live = None

    def step(self, step: int, steps: int, values: Mapping[str, Any]) -> None:
        """Prints the loss and speed of a window of training, and the time that is left."""
        now = time.perf_counter()
        if self.quiet:
            return
        self._loss = f"  loss {values['loss']:.4f}"
        if now - self._last < QUIET_SECONDS and step < steps:
            return
        self._last = now
        left = (steps - step) * values["step_ms"] / 1e3
        self.say(
            f"step {step:>6}/{steps}  loss {values['loss']:.4f}  {values['examples_per_s']:,.0f} examples/s"
            f"  {_clock(left)} left"
        )

    def evaluated(self, step: int, part: str, values: Mapping[str, float], note: str = "") -> None:
        """Prints the metrics of one evaluation.

        Args:
          step: the step that was evaluated.
          part: `valid` or `test`.
          values: metrics by name.
          note: some words to append.
        """
        shown = "  ".join(f"{name} {figure(value)}" for name, value in values.items())
        self.say(f"step {step:>6}  {part}: {shown}{'  ' + note if note else ''}")

    def table(self, summary: Mapping[str, Any], metrics: tuple[str, ...], note: str = "") -> None:
        """Prints the final table of model and baselines on validation and test; `note` says how it was made."""
        if not self.quiet:
            self.rest()
            self._break()
            self._print(results_table(summary, metrics, note))


@contextlib.contextmanager
def said_if_long(text: str, seconds: float = 3.0, quiet: bool = False) -> Iterator[None]:
    """Prints `text` if the `with` block takes longer than `seconds`, so that the user knows what is going on."""
    timer = threading.Timer(seconds, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def figure(value: float | None) -> str:
    """Returns a metric with four decimals, or `undefined` where it has no value (NaN, or null in JSON)."""
    return "undefined" if value is None or math.isnan(value) else f"{value:.4f}"


def results_table(summary: Mapping[str, Any], metrics: tuple[str, ...], note: str = "") -> Table:
    """Builds the final table. Rows are the model and the baselines, on all data and then on each slice.

    Columns are the metrics on validation and test. More than six of them would not fit into 80 characters, so that
    they become the rows, and the models become the columns.
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
