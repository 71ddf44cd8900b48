"""One run as several processes: the same batches, the same losses, and one answer to a signal."""

import os
import signal
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from children import COMMAND
from jobs import OWN, QUICK, REPOSITORY, Job, events, examples, train
from processes import Together
from tiny_runs import curve, furnish

from jaxops.core.checkpoint import Checkpoints

STEPS = 40
_whole: list[tuple[dict[int, float], dict[int, int]]] = []


def uninterrupted(steps: int) -> tuple[dict[int, float], dict[int, int]]:
    """Losses by step and examples by cursor of the run that nothing happened to; made once a session."""
    if not _whole:
        assert train("whole", OWN, f"run.steps={STEPS}") == (0, mock.ANY)
        _whole.append((curve("whole"), examples()))
        Path("ids.txt").unlink()
    losses, ids = _whole[0]
    return {step: losses[step] for step in range(1, steps + 1)}, {cursor: ids[cursor] for cursor in range(16 * steps)}


def assert_same_curve(run: str, losses: dict[int, float]) -> None:
    ours = curve(run)
    assert list(ours) == list(losses)
    np.testing.assert_allclose(list(ours.values()), list(losses.values()), rtol=1e-5)


def moved(steps: int, *counts: int) -> None:
    """A run of `steps` steps in equal parts, each on another number of processes, against one that was not moved."""
    losses, whole = uninterrupted(steps)
    for part, count in enumerate(counts, start=1):
        until = steps * part // len(counts)
        with Job("moved", OWN, f"run.steps={until}", processes=count, devices=4 // count, sleep=0) as job:
            assert job.end() == [0] * count, [job.said(rank) for rank in range(count)]
        lines = [line.split() for line in Path("ids.txt").read_text().splitlines()]
        # each builds the rows of its own devices, but for a look at the first ones when the data are opened
        assert {len(line) - 1 for line in lines if line[0] != "0"} == {16 // count}
        there = examples()
        # exactly the same examples at the same cursors (the loader may have built a few batches ahead)
        assert {cursor: whole[cursor] for cursor in there if cursor in whole} == {
            cursor: there[cursor] for cursor in there if cursor in whole
        }
        assert set(range(16 * (steps * (part - 1) // len(counts)), 16 * until)) <= there.keys()
        Path("ids.txt").unlink()
    assert_same_curve("moved", losses)
    assert events("moved").count("resumed") == len(counts) - 1


@pytest.mark.slow
def test_two_then_one_then_four_processes_are_the_run_of_one(folder):
    moved(12, 2, 1, 4)


TOWERS = [
    "model={kind: two_tower, user: [user, history], item: [item], dim: 8, user_hidden: [8], item_hidden: [8]}",
    "tables.user={dim: 8, placement: row, optimizer: {kind: adagrad, lr: 0.01}}",
    "tables.item={dim: 8, placement: row, features: [item, history], optimizer: {kind: rowwise_adagrad, lr: 0.01}}",
    "objective={kind: in_batch_softmax, block: 4}",
    "batch={global: 64, microbatch: 32}",
]
"""Two towers on tables that are divided over the devices, in two microbatches."""


@pytest.mark.slow
def test_tables_of_two_processes_go_on_in_one(folder):
    assert train("whole", *TOWERS, "run.steps=8") == (0, mock.ANY)
    with Job("moved", *TOWERS, "run.steps=4", sleep=0) as job:
        assert job.end() == [0, 0], [job.said(0), job.said(1)]
    status, said = train("moved", *TOWERS, "run.steps=8")
    assert status == 0 and "resumed from step 4" in said
    assert_same_curve("moved", curve("whole"))


@pytest.mark.parametrize(
    ("number", "rank"),
    [(signal.SIGTERM, 1), pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow)],
)
def test_a_signal_to_one_process_stops_all_at_one_step(folder, number, rank):
    losses, _ = uninterrupted(40)
    with Job("parts", OWN, "run.steps=40") as job:
        job.reach(3)
        job.signal(rank, number)
        assert job.end() == [75, 75], [job.said(0), job.said(1)]
    stopped = job.summary()
    assert stopped["state"] == ("preempted" if number == signal.SIGTERM else "interrupted")
    assert 3 <= stopped["step"] < 40
    assert f"saved at step {stopped['step']}; the same command goes on from there" in job.said()
    assert "Traceback" not in job.said(0) + job.said(1)
    with Checkpoints("runs/parts/checkpoints") as checkpoints:
        assert checkpoints.latest() == stopped["step"]
        assert checkpoints.meta(stopped["step"])["cursor"] == 16 * stopped["step"]
    status, said = train("parts", OWN, "run.steps=40")
    assert status == 0 and f"resumed from step {stopped['step']} of" in said
    assert_same_curve("parts", losses)


LOOP = """
import jaxops as jx
press = jx.every(3, lambda s: (rank, s.step) == (1, 3) and os.kill(os.getpid(), signal.SIGINT))
tried = []
try:
    for lr in (0.001, 0.01):
        tried.append(lr)
        given = {"run.name": f"loop-{lr}", "run.steps": 40, "run.log_every": 1, "optimizer.lr": lr}
        jx.fit(jx.build_task(jx.load_config("my.yaml", {**given, "evaluate.baselines": False})), hooks=[press])
except KeyboardInterrupt as error:
    print(tried, error)
"""


@pytest.mark.slow
def test_ctrl_c_in_one_process_ends_the_loops_of_all(folder):
    with Together(LOOP, devices=4) as loops:
        said = loops.end()
    assert said[0] == said[1] and "[0.001] " in said[0] and "loop-0.001 is saved at step" in said[0]
    assert not Path("runs/loop-0.01").exists()


@pytest.mark.slow
def test_a_signal_in_an_evaluation_stops_all_too(folder):
    with Job("parts", OWN, "run.steps=40", "evaluate.every=3", OWNPKG_EVAL_SLEEP="4") as job:
        job.reach(3)
        job.signal(0, signal.SIGTERM)
        assert job.end() == [75, 75], [job.said(0), job.said(1)]
    assert job.summary()["step"] % 3 == 0


def test_the_launcher_starts_forwards_and_hands_on_a_signal(folder):
    argv = [*COMMAND, "train", "my.yaml", "--processes", "2", *QUICK, OWN, "run.steps=400"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OWNPKG_SLEEP": "0.1"}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("[0] step"):
                process.send_signal(signal.SIGINT)
                break
        lines += process.stderr.readlines()
        said = "".join(lines)
        assert process.wait(timeout=60) == 75, said
    assert "[0] tiny: 2 x cpu" in said and "SIGINT: saving at the next step" in said
    assert "Gloo" not in process.stdout.read() if not process.stdout.closed else True


def test_a_run_folder_that_one_process_cannot_see_is_refused(folder):
    elsewhere = folder / "elsewhere"  # stands for a machine of its own: runs/ is another folder there
    elsewhere.mkdir()
    furnish(elsewhere)
    with Job("apart", OWN, elsewhere=str(elsewhere)) as job:
        assert job.end() == [2, 2], [job.said(0), job.said(1)]
    assert "run folder runs/apart: process 0 has it, but process 1 of 2 cannot see it" in job.said()
    assert not Path("runs").exists() and not (elsewhere / "runs").exists()


def test_half_a_job_in_the_environment_is_said_and_nothing_is_written(folder):
    with Job("half", processes=1, JAXOPS_NUM_PROCESSES="2") as job:
        assert job.end() == [2]
    assert "JAXOPS_NUM_PROCESSES set without JAXOPS_COORDINATOR, JAXOPS_PROCESS_ID" in job.said()
    assert not Path("runs").exists()
