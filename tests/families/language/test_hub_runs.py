"""Runs that begin with a model of the Hugging Face Hub: which commit they read, and what they do without a Hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants as constants
import numpy as np
import pytest
from fake_hub import hub_here, serving  # noqa: F401 (one is a fixture)

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.core.sharding import named_leaves
from jaxops.run.fit import fit

CONFIG = """
task: language
model: {weights: hf://org/tiny}
data: {kind: chat, path: chat.jsonl, length: 48, valid: {share: 0.2}}
optimizer: {kind: adamw, lr: 1e-2, schedule: {kind: constant}}
batch: {global: 8}
evaluate: {every: 2, batch: 8}
checkpoint: {every: 2}
run: {name: hub, steps: 2, log_every: 2, loggers: []}
"""
FRESH = ["model={kind: decoder, dim: 16, layers: 1, heads: 2, hidden: 32, length: 48}", "tokenizer=bytes"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with text, a config, a run, and the exported model of that run, `first`."""
    folder = tmp_path_factory.mktemp("hub")
    turns = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red!"}]
    rows = [{"messages": [{**turns[0], "content": f"say {at}"}, turns[1]]} for at in range(40)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "hub.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("jaxops.report.page.write_report", lambda run: Path(run) / "report.html")
        fit(task_of(*FRESH, "run.name=first", "run.steps=1"), quiet=True)
        jx.load("runs/first").export(folder / "first")
    return folder


def task_of(*overrides):
    return jx.build_task(jx.load_config("hub.yaml", list(overrides)))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(hub_here, exported, tmp_path, monkeypatch):  # noqa: F811
    """A hub with the first model; the working folder is a fresh one with config and text."""
    for name in ("hub.yaml", "chat.jsonl"):
        shutil.copy(exported / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    hub_here.first = hub_here.commit("org/tiny", files(exported / "first"))
    return hub_here


def recorded(name: str) -> str:
    return jx.load_config(f"runs/{name}/config.yaml").config.model.weights


@pytest.mark.usefixtures("no_report")
def test_a_run_begins_with_the_weights_of_the_hub(hub, exported):
    run = fit(task_of("optimizer.lr=1e-30", "run.steps=1"), quiet=True)
    there = dict(named_leaves(jx.load(run.dir).saved.weights.params))
    for path, value in named_leaves(jx.load(exported / "runs/first").saved.weights.params):
        if path != "embed/embedding":  # below its real rows is padding, which no file has
            np.testing.assert_array_equal(there[path], value, err_msg=path)
    assert recorded("hub") == f"hf://org/tiny@main:{hub.first}"


@pytest.mark.usefixtures("no_report")
def test_a_resumed_run_reads_the_commit_that_it_began_with(hub, exported, tmp_path, monkeypatch):
    fit(task_of("run.steps=1"), quiet=True)
    second = hub.commit("org/tiny", files(exported / "first") | {"README.md": b"better"})
    task = task_of("run.steps=2")  # the same command again, after `main` has moved
    assert task.resolved["model"]["weights"] == f"hf://org/tiny@main:{hub.first}"
    assert fit(task, quiet=True).state == "finished"
    assert task_of("run.name=other").resolved["model"]["weights"] == f"hf://org/tiny@main:{second}"
    hub.refs["org/tiny"]["v2"] = second
    with pytest.raises(UserError, match=r"model.weights: .*main:.* there, .*@v2:.* here"):
        fit(task_of("run.steps=2", "model.weights=hf://org/tiny@v2"), quiet=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    shutil.move("runs/hub", tmp_path / "moved")  # what is recorded goes with the folder
    assert jx.load(tmp_path / "moved").evaluate().keys() >= {"valid/nll"} and hub.asked == []


def test_a_tokenizer_of_the_hub_is_held_to_its_commit(hub):
    task = task_of(FRESH[0], "tokenizer=hf://org/tiny@main")
    assert task.resolved["tokenizer"] == f"hf://org/tiny@main:{hub.first}"
    assert "model.safetensors" not in hub.fetched()
    assert task.about.data[0][1].startswith("bytes")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.weights=hf://org/tini", "model.weights: hf://org/tini@main: "),
        ("model.weights=hf://org/tiny@mian", "did you mean 'main'"),
        ("model.weights=hf://tiny", "model.weights: hf://tiny: expected hf://ORG/MODEL"),
        ("tokenizer=hf://org/tini", "tokenizer: hf://org/tini@main: "),
    ],
)
def test_what_the_hub_does_not_have_is_told(hub, capsys, override, said):
    assert main(["train", "hub.yaml", override]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not Path("runs").exists()


@pytest.mark.slow
def test_the_library_s_own_variables_are_heard(exported, tmp_path):
    """A process of its own: HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are read when the library is imported."""
    for name in ("hub.yaml", "chat.jsonl"):
        shutil.copy(exported / name, tmp_path)
    with serving() as hub:
        commit = hub.commit("org/tiny", files(exported / "first"))
        hub.gated, hub.token = {"org/tiny"}, "hf_right"
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_right"}

        def train(name: str, **more: str) -> subprocess.CompletedProcess[str]:
            script = "import sys; from jaxops.cli.main import main; sys.exit(main())"
            command = [sys.executable, "-c", script, "train", "hub.yaml", f"run.name={name}"]
            environment = {**os.environ, **own, **more, "JAX_PLATFORMS": "cpu"}
            return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

        assert (done := train("refused", HF_TOKEN="hf_wrong")).returncode == 2 and "is gated" in done.stderr
        assert (done := train("one")).returncode == 0, done.stderr
        assert (tmp_path / f"home/hub/models--org--tiny/snapshots/{commit}").is_dir()
        hub.asked.clear()
        assert (done := train("two", HF_HUB_OFFLINE="1", HF_TOKEN="")).returncode == 0, done.stderr
        assert hub.asked == []
        assert "hf_right" not in "".join(path.read_text() for path in (tmp_path / "runs/one").glob("*.[jy]*"))
