"""A folder with a small data set, the smallest config, a package of a user's own, and runs of it: for commands.

60 users walk over 30 items in steps of 1, 7 or 11, so there is something to learn and nothing is seen twice.
"""

import contextlib
import functools
import io
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from jaxops.cli.main import main
from jaxops.core.compiles import enable_compilation_cache
from jaxops.core.metrics_file import read_metrics
from jaxops.core.turn import advanced
from jaxops.report.page import write_report

CONFIG = """\
base: rec/sasrec
data: {kind: interactions, path: plays.csv}
model: {dim: 8, layers: 1, heads: 2, length: 6}
batch: {global: 16}
evaluate: {every: 10}
checkpoint: {every: 10, best: ndcg@10}
run: {name: tiny, steps: 20, log_every: 5, loggers: []}
"""

LOSSES = """\
import jax
import jax.numpy as jnp
import jaxops as jx

def focal(model, gamma=2.0):
    def objective(params, batch, key):
        logp = jax.nn.log_softmax(model.apply(params, batch, key))
        logp = jnp.take_along_axis(logp, batch["targets"][..., None], axis=-1)[..., 0]
        loss = -((1 - jnp.exp(logp)) ** gamma) * logp
        return {"loss/focal": jx.Sum.of(loss, batch["weight"])}
    return objective

def direct(params, batch, key): ...
def three(model): return 3
def short(model): return lambda params, batch: {}
def no_loss(model): return lambda params, batch, key: {"accuracy": jx.Sum.of(batch["weight"])}
def bare(model): return lambda params, batch, key: jnp.sum(batch["weight"])
def raw(model): return lambda params, batch, key: {"loss/raw": jnp.sum(batch["weight"])}
def vector(model): return lambda params, batch, key: {"loss/v": jx.Sum(batch["weight"][0], batch["weight"][0])}
def crash(model): return lambda params, batch, key: {"loss/x": batch["no_such_key"]}
"""

DATA = """\
import os
import time
import numpy as np

class Source:
    n_items, examples, length = 30, 90, 6

    def __init__(self, seed=0, record=None):
        rank, _, seconds = os.environ.get("OWNPKG_LATE", "").partition(":")
        if rank and rank == os.environ.get("OWNPKG_RANK"):
            time.sleep(float(seconds))
        self.seed, self.record = seed, record

    def _walk(self, example, length):
        start, stride = example * 7 % self.n_items, 1 + example % 3
        return 1 + (start[:, None] + stride[:, None] * np.arange(length)) % self.n_items

    def batch(self, cursor, size):
        time.sleep(float(os.environ.get("OWNPKG_SLEEP", 0)))  # for a test that must meet a run in the middle
        rank, _, row = os.environ.get("OWNPKG_FAIL", "").partition(":")
        if rank and rank == os.environ.get("OWNPKG_RANK", "0") and cursor <= int(row) < cursor + size:
            raise RuntimeError(f"no row {row} today")
        if cursor <= int(os.environ.get("OWNPKG_HANG", -1)) < cursor + size:
            time.sleep(1000)
        at = np.arange(cursor, cursor + size)
        epoch, place = at // self.examples, at % self.examples
        ids = (place * 7 + 11 * epoch + self.seed) % self.examples
        if self.record:
            with open(self.record, "a") as file:
                file.write(f"{cursor} {' '.join(map(str, ids))}\\n")
        items = self._walk(ids, self.length + 1)
        return {
            "id": ids.astype(np.int32),
            "items": items[:, :-1].astype(np.int32),
            "targets": items[:, 1:].astype(np.int32),
            "weight": np.ones((size, self.length), np.float32),
        }

    def valid(self, size):
        time.sleep(float(os.environ.get("OWNPKG_EVAL_SLEEP", 0)))
        ids = np.arange(size) % self.examples
        items = self._walk(ids, self.length + 1)
        return [{
            "id": ids.astype(np.int32),
            "items": items[:, :-1].astype(np.int32),
            "target": items[:, -1].astype(np.int32),
            "seen": items[:, :-1].astype(np.int32),
            "weight": (np.arange(size) < self.examples).astype(np.float32),
        }]

    test = valid

class Broken(Source):
    def __init__(self, **changes):
        self.seed, self.record = 0, None
        self.changes = {name: eval(text, {"np": np}) for name, text in changes.items()}

    def batch(self, cursor, size):
        whole = super().batch(cursor, size) | self.changes
        return {name: value for name, value in whole.items() if value is not None}

class NoBatch:
    n_items, examples = 30, 90

class OneArgument(Source):
    def batch(self, cursor): ...

class NotADict(Source):
    def batch(self, cursor, size): return []

class NoCount(Source):
    n_items = "many"

class BadValid(Source):
    def valid(self, size):
        first = dict(super().valid(size)[0])
        first["targets"] = first.pop("target")
        return [first]

class EmptyValid(Source):
    def valid(self, size): return []

make = Source
"""

LOGGERS = """\
import json

class Lines:
    def __init__(self, path="mine.jsonl"): self.path = path
    def write(self, step, values):
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\\n")

class Mute: ...
class Narrow:
    def write(self, values): ...
"""


def write_plays(path: Path) -> None:
    """u00 to u59, i00 to i29, string ids, hourly events; deterministic."""
    draw = np.random.default_rng(7)
    lines = ["user,item,time"]
    for user in range(60):
        start, stride, events = draw.integers(30), (1, 7, 11)[user % 3], draw.integers(6, 15)
        times = 1_700_000_000 + 7 * user + 3600 * np.arange(events)
        items = (start + stride * np.arange(events)) % 30
        lines += [f"u{user:02},i{item:02},{time}" for item, time in zip(items, times, strict=True)]
    path.write_text("\n".join(lines) + "\n")


def curve(run: str, name: str = "train/loss") -> dict[int, float]:
    """A metric of `runs/RUN` by step; each step is logged once, however often the run was resumed."""
    lines = [line for line in read_metrics(f"runs/{run}/metrics.jsonl") if name in line]
    found = {line["step"]: line[name] for line in lines}
    assert len(found) == len(lines)
    return found


class Stopped:
    """A step of its own, of one update, that asks this process to stop after `at` calls, as a scheduler would."""

    def __init__(self, step, at: int):
        self.step, self.left, self.programs = step, at, step.programs

    def __call__(self, *args):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        state, sums = self.step(*args)
        return advanced(state), sums


def furnish(folder: Path) -> None:
    """plays.csv, my.yaml and the package `ownpkg` in `folder`."""
    write_plays(folder / "plays.csv")
    (folder / "my.yaml").write_text(CONFIG)
    package = folder / "ownpkg"
    package.mkdir()
    for name, text in (("__init__", ""), ("losses", LOSSES), ("data", DATA), ("loggers", LOGGERS)):
        (package / f"{name}.py").write_text(text)


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[Path]:
    """`folder` as the current one, with the compilation cache; afterwards imports from it and settings are undone."""
    here, path = Path.cwd(), list(sys.path)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    settings = {name: getattr(jax.config, name) for name in names}
    os.chdir(folder)
    enable_compilation_cache()
    try:
        yield folder
    finally:
        os.chdir(here)
        sys.path[:] = path
        for name in [name for name in sys.modules if name.split(".")[0] == "ownpkg"]:
            del sys.modules[name]
        for name, value in settings.items():
            jax.config.update(name, value)


@functools.cache
def _trained(home: Path) -> Path:
    home.mkdir()
    furnish(home)
    with (
        working_in(home),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch("jaxops.report.page.write_report", write_report),
    ):
        assert main(["train", "my.yaml", "run.loggers=[tensorboard]"]) == 0
    return home / "runs" / "tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A furnished folder, which is the current one."""
    furnish(tmp_path)
    with working_in(tmp_path):
        yield tmp_path


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report takes half of a tiny run's time; tests/report looks at it."""
    monkeypatch.setattr("jaxops.report.page.write_report", lambda run: Path(run) / "report.html")


@pytest.fixture
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/tiny: a copy of one finished run that the whole session shares."""
    shutil.copytree(_trained(tmp_path_factory.getbasetemp() / "finished"), folder / "runs" / "tiny")
    return Path("runs/tiny")
