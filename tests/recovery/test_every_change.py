"""A run that is killed right before any one change of its files becomes, by the same command, the undisturbed run.

The run is a whole one: data cache, training, evaluations, saves, retention of the best, summary, report. There are some
three hundred changes, of a hundred kinds. `make test-slow` takes one at random of each of some forty-five groups of
alike kinds (7 minutes of processor time). `JAXOPS_KILL_POINTS=all` takes every one, and any other value those whose
name holds that regular expression:

    JAXOPS_KILL_POINTS='rename.*summary' python -m pytest -m slow -s tests/recovery/test_every_change.py
"""

import contextlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import pytest
import run_records
from jobs import REPOSITORY
from kill_points import Point, armed, read_log
from tiny_runs import furnish, working_in

from jaxops.cli.main import main

CHOICE = "JAXOPS_KILL_POINTS"
CONFIG = """\
base: rec/sasrec
data: {kind: interactions, path: plays.csv, cache: cache}
model: {dim: 8, layers: 1, heads: 2, length: 6}
batch: {global: 16}
evaluate: {every: 10}
checkpoint: {every: 4, best: ndcg@10}
run: {name: km, steps: 24, log_every: 2}
"""
TRAIN = ["train", "my.yaml", "--cpu-devices", str(len(jax.devices()))]
CODE = """
import sys
import kill_points
kill_points.arm().count_lines()
from jaxops.cli.main import script
sys.argv[0] = "jaxops"
script()
"""
ALIKE = {
    r"^(\S+) cache/\.building/(cache/)?[^/ ]*\.(raw|npy|json)\b.*": r"\1 in a cache that is built",
    r"^(\S+) runs/km/(transform|\.(data|about|config)\.).*": r"\1 of a small file",
    r"^(os.remove|os.rmdir) runs/km/checkpoints/N/.+": r"\1 in a checkpoint that goes",
    r"^(\S+) runs/km/checkpoints/N(-N)?\.orbax-checkpoint-tmp/.*": r"\1 in a save",
    r"N-N": "N",
}
"""Kinds of which one is enough for all: by what they have in common."""


@pytest.fixture(autouse=True)
def _no_report():
    """The report is made here: tests/recovery leaves it out elsewhere."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXOPS_STATE", "state")  # of each folder that is the current one
    return tmp_path


def begin(folder: Path) -> Path:
    folder.mkdir()
    furnish(folder)
    (folder / "my.yaml").write_text(CONFIG)
    return folder


def train_armed(folder: Path, point: Point | None = None, log: Path | None = None) -> subprocess.CompletedProcess:
    """The run in a process of its own, which dies at the point."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environ = {**os.environ, "PYTHONPATH": path, **armed(folder, point, log)}
    command = [sys.executable, "-c", CODE, *TRAIN]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=300)


def resume(folder: Path) -> tuple[int, str]:
    """The same command in this process: exit status and what it said."""
    said = io.StringIO()
    with working_in(folder), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        return main(TRAIN[:2]), said.getvalue()


def group(point: Point) -> str:
    name = point.kind
    for pattern, alike in ALIKE.items():
        name = re.sub(pattern, alike, name)
    return name


def chosen(points: Iterable[Point], choice: str | None) -> list[Point]:
    if choice is not None:
        return [point for point in points if choice == "all" or re.search(choice, str(point))]
    groups: dict[str, list[Point]] = {}
    for point in points:
        if "/processes/" in point.kind and point.count > 1:  # signs of life come by the clock, so their number varies
            continue
        groups.setdefault(group(point), []).append(point)
    draw = random.Random(0)
    return [draw.choice(alike) for alike in groups.values()]


def differences(folder: Path, reference: Path) -> list[str]:
    """Names what a run has written otherwise than the undisturbed one."""
    runs = folder / "runs" / "km", reference / "runs" / "km"
    views = {name: getattr(run_records, name) for name in ("records", "shown", "state", "summary", "saved", "report")}
    found = []
    for name, view in views.items():
        try:
            ours, theirs = map(view, runs)
            if ours != theirs:
                found.append(f"{name}: {first_difference(ours, theirs)}")
        except (AssertionError, OSError, ValueError) as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
    return [*found, *(f"left or lost: {path}" for path in sorted(files(folder) ^ files(reference)))]


def first_difference(ours, theirs) -> str:
    if isinstance(ours, dict):
        ours, theirs = list(ours.items()), list(theirs.items())
    pairs = zip(ours, theirs, strict=False)
    which = next((f"{mine!r} for {other!r}" for mine, other in pairs if mine != other), "")
    return (f"{len(ours)} for {len(theirs)}; " if len(ours) != len(theirs) else "") + which[:300]


def files(folder: Path) -> set[str]:
    """What lies in a folder, apart from checkpoints, which are compared, and the inside of the data cache."""
    there = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    inside = re.compile(r"runs/km/checkpoints/|cache/.*/|.*/__pycache__|.*/0\.stacks\.txt")
    return {re.sub(r"events\.out\.tfevents.*", "events", name) for name in there if not inside.match(name)}


@pytest.mark.slow
def test_a_kill_before_any_change_of_the_files_loses_nothing(place):
    reference, log = begin(place / "reference"), place / "points"
    assert (done := train_armed(reference, log=log)).returncode == 0, done.stderr
    points = chosen(read_log(log), os.environ.get(CHOICE))
    assert points, f"no change of the files is called like {os.environ.get(CHOICE)}"
    bad = []
    for number, point in enumerate(points, start=1):
        folder = begin(place / f"kill-{number}")
        killed = train_armed(folder, point)
        status, said = resume(folder)
        found = differences(folder, reference)
        if killed.returncode != -signal.SIGKILL:
            found.append(f"not killed: {killed.returncode}, {killed.stderr[-300:]}")
        if status or "Traceback" in said:
            found.append(f"status {status}: {said[-600:]}")
        print(f"{number}/{len(points)} {point}: {found or 'the same'}", flush=True)
        if found:
            bad.append((str(point), found))
        else:
            shutil.rmtree(folder)
    assert not bad, bad


def test_a_chosen_change_is_the_last_that_a_process_does_not_make(place):
    code = """
import kill_points, os, pathlib, shutil
kill_points.arm()
pathlib.Path("runs").mkdir()
for number in (1, 2):
    pathlib.Path(f"runs/{number}").mkdir()
    pathlib.Path(f"runs/{number}/a.tmp").write_text("")
    os.replace(f"runs/{number}/a.tmp", f"runs/{number}/a")
    open(f"runs/{number}/a").close()
shutil.rmtree("runs/1")
"""
    path = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")}

    def run(folder: Path, **environ: str) -> int:
        folder.mkdir()
        return subprocess.run([sys.executable, "-c", code], cwd=folder, env=path | environ, check=False).returncode

    log = place / "points"
    assert run(place / "whole", **armed(place / "whole", log=log)) == 0
    made = ["os.mkdir runs/N", "open runs/N/a.tmp", "os.rename runs/N/a.tmp -> runs/N/a"]
    assert [point.kind for point in read_log(log)] == [
        "os.mkdir runs",
        *made * 2,
        "os.remove runs/N/a",
        "os.rmdir runs/N",
    ]
    killed = place / "killed"
    assert run(killed, **armed(killed, Point(made[2], 2))) == -signal.SIGKILL
    there = sorted(path.relative_to(killed).as_posix() for path in killed.rglob("*") if path.is_file())
    assert there == ["runs/1/a", "runs/2/a.tmp"]
