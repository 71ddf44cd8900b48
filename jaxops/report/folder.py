"""Reads a run folder for people: a file may be missing, partial or odd, and the rest is still shown."""

import dataclasses
import datetime as dt
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxops.config.node import plain_node
from jaxops.config.yaml_text import parse_yaml
from jaxops.core.failures import UserError
from jaxops.core.metric import Better, Metric, label_of
from jaxops.core.metrics_file import read_metrics
from jaxops.core.small_files import read_bytes

_HUGE = 1e39
_LOWER_IN_OLDER_FOLDERS = re.compile(r"loss|nll|perplexity|rmse|mae|error|\bne\b|\bkl\b|\bece\b")
_NOT_METRICS = frozenset({"v", "step", "time", "event", "text"})
EVALUATED = ("test", "valid")
"""Splits that results are reported on, the more informative one first."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One metric over the run, in order of step, finite values only; `left_out` counts the others."""

    steps: Float[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.steps)


@dataclasses.dataclass(frozen=True)
class Event:
    """An event at one step: resumed, skipped and so on."""

    step: int
    time: dt.datetime | None
    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The contents of a run folder so far; `problems` names the files that could not be read."""

    path: Path
    summary: dict[str, Any]
    data: dict[str, Any]
    about: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    series: dict[str, Series]
    events: list[Event]
    samples: list[dict[str, Any]]
    step: int | None
    first_time: dt.datetime | None
    last_time: dt.datetime | None
    problems: list[str]
    attempts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.summary.get("name") or self.setting("run", "name") or self.path.resolve().name)

    @property
    def state(self) -> str:
        """The state in the summary; where that is missing or older than the metrics, the run goes on."""
        if "state" in self.summary and not self._goes_on:
            return str(self.summary["state"])
        return "in progress" if self.step is not None else "nothing logged yet"

    @property
    def reason(self) -> str:
        """The reason why the run ended, where the summary gives one."""
        return "" if self._goes_on else str(self.summary.get("reason") or "")

    @property
    def _goes_on(self) -> bool:
        """True where steps were logged after the summary was written."""
        ended = self.number("step")
        return ended is not None and self.step is not None and self.step > ended

    def setting(self, *path: str) -> Any:
        """Returns a value of the resolved config, or None."""
        node: Any = self.config
        for key in path:
            node = node.get(key) if isinstance(node, Mapping) else None
        return node

    def curve(self, name: str) -> Series:
        """Returns a metric's series, empty where it was never logged."""
        return self.series.get(name, Series(np.zeros(0), np.zeros(0)))

    def metric(self, name: str) -> Metric:
        """Returns a metric as the run's family describes it; in folders of older versions its name decides."""
        known = self.about.get("metrics")
        found = known.get(name.partition("[")[0]) if isinstance(known, Mapping) else None
        if isinstance(found, Mapping) and found.get("better") in ("higher", "lower", "neither"):
            return Metric(name, found["better"], str(found.get("label") or ""))
        return Metric(name, _better_by_name(name))

    def describes(self, name: str) -> bool:
        """Returns True where the run's family recorded which way the metric is better."""
        known = self.about.get("metrics")
        return isinstance(known, Mapping) and name.partition("[")[0] in known

    def label(self, name: str) -> str:
        """Returns the name of a model or baseline for people."""
        known = self.about.get("labels")
        return str(known[name]) if isinstance(known, Mapping) and name in known else label_of(name)

    def number(self, *names: str) -> float | None:
        """Returns the first of these entries that the summary holds as a finite number."""
        return next((v for name in names if (v := finite(self.summary.get(name))) is not None), None)


def read_run(run_dir: str | os.PathLike[str]) -> RunRecord:
    """Reads a run folder.

    Raises:
      UserError: there is no such folder.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError(f"no run folder at {path}")
    problems: list[str] = []
    config_text = _text(path / "config.yaml", problems)
    lines = _metrics(path / "metrics.jsonl", problems)
    times = [time for line in lines if (time := utc_time(line.get("time"))) is not None]
    return RunRecord(
        path=path,
        summary=_json(path / "summary.json", problems),
        data=_json(path / "data.json", problems),
        about=_json(path / "about.json", problems),
        config=_config(config_text, problems),
        config_text=config_text,
        series=_series(lines),
        events=[_event(line) for line in lines if "event" in line],
        samples=[line for line in _metrics(path / "samples.jsonl", problems) if "event" not in line],
        step=max((line["step"] for line in lines), default=None),
        first_time=min(times, default=None),
        last_time=max(times, default=None),
        problems=problems,
        attempts=_json(path / "attempts.json", problems),
    )


def _better_by_name(name: str) -> Better:
    """Returns which way a metric is better, for run folders of versions that did not record it."""
    if name.startswith("calibration"):
        return "neither"
    return "lower" if _LOWER_IN_OLDER_FOLDERS.search(name) else "higher"


def finite(value: Any) -> float | None:
    """Returns the value as a float if it is a number that float32 could hold, else None."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and -_HUGE < value < _HUGE else None


def utc_time(value: Any) -> dt.datetime | None:
    """Returns Unix seconds or ISO text as a UTC time, None for anything else."""
    try:
        if isinstance(value, str):
            found = dt.datetime.fromisoformat(value)
            return found.replace(tzinfo=found.tzinfo or dt.UTC).astimezone(dt.UTC)
        number = finite(value)
        return None if number is None else dt.datetime.fromtimestamp(number, dt.UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _text(path: Path, problems: list[str]) -> str:
    try:
        return read_bytes(path).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{path.name} could not be read: {error.strerror}")
        return ""


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    text = _text(path, problems)
    if not text:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name} is not JSON: {error}")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name} is not a JSON object")
        return {}
    return found


def _config(text: str, problems: list[str]) -> dict[str, Any]:
    try:
        found = plain_node(parse_yaml(text, "config.yaml"))
    except (UserError, ValueError, RecursionError) as error:
        problems.append(f"config.yaml is not YAML: {' '.join(str(error).split())}")
        return {}
    return found if isinstance(found, dict) else {}


def _metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        return [line for line in read_metrics(path) if finite(line["step"]) is not None]
    except UserError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{path.name} could not be read: {error.strerror}")
    return []


def _event(line: Mapping[str, Any]) -> Event:
    return Event(line["step"], utc_time(line.get("time")), str(line["event"]), str(line.get("text", "")))


def _series(lines: list[dict[str, Any]]) -> dict[str, Series]:
    """Returns the series by name; where a step was written twice, the later line counts."""
    points: dict[str, dict[int, Any]] = {}
    for line in lines:
        for name in line.keys() - _NOT_METRICS:
            points.setdefault(name, {})[line["step"]] = line[name]
    found = {}
    for name in sorted(points):
        numbers = [(step, value) for step, raw in sorted(points[name].items()) if (value := finite(raw)) is not None]
        steps, values = np.array(numbers, np.float64).reshape(-1, 2).T
        found[name] = Series(steps, values, len(points[name]) - len(numbers))
    return found
