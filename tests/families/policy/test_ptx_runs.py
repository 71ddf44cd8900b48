"""Runs of a policy that learn from text beside completions."""

import json
from pathlib import Path

import pytest
from policy_runs import lines, trained
from run_records import assert_same_records, state

from jaxops.cli.main import main
from jaxops.core.metrics_file import read_metrics

TEXT = "{kind: text, path: texts.jsonl, length: 12}"


@pytest.fixture(autouse=True)
def _texts(there):
    Path("texts.jsonl").write_text(lines([{"text": f"number {at} is {at * at}"} for at in range(50)]))


def test_a_coefficient_of_zero_changes_nothing_and_reads_nothing():
    trained("ptx-zero", "ptx={coef: 0, data: {kind: text, path: nowhere.jsonl}}")
    assert state("runs/ptx-zero") == state("runs/ppo")
    assert_same_records("runs/ptx-zero", "runs/ppo")


def test_the_text_is_learnt_and_its_position_is_saved():
    run = trained("ptx", f"ptx={{coef: 5, data: {TEXT}, rows_per_completion: 2}}")
    windows = [line for line in read_metrics(Path(run.dir) / "metrics.jsonl") if "train/loss" in line]
    for line in windows:
        assert line["train/loss/ptx"] == pytest.approx(5 * line["train/ptx_nll"], rel=1e-5)
    assert windows[1]["train/ptx_nll"] < windows[0]["train/ptx_nll"]
    held = {path: value for path, (_, _, value) in state(run.dir).items() if "ptx" in path}
    numbers = {path.split("/")[-1]: int.from_bytes(value, "little") for path, value in held.items()}
    assert numbers == {"row": 2 * 2 * 2 * 16, "example": 32}  # steps x epochs x rows a completion x completions
    assert json.loads(Path(run.dir, "data.json").read_text())["ptx"]["train"]["documents"] == 50
    # other text than the run began with is refused
    Path("texts.jsonl").write_text(lines([{"text": f"word {at}"} for at in range(50)]))
    assert main(["train", "ppo.yaml", "run.name=ptx", "run.steps=4", f"ptx={{coef: 5, data: {TEXT}}}"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("changes", [(), ("algorithm={kind: grpo, group: 4, minibatches: 2}",)], ids=["ppo", "grpo"])
def test_a_resumed_run_is_the_one_that_was_not_stopped(changes):
    name, mixed = f"ptx-{len(changes)}", f"ptx={{coef: 1, data: {TEXT}}}"
    trained(f"{name}-whole", mixed, *changes, "run.steps=4")
    trained(name, mixed, *changes, "run.steps=2")
    trained(name, mixed, *changes, "run.steps=4")
    assert state(f"runs/{name}") == state(f"runs/{name}-whole")
