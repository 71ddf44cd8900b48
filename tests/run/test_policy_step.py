"""A step of several programs with a host's judgement between, as an outside user writes it, through `train`.

Its inner update is the unchanged TrainStep. One device, eight devices and two processes train alike; what a host
answered is asked for once, whatever kills the run.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from children import COMMAND

import jaxops as jx
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.metrics_file import read_metrics
from jaxops.core.sharding import named_leaves

REPOSITORY = Path(jx.__file__).parents[1]
STEPS, SIZE = 6, 16
CONFIG = f"""\
task: toy_policy:FAMILY
optimizer: {{kind: sgd, lr: 2.0, clip: {{"^policy/": 1.0, "^value/": 0.5}}}}
batch: {{global: {SIZE}}}
checkpoint: {{every: 2}}
run: {{name: toy, steps: {STEPS}, log_every: 1, loggers: []}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copy(Path(__file__).parents[1] / "toy_policy.py", tmp_path)
    (tmp_path / "toy.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(run: str, *overrides: str, processes: int = 1, devices: int = 1, sleep: float = 0) -> list:
    port = 20000 + os.getpid() % 20000
    started = []
    for rank in range(processes):
        env = os.environ | {"PYTHONPATH": str(REPOSITORY), "JUDGED": f"{run}.asked", "JUDGE_SLEEP": str(sleep)}
        if processes > 1:
            env |= {"JAXOPS_COORDINATOR": f"127.0.0.1:{port}", "JAXOPS_NUM_PROCESSES": str(processes)}
            env |= {"JAXOPS_PROCESS_ID": str(rank)}
        argv = [*COMMAND, "train", "toy.yaml", "--cpu-devices", str(devices), f"run.name={run}"]
        with open(f"{run}-{rank}.log", "a") as log:
            started.append(subprocess.Popen([*argv, *overrides], env=env, stdout=log, stderr=subprocess.STDOUT))
    return started


def train(run: str, *overrides: str, **options) -> None:
    for process in start(run, *overrides, **options):
        assert process.wait(240) == 0, Path(f"{run}-0.log").read_text()


def params(run: str, step: int = STEPS) -> dict:
    with Checkpoints(f"runs/{run}/checkpoints") as checkpoints:
        return dict(named_leaves(checkpoints.load_params(step, "params")))


def asked(run: str) -> list[str]:
    return Path(f"{run}.asked").read_text().splitlines()


def rewards(run: str) -> list[float]:
    return [line["train/reward"] for line in read_metrics(f"runs/{run}/metrics.jsonl") if "train/reward" in line]


@pytest.mark.slow
def test_devices_and_processes_train_alike_and_each_sample_is_judged_once(folder):
    train("one")
    train("eight", devices=8)
    train("cube", "mesh={data: 2, fsdp: 2, tensor: 2}", devices=8)
    train("two", "mesh={data: 1, tensor: 2}", processes=2)
    one = params("one")
    for run in ("eight", "cube", "two"):
        found = params(run)
        assert found.keys() == one.keys()
        for name in one:
            np.testing.assert_allclose(found[name], one[name], atol=1e-5, err_msg=f"{run}: {name}")
        assert sorted(asked(run)) == sorted(asked("one")) and len(asked(run)) == STEPS * SIZE
    assert rewards("one")[-1] > rewards("one")[0]
    kept = sorted(path.name for path in Path("runs/one/checkpoints").iterdir())
    assert len([name for name in kept if name.startswith("frozen-")]) == 1  # the reference, once
    summary = json.loads(Path("runs/one/summary.json").read_text())
    assert summary["step"] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_cut_off_between_two_answers_it_goes_on_and_asks_nothing_twice(folder, number):
    """Two processes, a tensor axis across them, slow answers; its end is bit for bit that of one whole process."""
    mesh = "mesh={data: 1, tensor: 2}"
    train("whole", mesh, devices=2)
    started = start("cut", mesh, processes=2, sleep=0.1)
    until = time.monotonic() + 200
    while time.monotonic() < until and (not Path("cut.asked").exists() or len(asked("cut")) < 3 * SIZE + 5):
        time.sleep(0.02)
    for process in started if number == signal.SIGKILL else started[:1]:
        process.send_signal(number)
    ends = [process.wait(200) for process in started]
    assert ends == ([75, 75] if number == signal.SIGTERM else [-9, -9]), Path("cut-0.log").read_text()
    assert len(asked("cut")) < STEPS * SIZE
    train("cut", mesh, processes=2)
    whole, cut = params("whole"), params("cut")
    assert all(np.array_equal(whole[name], cut[name]) for name in whole)
    lost = len(asked("cut")) - len(set(asked("cut")))
    assert set(asked("cut")) == set(asked("whole")) and lost <= (2 if number == signal.SIGKILL else 0)
    assert rewards("cut") == rewards("whole")
