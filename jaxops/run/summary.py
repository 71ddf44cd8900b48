"""The files that end a run: `summary.json` and the report, also where the run failed."""

import dataclasses
import importlib.metadata
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxops.core.failures import RunFailed, UserError
from jaxops.run.folder.listing import MARKS, existing_folder, is_run
from jaxops.run.folder.run_folder import SUMMARY_VERSION, RunFolder
from jaxops.run.task import Task
from jaxops.run.validation import undefined_metrics

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure

VERSIONS = ("jaxops", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
"""The packages whose versions a summary records."""
MOST_NUMBERS = 6
"""The final numbers that the `repr` of a finished run shows."""


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """The result of `fit`.

    Attributes:
      dir: the run folder, as a path or URL.
      summary: the contents of `summary.json`, with the final numbers.
      state: `finished`, `interrupted` (Ctrl-C, which `fit` raises as KeyboardInterrupt), `preempted` (SIGTERM) or
        `paused` (by an alarm). After all but the first the same call resumes.
    """

    dir: Path | str
    summary: dict[str, Any]
    state: str

    def __repr__(self) -> str:
        numbers = [
            f"{name}: {value:.4g}"
            for name, value in self.summary.items()
            if name.partition("/")[0] in ("valid", "test") and isinstance(value, float)
        ]
        shown = ", ".join([*numbers[:MOST_NUMBERS], *(["..."] if len(numbers) > MOST_NUMBERS else [])])
        return (
            f"FinishedRun({str(self.dir)!r}, {self.state} at step {self.summary.get('step')}; {shown or 'no metrics'})"
        )

    def history(self) -> "pa.Table":
        """Returns what was logged: a row for each step, with columns `step`, `time` and one for each metric.

        A metric is null at the steps at which it was not logged. `run.history().to_pandas()` is a data frame.
        """
        from jaxops.report.history import history

        return history(existing_folder(self.dir))

    def plot(self, *names: str) -> "Figure":
        """Draws metrics over the step, by default the training loss and the metric that the run is judged by.

        Raises:
          UserError: the run has logged no metric of that name.
        """
        from jaxops.report.history import plot  # matplotlib takes a second to import

        return plot(existing_folder(self.dir), names)


def write_summary(folder: RunFolder, state: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Writes `summary.json` and `report.html`; returns the summary, and the report's path or URL."""
    from jaxops.report.page import write_report  # matplotlib takes a second to import

    summary = {
        "version": SUMMARY_VERSION,
        "state": state,
        "finished": time.time(),
        "versions": {name: _installed(name) for name in VERSIONS},
        "command": " ".join(["jaxops", *sys.argv[1:]]) if Path(sys.argv[0]).name == "jaxops" else "jaxops.fit",
        **values,
    }
    folder.write_json("summary.json", summary)
    write_report(folder.path)
    return summary, folder.shown("report.html")


def report_again(run: str | os.PathLike[str]) -> str:
    """Writes `report.html` once more from whatever a run has left in its folder (or URL); the report's path or URL.

    Raises:
      UserError: there is no such folder, or it holds no run.
      RunFailed: the report cannot be written.
    """
    from jaxops.report.page import write_report  # matplotlib takes a second to import

    path = existing_folder(run)
    if not is_run(path):
        raise UserError(f"{run} is not a run: it holds none of {', '.join(MARKS)}")
    write_report(path)
    folder = RunFolder(run)
    folder.send("report.html")
    return folder.shown("report.html")


def about_of(task: Task) -> dict[str, Any]:
    """Returns what reports and comparisons read about a task: names for people, and each metric's better direction."""
    metrics = {name: {"better": metric.better, "label": metric.shown} for name, metric in task.metrics.items()}
    about = dataclasses.asdict(task.about)
    return {"metrics": metrics, **about, "notes": [*about["notes"], *undefined_metrics(task)]}


def write_failure(folder: RunFolder, error: BaseException, values: Mapping[str, Any]) -> None:
    """Writes a summary that says why a run failed.

    A failure to write it is ignored, so that it does not hide the error that ended the run.
    """
    reason = f"{type(error).__name__}: {error}".split("\n")[0]
    if not (folder.path / "config.yaml").is_file():
        return  # nothing began here, or its folder was deleted: a summary alone would be in the way of the next run
    try:
        folder.write_json("summary.json", {"version": SUMMARY_VERSION, "state": "failed", "reason": reason, **values})
    except (OSError, RunFailed):
        return


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
