"""A resumed run is the run it would have been: bit for bit on its mesh, the same batches and losses on any other."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from children import COMMAND
from etils import epath
from tiny_runs import Stopped, curve

from jaxops.core import manifest
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import UserError
from jaxops.core.loop import every
from jaxops.core.mesh import make_mesh
from jaxops.core.metrics_file import read_metrics
from jaxops.core.sharding import named_leaves
from jaxops.run.build import build_task, load_config
from jaxops.run.fit import FinishedRun, fit

pytestmark = pytest.mark.usefixtures("no_report")
REPOSITORY = Path(__file__).resolve().parents[2]
OWN = "data={fn: 'ownpkg.data:make', record: ids.txt}"
QUICK = ["run.log_every=1", "evaluate.baselines=false"]


def train(*overrides: str, mesh: jax.sharding.Mesh | None = None, **kwargs) -> FinishedRun:
    task = build_task(load_config("my.yaml", [*QUICK, *overrides]))
    return fit(task, mesh, quiet=True, **kwargs)


def everything(run: str, step: int) -> dict[str, np.ndarray]:
    """Parameters, optimizer state, averages and counters of a checkpoint, by path."""
    with Checkpoints(f"runs/{run}/checkpoints") as checkpoints:
        return dict(named_leaves(checkpoints.load_params(step, "")))


def assert_same_bits(run: str, reference: str, step: int) -> None:
    ours, theirs = everything(run, step), everything(reference, step)
    assert ours.keys() == theirs.keys() and len(ours) > 40
    differ = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    assert not differ


def meta(run: str, step: int) -> dict:
    with Checkpoints(f"runs/{run}/checkpoints") as checkpoints:
        return checkpoints.meta(step)


@pytest.mark.latest
def test_ten_and_ten_steps_are_twenty_bit_for_bit(folder):
    # dropout, accumulation with one reduction, a moving average: all of them go through the checkpoint or the key
    changes = ["optimizer.ema=0.9", "batch.microbatch=8", "optimizer.weight_decay=0.1"]
    train("run.name=whole", "run.steps=20", *changes)
    first = train("run.name=parts", "run.steps=10", *changes)
    second = train("run.name=parts", "run.steps=20", *changes)
    assert (first.summary["step"], second.summary["step"]) == (10, 20)
    assert_same_bits("parts", "whole", 20)
    assert curve("parts") == curve("whole") and list(curve("whole")) == list(range(1, 21))
    assert curve("parts", "valid/ndcg@10") == curve("whole", "valid/ndcg@10")
    assert curve("parts", "test/ndcg@10").keys() == {10, 20}
    a, b = meta("parts", 20), meta("whole", 20)
    assert a["cursor"] == b["cursor"] == 20 * 16
    assert {**a["history"], "wall_s": 0} == {**b["history"], "wall_s": 0}


@pytest.mark.latest
@pytest.mark.slow
def test_on_other_meshes_the_batches_are_the_same_and_the_losses_agree(folder):
    sources = Path("ids.txt")
    train(OWN, "run.name=whole", "run.steps=15")
    whole = sources.read_text().splitlines()
    sources.unlink()
    train(OWN, "run.name=moved", "run.steps=5", "mesh.data=8")
    train(OWN, "run.name=moved", "run.steps=10", "mesh={data: 2, fsdp: 2, tensor: 2}")
    train(OWN, "run.name=moved", "run.steps=15", mesh=make_mesh(devices=jax.devices()[:1]))
    moved = sources.read_text().splitlines()

    def global_batches(lines: list[str]) -> dict[int, str]:
        rows = {int(line.split(" ", 1)[0]): line for line in lines if len(line.split()) == 17}
        return {cursor: rows[cursor] for cursor in range(0, 15 * 16, 16)}

    assert global_batches(moved) == global_batches(whole)
    assert meta("moved", 15)["cursor"] == 15 * 16
    ours, theirs = curve("moved"), curve("whole")
    assert list(ours) == list(theirs) == list(range(1, 16))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
    events = [line["text"] for line in read_metrics("runs/moved/metrics.jsonl") if line.get("event") == "resumed"]
    assert [text.split(",")[0] for text in events] == ["on 8 x cpu", "on 1 x cpu"]


def interrupted(at: int, *overrides: str) -> FinishedRun:
    task = build_task(load_config("my.yaml", [*QUICK, *overrides]))
    return fit(task, make_mesh(data=-1), quiet=True, step=lambda parts: Stopped(parts.update, at))


def test_an_evaluation_that_an_interrupt_cut_off_is_made_up_for(folder):
    train("run.name=whole", "evaluate.every=4", "run.steps=10")
    found = interrupted(4, "run.name=parts", "evaluate.every=4", "run.steps=10")
    assert found.state == "preempted" and found.summary["step"] == 4
    assert "valid/ndcg@10" not in found.summary and curve("parts", "valid/ndcg@10") == {}
    assert meta("parts", 4)["history"]["at"] == 0
    found = train("run.name=parts", "evaluate.every=4", "run.steps=10")
    assert found.state == "finished"
    assert curve("parts", "valid/ndcg@10") == curve("whole", "valid/ndcg@10")
    assert list(curve("parts", "valid/ndcg@10")) == [4, 8, 10]
    assert_same_bits("parts", "whole", 10)
    with Checkpoints("runs/parts/checkpoints") as checkpoints:
        assert checkpoints.metrics(4).keys() >= {"valid/ndcg@10"}  # so the best can be told


def test_a_checkpoint_that_no_run_saved_is_refused_in_words(folder):
    train("run.steps=2")
    (step,) = epath.Path("runs/tiny/checkpoints").glob("2*")
    found = manifest.read(step)
    for lacks in ({"cursor": None}, {"cursor": -1}, {"history": None}, {"history": 3}):
        manifest.write(step, dataclasses.replace(found, meta={**found.meta, **lacks}))
        with pytest.raises(UserError, match="checkpoint 2 does not say where its run goes on"):
            train("run.steps=4")
    manifest.write(step, found)
    assert train("run.steps=3").state == "finished"  # only what was missing was refused


def test_the_count_of_early_stopping_survives_an_interrupt(folder):
    # the learning rate is so small that no evaluation after the first is better
    rule = [
        "evaluate.every=2",
        "evaluate.stop={metric: hr@10, patience: 3}",
        "optimizer.lr=1e-12",
        "run.steps=30",
    ]
    assert interrupted(5, "run.name=parts", *rule).summary["step"] == 5
    assert meta("parts", 5)["history"]["since"] == 1
    found = train("run.name=parts", *rule)
    assert found.summary["step"] == 8 and found.summary["reason"] == "no better valid/hr@10 in 3 evaluations"


def command(*overrides: str) -> subprocess.Popen:
    """`jaxops train my.yaml ...` as a process of its own, whose batches take a tenth of a second each."""
    argv = [*COMMAND, "train", "my.yaml", "--cpu-devices", "8", *QUICK, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OWNPKG_SLEEP": "0.1"}
    return subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, run: str, step: int) -> None:
    """Returns once the run has logged `step`."""
    deadline = time.monotonic() + 120
    while max(curve(run), default=0) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_goes_on(folder, number):
    train(OWN, "run.name=whole", "run.steps=40")
    process = command(OWN, "run.name=parts", "run.steps=40")
    wait_for(process, "parts", 2)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    stopped = json.loads(Path("runs/parts/summary.json").read_text())
    state = "preempted" if number == signal.SIGTERM else "interrupted"
    assert stopped["state"] == state and 2 <= stopped["step"] < 40
    assert f"{number.name}: saving at the next step" in said and "Traceback" not in said
    assert f"saved at step {stopped['step']}; the same command goes on from there" in said
    assert meta("parts", stopped["step"])["cursor"] == 16 * stopped["step"]
    assert train(OWN, "run.name=parts", "run.steps=40").state == "finished"
    assert_same_bits("parts", "whole", 40)
    assert curve("parts") == curve("whole")
    events = [line["event"] for line in read_metrics("runs/parts/metrics.jsonl") if "event" in line]
    assert events == [state, "resumed"]


def test_ctrl_c_ends_a_loop_over_learning_rates_after_saving(folder):
    tried, handler = [], signal.getsignal(signal.SIGINT)
    press = every(3, lambda snapshot: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="parts is saved at step 3; the same call goes on from there"):
        for lr in (1e-3, 1e-2):
            tried.append(lr)
            train("run.name=parts", f"optimizer.lr={lr}", "run.steps=5", hooks=[press])
    assert tried == [1e-3] and signal.getsignal(signal.SIGINT) is handler
    assert json.loads(Path("runs/parts/summary.json").read_text())["state"] == "interrupted"
    assert meta("parts", 3)["cursor"] == 16 * 3
    found = train("run.name=parts", "optimizer.lr=1e-3", "run.steps=5")
    assert found.state == "finished" and list(curve("parts")) == [1, 2, 3, 4, 5]


def test_a_second_ctrl_c_in_python_stops_at_once_and_the_interpreter_lives(folder):
    twice = lambda snapshot: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train("run.name=parts", "run.steps=8", "checkpoint.every=2", hooks=[every(5, twice)])
    assert signal.getsignal(signal.SIGINT) is handler
    assert max(curve("parts")) < 8
    found = train("run.name=parts", "run.steps=8", "checkpoint.every=2")  # the lock is free, the saves are good
    assert found.state == "finished" and list(curve("parts")) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(folder):
    train(OWN, "run.name=whole", "run.steps=40", "checkpoint.every=5")
    process = command(OWN, "run.name=parts", "run.steps=40", "checkpoint.every=5")
    wait_for(process, "parts", 13)
    process.kill()
    process.communicate()
    assert train(OWN, "run.name=parts", "run.steps=40", "checkpoint.every=5").state == "finished"
    assert_same_bits("parts", "whole", 40)
    assert curve("parts") == curve("whole")


@pytest.mark.slow
def test_two_processes_cannot_train_the_same_run(folder):
    first = command(OWN, "run.name=same", "run.steps=2000")
    wait_for(first, "same", 1)
    second = command(OWN, "run.name=same", "run.steps=2000")
    said = second.communicate(timeout=120)[1]
    first.terminate()
    first.communicate(timeout=60)
    assert second.returncode == 2 and "Traceback" not in said
    assert f"run runs/same is being trained by another process (pid {first.pid})" in said
    assert first.returncode == 75


def test_a_run_from_before_updates_were_counted_goes_on(tmp_path, monkeypatch):
    """Its checkpoint has no such leaf: every step was one update. It ends where a run that never stopped does."""
    shutil.copytree(REPOSITORY / "tests/fixtures/runs_45a0086/sasrec", tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    more = ["run.steps=14", "run.log_every=1", "evaluate.baselines=false", "checkpoint.every=14"]
    task = build_task(load_config("my.yaml", more))
    old, whole = (fit(task, quiet=True, folder=folder) for folder in ("tiny_run", "whole"))
    assert old.summary["step"] == whole.summary["step"] == 14
    found = []
    for run in ("tiny_run", "whole"):
        with Checkpoints(f"{run}/checkpoints") as checkpoints:
            assert checkpoints.meta(14)["cursor"] == 14 * 16
            found.append(dict(named_leaves(checkpoints.load_params(14, ""))))
    assert found[0].keys() == found[1].keys() and int(found[0]["updates"]) == int(found[0]["step"]) == 14
    for name, leaf in found[0].items():
        np.testing.assert_allclose(leaf, found[1][name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_norms_by_group_come_from_the_config(folder):
    train("run.name=groups", "run.steps=2", "optimizer.clip={embedding: 0.1, default: 1.0}")
    (line,) = [x for x in read_metrics("runs/groups/metrics.jsonl") if x["step"] == 2 and "train/loss" in x]
    parts = [line[f"train/grad_norm/{name}"] for name in ("embedding", "default")]
    assert np.hypot(*parts) == pytest.approx(line["train/grad_norm"], rel=1e-5) and min(parts) > 0
    with pytest.raises(UserError, match=r"optimizer.clip: 'embeding' matches no trained parameter"):
        train("run.name=wrong", "run.steps=2", "optimizer.clip={embeding: 0.1}")
    assert not Path("runs/wrong").exists()
