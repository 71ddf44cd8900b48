"""The metrics of a run as a table, and as a picture for a notebook. Tested in tests/report/test_history.py."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from matplotlib.figure import Figure

from jaxops.core.failures import UserError, nearest
from jaxops.core.metrics_file import RESERVED, read_metrics
from jaxops.report import results
from jaxops.report.folder import read_run

_SHOWN = 6
"""The names that a message lists."""


class Picture(Figure):
    """A matplotlib figure that a notebook shows by itself, whatever matplotlib's backend is."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=110)
        return file.getvalue()


def history(run_dir: str | os.PathLike[str]) -> pa.Table:
    """Reads the metrics of a run folder into a table with one row for each step at which something was logged.

    Returns:
      Columns `step` (int64), `time` (UTC, of the last line of the step) and one float64 column for each metric, in the
      order in which they appeared. A metric is null at steps at which it was not logged, and where it was not finite.
    """
    rows: dict[int, dict[str, float]] = {}
    names: dict[str, None] = {}
    for line in read_metrics(Path(run_dir) / "metrics.jsonl"):
        if "event" in line:
            continue
        row = rows.setdefault(int(line["step"]), {})
        row["time"] = float(line.get("time", math.nan))
        values = {name: float(value) for name, value in line.items() if name not in RESERVED}
        row.update(values)
        names |= dict.fromkeys(values)
    steps = sorted(rows)
    microseconds = [_microseconds(rows[step]["time"]) for step in steps]
    columns: dict[str, Any] = {
        "step": pa.array(steps, pa.int64()),
        "time": pa.array(microseconds, pa.timestamp("us", "UTC")),
    }
    for name in names:
        columns[name] = pa.array([_finite(rows[step].get(name)) for step in steps], pa.float64())
    return pa.table(columns)


def plot(run_dir: str | os.PathLike[str], names: Sequence[str] = ()) -> Picture:
    """Draws metrics of a run folder over the step, one below the other.

    Args:
      run_dir: the run folder.
      names: metrics as `history` names them; by default the training loss and the metric that the run is judged by.

    Raises:
      UserError: the run has logged no metric of that name, or nothing yet.
    """
    table, run = history(run_dir), read_run(run_dir)
    known = table.column_names[2:]
    chosen = list(names) or [one for one in ("train/loss", f"valid/{results.headline(run)}") if one in known]
    for name in chosen:
        if name not in known:
            listed = ", ".join(known[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "")
            raise UserError(f"{run_dir}: no metric {name!r} was logged{nearest(name, known)} (logged: {listed})")
    if not chosen:
        raise UserError(f"{run_dir}: neither a training loss nor the run's metric has been logged yet")
    figure = Picture(figsize=(6.4, 2.4 * len(chosen)), layout="constrained")
    for number, name in enumerate(chosen, start=1):
        axes = figure.add_subplot(len(chosen), 1, number)
        # A line through the logged points only: between them lie steps at which other metrics were logged.
        at, values = _logged(table, name)
        axes.plot(at, values, marker="o" if len(at) < 40 else "", markersize=3)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    figure.axes[-1].set_xlabel("step")
    figure.axes[0].set_title(run.name)
    return figure


def _logged(table: pa.Table, name: str) -> tuple[list[int], list[float]]:
    pairs = zip(table["step"].to_pylist(), table[name].to_pylist(), strict=True)
    found = [(step, value) for step, value in pairs if value is not None]
    return [step for step, _ in found], [value for _, value in found]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _microseconds(seconds: float) -> int | None:
    return round(seconds * 1e6) if math.isfinite(seconds) and abs(seconds) < 1e11 else None
