"""How a run ends on disk: `summary.json` and the report, also where it failed."""

import dataclasses
import importlib.metadata
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxops.core.failures import RunFailed
from jaxops.run.folder.run_folder import SUMMARY_VERSION, RunFolder
from jaxops.run.task import Task
from jaxops.run.validation import undefined_metrics

VERSIONS = ("jaxops", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
"""Packages whose versions a summary holds."""


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What `fit` returns: the folder, the final numbers, and how it ended.

    `finished`, `interrupted` (Ctrl-C) or `preempted` (SIGTERM); after the last two the same call goes on.
    """

    dir: Path | str
    summary: dict[str, Any]
    state: str


def write_summary(folder: RunFolder, state: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Writes `summary.json` and `report.html`; what was written, and the report's path or URL."""
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


def about_of(task: Task) -> dict[str, Any]:
    """What reports and comparisons read of a task: names for people, and which way each metric is better."""
    metrics = {name: {"better": metric.better, "label": metric.shown} for name, metric in task.metrics.items()}
    about = dataclasses.asdict(task.about)
    return {"metrics": metrics, **about, "notes": [*about["notes"], *undefined_metrics(task)]}


def write_failure(folder: RunFolder, error: BaseException, values: Mapping[str, Any]) -> None:
    """Leaves word of why a run ended. The error itself matters more: if even this cannot be written, nothing is."""
    reason = f"{type(error).__name__}: {error}".split("\n")[0]
    try:
        folder.write_json("summary.json", {"version": SUMMARY_VERSION, "state": "failed", "reason": reason, **values})
    except (OSError, RunFailed):
        return


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
