"""The listing of the runs in a folder and of the state of each.

It reads small files only and imports no jax. A broken run folder does not stop the listing.
Tested in tests/run/folder/test_runs_listing.py.
"""

import contextlib
import dataclasses
import datetime as dt
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxops.core import stores
from jaxops.core.failures import UserError, nearest
from jaxops.core.home import expand_home
from jaxops.core.metrics_file import read_metrics
from jaxops.core.small_files import read_bytes, read_end
from jaxops.report import results
from jaxops.report.attempts import read_attempts
from jaxops.report.compare import MAX_RUNS, Comparison, Side, compare_sides
from jaxops.report.folder import RunRecord, finite, read_run, utc_time
from jaxops.run.folder import lease, mirror
from jaxops.run.folder.log_parts import parts_of

MARKS = ("config.yaml", "metrics.jsonl", "summary.json", "checkpoints")
"""A folder with one of these is a run, or the rest of one."""
DEPTH = 3
"""Runs are looked for this many folders down: a sweep keeps its runs in a folder of its own."""
_TAIL = 1 << 16
_LATE = dt.timedelta(seconds=2)
"""The last line of the log may be this much younger than the summary."""


@dataclasses.dataclass(frozen=True)
class Standing:
    """The state of a run.

    Attributes:
      state: `running`, `finished`, `interrupted`, `preempted`, `paused`, `failed`, `stopped` (killed), `unknown`, ...
      reason: the cause of the state, or nothing.
      step: the last step known.
    """

    state: str
    reason: str
    step: int | None


@dataclasses.dataclass(frozen=True)
class Listed:
    """One run of a listing. A field whose value is not known is None.

    Attributes:
      name: the path of the run relative to the listed folder.
      path: the folder (or URL), as another command takes it.
      state: the state, as in `Standing`.
      reason: the cause of the state, or nothing.
      step: the last step known.
      steps: the length of the run.
      metric: the metric that the run is judged by.
      best: its best value on validation.
      best_step: the step of that value.
      wall_s: seconds of training. Without a summary it is the time that the log spans, without pauses.
      last_activity: the time of the last record of the run.
      problems: files that could not be read, with the reason.
      attempts: how often a run that was launched was begun.
      preemptions: how many of these attempts were preempted or killed.
      chip_hours: what they took together.
    """

    name: str
    path: Path | str
    state: str
    reason: str
    step: int | None
    steps: int | None
    metric: str | None
    best: float | None
    best_step: int | None
    wall_s: float | None
    last_activity: dt.datetime | None
    problems: list[str]
    attempts: int | None = None
    preemptions: int | None = None
    chip_hours: float | None = None


def list_runs(directory: str | os.PathLike[str]) -> list[Listed]:
    """Lists every run in a folder (or the folder itself, if it is a run), latest activity first.

    For runs in an object store the small files are fetched into the jaxops cache.

    Raises:
      UserError: there is no such folder, or an object store cannot be read.
    """
    if stores.is_url(directory):
        found = _list_stored(stores.parse_url(directory))
    else:
        top = existing_folder(directory)
        found = [_listed(path, top) for path in _find(top, DEPTH)]
    never = dt.datetime.min.replace(tzinfo=dt.UTC)
    return sorted(found, key=lambda run: (run.last_activity or never, run.name), reverse=True)


def standing(run: RunRecord) -> Standing:
    """Returns the state of a run.

    Its lock decides first, then its summary, unless the log is younger. A run with neither was killed.
    """
    held = is_held(run.path)
    ended = run.number("step")
    current = "state" in run.summary and not _goes_on(run)
    known = [step for step in (run.step, ended if current else None) if step is not None]
    step = int(max(known)) if known else None
    if held:
        return Standing("running", "", step)
    if current:
        state, reason = str(run.summary["state"]), str(run.summary.get("reason") or "")
        return Standing(state, "" if reason == state else reason, step)
    if held is None:
        return Standing("unknown", "its .lock cannot be read: it may be running", step)
    unreadable = [problem for problem in run.problems if problem.startswith("summary.json")]
    if unreadable:
        return Standing("unknown", unreadable[0], step)
    return Standing("stopped", "ended without a word (killed?); the command that began it resumes it", step)


def is_held(path: Path) -> bool | None:
    """Returns whether a live process trains in this folder; None where that cannot be found out."""
    held = lease.held_here(path)
    if held:
        return True
    try:  # one of another machine, where the folder stands in for one in an object store
        return lease.is_fresh(read_bytes(path / lease.NAME)) or held
    except OSError:
        return held


def compare_runs(paths: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Compares two to MAX_RUNS runs.

    Raises:
      UserError: there are too few or too many, one is given twice, or a folder does not exist or is no run.
    """
    if not 2 <= len(paths) <= MAX_RUNS:
        raise UserError(f"compare: give 2 to {MAX_RUNS} runs (more cannot be told apart), got {len(paths)}")
    folders = [existing_folder(path) for path in paths]
    for place, folder in enumerate(folders):
        if folder.resolve() in {other.resolve() for other in folders[:place]}:
            raise UserError(f"compare: {folder} is given twice")
        if not is_run(folder):
            raise UserError(f"{folder} is not a run: it holds none of {', '.join(MARKS[:3])}")
    runs = [read_run(folder) for folder in folders]
    sides = []
    for run, label in zip(runs, _labels(runs), strict=True):
        stands = standing(run)
        steps = _steps(run, stands)
        sides.append(Side(run, label, stands.state, stands.reason, stands.step, steps, _wall_s(run)))
    return compare_sides(sides)


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """Returns the path of an existing folder; for a run's URL that of its local stand-in, brought up to date.

    Raises:
      UserError: there is no such folder, or an object store cannot be read.
    """
    if stores.is_url(path):
        run = mirror.Mirror(os.fspath(path))
        run.pull()
        if not run.names:
            raise UserError(f"there is nothing at {run.place}")
        return run.local
    folder = Path(expand_home(path))
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file, not a folder")
    try:
        beside = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    except OSError:
        beside = []
    raise UserError(f"there is no folder {folder}{nearest(folder.name, beside)}")


def _find(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
    elif depth:
        try:
            below = sorted(entry for entry in folder.iterdir() if entry.is_dir())
        except OSError:
            return
        for entry in below:
            if not entry.name.startswith("."):
                yield from _find(entry, depth - 1)


def _list_stored(top: stores.Location) -> list[Listed]:
    """Lists runs in an object store: folders are listed level by level, in parallel, then small files are fetched."""
    try:
        store = stores.open_store(top, patient=False)
        runs: list[str] = []
        level = [top.key]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(DEPTH + 1):
                below: list[str] = []
                for key, (folders, entries) in zip(level, pool.map(store.children, level), strict=True):
                    names = {*folders, *(entry.key.rpartition("/")[2] for entry in entries)}
                    if not names.isdisjoint(MARKS) or "metrics.jsonl" in parts_of(names):
                        runs.append(key)
                    else:
                        below += [f"{key}/{name}".lstrip("/") for name in folders if not name.startswith(".")]
                level = below
            places = [dataclasses.replace(top, key=key) for key in runs]
            folders_here = list(pool.map(mirror.pulled, map(str, places)))
    except OSError as error:
        raise UserError(f"{top}: {stores.advice(top, error)}") from None
    if not places and not level:
        existing_folder(str(top))  # raises where nothing is there at all
    base = mirror.stand_in(top)
    listed = [_listed(path, base) for path in folders_here]
    return [dataclasses.replace(run, path=str(place)) for run, place in zip(listed, places, strict=True)]


def is_run(folder: Path) -> bool:
    """Returns true if a folder is a run, or what is left of one."""
    try:
        return any((folder / name).exists() for name in MARKS)
    except OSError:  # an unreadable folder is listed, with the reason
        return True


def _listed(path: Path, top: Path) -> Listed:
    run = read_run(path)
    stands = standing(run)
    metric = _metric(run)
    best = None if metric is None else _best(run, metric)
    launched = read_attempts(run.attempts)
    return Listed(
        name=path.name if path == top else str(path.relative_to(top)),
        path=path,
        state=stands.state,
        reason=stands.reason,
        step=stands.step,
        steps=_steps(run, stands),
        metric=metric,
        best=None if best is None else best[1],
        best_step=None if best is None or best[0] is None else int(best[0]),
        wall_s=_wall_s(run),
        last_activity=_last_activity(run),
        problems=run.problems,
        attempts=launched.count if launched else None,
        preemptions=launched.preemptions if launched else None,
        chip_hours=launched.chip_hours if launched else None,
    )


def _goes_on(run: RunRecord) -> bool:
    """Returns whether something was logged after the summary was written.

    Times are compared, not steps: a failed run's summary has the step of its last checkpoint, and its log is beyond it.
    """
    try:
        written = utc_time((run.path / "summary.json").stat().st_mtime)
    except OSError:
        written = None
    written = utc_time(run.summary.get("finished")) or written
    last = _last_logged(run.path / "metrics.jsonl") if written is not None else None
    return written is not None and last is not None and last > written + _LATE


def _last_logged(path: Path) -> dt.datetime | None:
    """Returns the time in the last line of a log. It is not the latest time there if a clock was set back."""
    try:
        lines = read_end(path, _TAIL).split(b"\n")
    except OSError:
        return None
    for raw in reversed(lines):
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            if (found := utc_time(json.loads(raw).get("time"))) is not None:
                return found
    return None


def _metric(run: RunRecord) -> str | None:
    """Returns the metric that the run is judged by: checkpoint.best, else evaluate.stop.metric, else the first one."""
    metrics = run.setting("evaluate", "metrics")
    first = metrics[0] if isinstance(metrics, list) and metrics else None
    wanted = (run.setting("checkpoint", "best"), run.setting("evaluate", "stop", "metric"), first)
    name = next((name for name in wanted if isinstance(name, str)), None)
    return name or results.headline(run)


def _best(run: RunRecord, metric: str) -> tuple[float | None, float] | None:
    """Returns (step, value) of the best validation, from the log or else from the summary."""
    logged = results.best_step(run, metric)
    if logged is not None:
        return logged
    value = run.number(f"valid/{metric}")
    return None if value is None else (run.number("best_step", "step"), value)


def _steps(run: RunRecord, stands: Standing) -> int | None:
    """Returns the length of the run; None where the run is beyond the recorded length (run.steps was raised)."""
    steps = run.number("steps") or finite(run.setting("run", "steps"))
    return None if steps is None or steps < (stands.step or 0) else int(steps)


def _wall_s(run: RunRecord) -> float | None:
    """Returns seconds of training: the summary's, else the span of the log without the pause before each `resumed`."""
    measured = None if _goes_on(run) else run.number("wall_s")
    if measured is not None or run.first_time is None or run.last_time is None:
        return measured
    pauses, before = 0.0, run.first_time
    for line in read_metrics(run.path / "metrics.jsonl") if run.events else ():
        now = utc_time(line.get("time")) or before
        if line.get("event") == "resumed":
            pauses += (now - before).total_seconds()
        before = now
    return max((run.last_time - run.first_time).total_seconds() - pauses, 0.0)


def _last_activity(run: RunRecord) -> dt.datetime | None:
    """Returns the time of the last record of the run, else of the last change of its files."""
    said = [time for time in (run.last_time, utc_time(run.summary.get("finished"))) if time is not None]
    if said:
        return max(said)
    changed = []
    for name in MARKS:
        try:
            changed.append((run.path / name).stat().st_mtime)
        except OSError:
            continue
    return utc_time(max(changed, default=None))


def _labels(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the names of the runs, or the shortest ends of their paths that differ."""
    found = [run.name for run in runs]
    parts = [run.path.resolve().parts for run in runs]
    length = 1
    while len(set(found)) < len(runs):
        found, length = ["/".join(path[-length:]) for path in parts], length + 1
    return found
