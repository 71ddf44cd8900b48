"""A policy's run that is stopped or killed at any moment of an iteration becomes the run that never was.

Bit for bit: parameters, optimizer, metrics and samples. The reward function is not asked again for what the journal
holds. Two processes train as one does, and go on as one.
"""

import collections
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cut_policy import CALL
from kill_points import Point, armed, read_log
from policy_runs import furnish
from processes import ROOT
from run_records import records, state, summary

from jaxops.core.checkpoint import Checkpoints
from jaxops.core.metrics_file import read_metrics
from jaxops.core.sharding import named_leaves

pytestmark = pytest.mark.slow
CUT = Path(__file__).with_name("cut_policy.py")
STEPS, PROMPTS = 4, 16
ALWAYS = [f"run.steps={STEPS}", "rewards=[{fn: 'judges_of_policies:low', workers: 2}]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run that nothing disturbed, of one process with two devices, and what it asked for."""
    folder = tmp_path_factory.mktemp("cut")
    furnish(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JAXOPS_CACHE", str(folder / "cache"))
        (folder / "runs").mkdir()  # else this run alone would make it, and count one change more than the others
        assert train("whole", **armed(folder / "runs", log=folder / "points")) == [0]
    return folder


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def train(
    run: str, *overrides: str, cut: str | None = None, processes: int = 1, who: int | None = None, **more: str
) -> list[int]:
    """Trains in processes of their own, of two devices in all, and returns their exit statuses.

    `cut` is for the process `who`, or for all; `more` is added to the environment. All share what they have compiled.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "ASKED": f"{run}.asked"}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(Path("compiled").absolute()), **more}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    argv = [sys.executable, str(CUT), "train", "ppo.yaml", "--cpu-devices", str(2 // processes), f"run.name={run}"]
    started = []
    for rank in range(processes):
        own = dict(env)
        if processes > 1:
            own |= {"JAXOPS_COORDINATOR": f"127.0.0.1:{20000 + os.getpid() % 20000}"}
            own |= {"JAXOPS_NUM_PROCESSES": str(processes), "JAXOPS_PROCESS_ID": str(rank)}
        if cut is not None and who in (None, rank):
            own["CUT"] = cut
        with open(f"{run}-{rank}.log", "a") as log:
            words = [*argv, *ALWAYS, *overrides]
            started.append(subprocess.Popen(words, env=own, stdout=log, stderr=subprocess.STDOUT))
    try:
        return [process.wait(900) for process in started]
    finally:
        for process in started:
            process.kill()


def said(run: str) -> str:
    return Path(f"{run}-0.log").read_text()[-3000:]


def asked(run: str) -> collections.Counter[str]:
    """What the reward function was asked in training, and how often: evaluations keep no journal."""
    held = {json.loads(line)["prompt"] for line in Path(f"runs/{run}/samples.jsonl").read_text().splitlines()}
    rows = [json.loads(line) for line in Path(f"{run}.asked").read_text().splitlines()]
    return collections.Counter(json.dumps(row) for row in rows if row[0] not in held)


def samples(run: str) -> list[dict]:
    lines = [json.loads(line) for line in Path(f"runs/{run}/samples.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def assert_same(run: str, whole: str = "whole") -> None:
    assert state(f"runs/{run}") == state(f"runs/{whole}")
    assert records(f"runs/{run}") == records(f"runs/{whole}")
    assert samples(run) == samples(whole)
    assert summary(f"runs/{run}")["valid/reward"] == summary(f"runs/{whole}")["valid/reward"]


def test_the_whole_run_asks_once_for_each_completion():
    assert asked("whole").total() == STEPS * PROMPTS


# The counts lie in the third step, after the checkpoint of the second, or in the first: nothing is saved there yet.
MOMENTS = [
    "sampling:2",
    "sampling:12",
    "between_two_answers:15",
    "after_the_journal:4",
    "mid_epoch:10",
    "after_update:3",
]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_cut_off_it_goes_on_as_if_nothing_had_been(moment, number):
    run = f"{number}-{moment.replace(':', '-')}"
    ends = train(run, cut=f"{moment}:{number}")
    assert ends == [75 if number == "SIGTERM" else -signal.SIGKILL], said(run)
    assert train(run) == [0], said(run)
    assert_same(run)
    twice = asked(run) - asked("whole")
    # A kill between two calls may meet the other worker's in the middle: its answers are on no disk yet.
    assert twice.total() <= (2 if number == "SIGKILL" and moment.startswith("between") else 0), twice


def points(seed: int) -> list[Point]:
    """The moments of the undisturbed run from its first step on: calls of methods, or changes of its files.

    Signs of life (`processes/`) are left out, since the clock decides how many there are.
    """
    found = read_log(Path("points"))
    found = found[found.index(Point(f"{CALL} PolicyStep.__call__", 1)) :]
    found = [point for point in found if "/processes/" not in point.kind]
    found = [point for point in found if point.kind.startswith(f"{CALL} ") == (seed % 2 == 0)]
    return [point._replace(kind=point.kind.replace("whole", "random-N")) for point in found]


@pytest.mark.parametrize("seed", range(20))
def test_killed_at_a_random_moment_it_goes_on_as_if_nothing_had_been(folder, seed):
    run = f"random-{seed}"
    point = random.Random(seed).choice(points(seed))
    print(f"seed {seed}: {point}")
    assert train(run, **armed(folder / "runs", point)) == [-signal.SIGKILL], f"{point}\n{said(run)}"
    assert train(run) == [0], f"{point}\n{said(run)}"
    assert_same(run)


def test_killed_between_two_updates_it_reads_the_text_that_it_would_have_read():
    mixed = "ptx={coef: 1, data: {kind: text, path: prompts.jsonl, columns: {text: prompt}, length: 12}}"
    assert train("text-whole", mixed) == [0], said("text-whole")
    assert train("text", mixed, cut="mid_epoch:10:SIGKILL") == [-signal.SIGKILL], said("text")
    assert train("text", mixed) == [0], said("text")
    assert_same("text", "text-whole")


def parameters(run: str) -> dict[str, np.ndarray]:
    with Checkpoints(f"runs/{run}/checkpoints") as checkpoints:
        return dict(named_leaves(checkpoints.load_params(STEPS, "params")))


def test_two_processes_train_as_one_does():
    assert train("two", processes=2) == [0, 0], said("two")
    one, two = parameters("whole"), parameters("two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=1e-5, err_msg=name)
    assert [line["completion"] for line in samples("two")] == [line["completion"] for line in samples("whole")]
    assert asked("two") == asked("whole")


def test_two_processes_of_which_one_is_killed_go_on_as_one():
    one = parameters("whole")
    ends = train("cut-two", processes=2, cut="between_two_answers:12:SIGKILL", who=1)
    assert ends[1] == -signal.SIGKILL and ends[0] in (76, -signal.SIGABRT, 1), said("cut-two")
    assert train("cut-two") == [0], said("cut-two")
    for name, value in parameters("cut-two").items():
        np.testing.assert_allclose(value, one[name], atol=1e-5, err_msg=name)
    assert (asked("cut-two") - asked("whole")).total() <= 4


def test_a_reward_function_of_other_words_is_asked_anew():
    """Answers of the journal are for one function and its keywords alone; a resumed run must not take another's."""
    assert train("worded", "run.steps=2") == [0], said("worded")
    assert train("worded", "rewards=[{fn: 'judges_of_policies:low', weight: 2}]") == [2]
    assert "rewards" in said("worded")
    assert max(line["step"] for line in read_metrics("runs/worded/metrics.jsonl")) == 2
