"""A folder with a family of 150 lines, whose runs take a second, and files that sweep it."""

import shutil
import sys
from pathlib import Path

import pytest
from stand_in import SEARCH

from jaxops.core.failures import RunFailed
from jaxops.core.metrics_file import JsonlWriter
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.own_code import check_code, code_paths, write_code
from jaxops.run.summary import FinishedRun

CONFIG = """\
task: toy_family:FAMILY
letters: 8
optimizer: {kind: sgd, lr: 4.0, clip: null}
batch: {global: 16}
checkpoint: {every: 2, best: nll}
run: {name: toy, steps: 4, log_every: 2, loggers: []}
"""
SWEEP = """\
base: toy.yaml
runs:
  grid: {optimizer.lr: [1.0, 4.0]}
  seeds: 2
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The current folder, with the family's module, a config of it and a sweep of four points."""
    shutil.copy(Path(__file__).parents[1] / "toy_family.py", tmp_path)
    (tmp_path / "toy.yaml").write_text(CONFIG)
    (tmp_path / "lr.yaml").write_text(SWEEP)
    (tmp_path / "find.yaml").write_text(SEARCH)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("toy_family", None)


@pytest.fixture
def quick_fit(monkeypatch):
    """Training in no time: a run that has finished, whose NLL is 4 / lr, more with the seed; lr over 100 fails."""

    def fit(task, *, quiet, accept_code):
        config = task.config
        folder = RunFolder(Path(config.run.dir, config.run.name))
        folder.create(task.resolved, {}, task.inspection)
        write_code(folder, check_code(folder, code_paths(task.resolved), accept_code))
        folder.write_about({"metrics": {"nll": {"better": "lower", "label": "NLL"}}})
        lr, writer = config.optimizer.lr, JsonlWriter(folder.metrics)
        nll = 4.0 / lr + 0.01 * config.run.seed
        for step in (2, 4):
            writer.write(step, {"valid/nll": nll + 4 - step})
        writer.close()
        if lr > 100:
            raise RunFailed(f"the loss is not finite at step 4 (lr {lr})")
        folder.write_json("summary.json", {"state": "finished", "step": 4, "valid/nll": nll, "test/nll": nll + 0.1})
        return FinishedRun(folder.path, folder.summary(), "finished")

    monkeypatch.setattr("jaxops.sweep.runners.fit", fit)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """A sweep looks at its jobs, and a search at their metric, as often as it can."""
    monkeypatch.setattr("jaxops.sweep.work.POLL", 0.0)
    monkeypatch.setattr("jaxops.sweep.search.lead.LOOK", 0.0)
