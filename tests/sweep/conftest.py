"""A folder with a family of 150 lines, whose runs take a second, and files that sweep it."""

import shutil
import sys
from pathlib import Path

import pytest

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
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("toy_family", None)
