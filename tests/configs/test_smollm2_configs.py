"""The configs on SmolLM2-135M, as they are shipped but for their length and a tiny model in its place."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from small_data import NAMED
from tiny_gguf import small_smollm2
from tiny_runs import no_report, working_in  # noqa: F401 (fixtures)

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.sharding import named_leaves
from jaxops.models.decoder.pretrained import open_pretrained
from jaxops.run.build import load_config

SHORT = ["run.log_every=1", "run.loggers=[]", "evaluate.every=1", "checkpoint.every=1", "optimizer.schedule=constant"]
SMALL = ["data.length=64", "batch.global=16", "evaluate.batch=16", "precision.compute=float32"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "cache"))
    small_smollm2(monkeypatch)
    with working_in(tmp_path):
        yield tmp_path


def test_the_adapters_alone_are_trained(place, monkeypatch):
    NAMED["named://chitchat"](monkeypatch)
    task = jx.build_task(load_config("language/lora_smollm2", SMALL))
    paths = [path for path, _ in named_leaves(task.model.shapes)]
    trained = {path for path in paths if not any(re.search(pattern, path) for pattern in task.frozen)}
    assert trained == {path for path in paths if path.startswith("lora/")}
    assert {path.split("/")[2] for path in trained} == {"attention", "mlp"}


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("name", ["lora_smollm2", "sft_smollm2"])
def test_a_run_resumes_and_is_evaluated_sampled_and_exported(place, monkeypatch, capsys, name):
    config = load_config(f"language/{name}").config
    NAMED[config.data.path](monkeypatch)
    for steps in (1, 2):  # the second call goes on
        assert main(["train", f"language/{name}", *SHORT, *SMALL, f"run.steps={steps}"]) == 0
    run = Path("runs", config.run.name)
    summary = json.loads((run / "summary.json").read_text())
    assert "resumed from step 1" in capsys.readouterr().err and summary["step"] == 2
    assert main(["evaluate", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["valid/nll"] == summary["valid/nll"]
    assert main(["sample", str(run), "--prompt", "hello", "--max-tokens", "4", "--out", "said.jsonl"]) == 0
    assert json.loads(Path("said.jsonl").read_text().splitlines()[0])["completion"]
    assert main(["export", str(run), "out", "--to", "hf"]) == 0
    assert open_pretrained("out").architecture.dim == 32
    merged = jx.load(run).params
    assert set(merged) == {"embed", "layers", "norm"}  # adapters are merged, and beside nothing


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_ppo_by_heads_on_the_same_model(place, monkeypatch, capsys):
    for path in ("named://icwsm14", "named://icwsm14_reviews"):
        NAMED[path](monkeypatch)
    small = ["run.steps=1", "run.loggers=[]", "precision.compute=float32", "optimizer.schedule=constant"]
    assert main(["train", "reward/ratings_smollm2", *small, "data.length=32", "batch.global=16"]) == 0
    few = [
        "batch.prompts=8",
        "algorithm.minibatches=1",
        "sample={max_tokens: 6, slots: 8, segment: 3}",
        "data.max_tokens=48",
    ]
    few += ["evaluate.judge=null", "evaluate.metrics=[reward, kl]"]  # the judge is an extra that may not be here
    assert main(["train", "policy/ppo_smollm2", *small, *few, "evaluate.prompts=8", "evaluate.samples=2"]) == 0
    capsys.readouterr()
    summary = json.loads(Path("runs/ppo-smollm2/summary.json").read_text())
    assert summary["step"] == 1 and np.isfinite(summary["valid/reward"])
    assert main(["sample", "runs/ppo-smollm2", "--prompt", "a good one", "--max-tokens", "4"]) == 0
