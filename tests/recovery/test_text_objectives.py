"""Every objective on texts: a killed run becomes the undisturbed one bit for bit, and two processes train as one."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import run_records
from jobs import REPOSITORY
from kill_points import Point, armed, read_log
from tiny_runs import working_in

from jaxops.cli.main import main

pytestmark = pytest.mark.slow
WORDS = ("red", "blue", "old", "new", "sea", "sun")
COMMON = """
tokenizer: bytes
optimizer: {kind: adamw, lr: 1e-2}
batch: {global: 16, microbatch: 8}
evaluate: {every: 5, batch: 16}
checkpoint: {every: 3}
run: {name: km, steps: 12, log_every: 2, seed: 3}
"""
MODEL = "{kind: decoder, dim: 16, layers: 2, heads: 2, hidden: 32, length: 48, dropout: 0.1"
LANGUAGE = f"task: language\nmodel: {MODEL}}}{COMMON}"
REWARD = f"task: reward\nreference: 16\nmodel: {MODEL}, ensemble: 2}}{COMMON}"
HELD = "length: 48, valid: {share: 0.2}"
CHAT = f"data: {{kind: chat, path: chat.jsonl, {HELD}}}\n"
VOTES = f"data: {{kind: preferences, path: votes.jsonl, template: null, {HELD}}}\n"
OBJECTIVES = {
    "next_token_packed": f"{LANGUAGE}{CHAT}",
    "next_token_unpacked": f"{LANGUAGE}{CHAT.replace('kind: chat', 'pack: false, kind: chat')}"
    "objective: {kind: next_token, z_loss: 1e-3, label_smoothing: 0.1, chunk: 16}\n",
    "dpo": f"{LANGUAGE}{VOTES}objective: {{kind: dpo}}\n",
    "conservative_dpo": f"{LANGUAGE}{VOTES}objective: {{kind: dpo, label_smoothing: 0.2}}\n",
    "ipo": f"{LANGUAGE}{VOTES}objective: {{kind: ipo}}\n",
    "bradley_terry": f"{REWARD}{VOTES}objective: {{kind: bradley_terry, center: 0.01}}\n",
    "ties": f"{REWARD}{VOTES}objective: {{kind: bradley_terry, tie: 0.5, label_smoothing: 0.1}}\n",
    "best_of_k": f"{REWARD}data: {{kind: best_of_k, path: choices.jsonl, template: null, {HELD}}}\n"
    "objective: {kind: best_of_k, center: 0.01}\n",
    "ratings": f"{REWARD}data: {{kind: ratings, path: ratings.jsonl, {HELD}}}\n",
}
CODE = """
import pathlib, sys, types
sys.modules["jaxops.report.page"] = types.SimpleNamespace(write_report=lambda run: pathlib.Path(run) / "report.html")
import kill_points
kill_points.arm().count_lines()
from jaxops.cli.main import script
sys.argv[0] = "jaxops"
script()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with texts and judgements of every form."""
    folder = tmp_path_factory.mktemp("texts")
    for name, row in (("chat", chat), ("votes", vote), ("choices", choice), ("ratings", rated)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(at)) + "\n" for at in range(100)))
    return folder


def chat(at):
    said = (f"say {WORDS[at % 6]} {at}", f"{WORDS[at % 6]}!", "and?", WORDS[at // 6 % 6])[: 2 + 2 * (at % 2)]
    return {"messages": [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]}


def vote(at):
    label = {"label": "tie"} if at % 7 == 0 else {}
    return {
        "prompt": f"say {at}: ",
        "chosen": f"a {WORDS[at % 6]} yes",
        "rejected": f"the {WORDS[at // 6 % 6]}!",
        **label,
    }


def choice(at):
    answers = [f"{WORDS[(at + k) % 6]} {'yes' if k == at % 3 else 'no'} {k}" for k in range(3 + at % 2)]
    return {"prompt": f"say {at}: ", "completions": answers, "best": at % 3}


def rated(at):
    return {"text": f"{WORDS[at % 6]} {WORDS[at // 6 % 6]} {at}", "ratings": [at % 6, (at + 1) % 6, at % 4]}


def train(folder: Path, *more: str, point: Point | None = None, log: Path | None = None) -> int:
    """The run in processes of its own; returns the exit status."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environ = {**os.environ, "PYTHONPATH": path, **armed(folder, point, log)}
    command = [sys.executable, "-c", CODE, "train", "my.yaml", *more]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=300)
    print(done.stderr[-2000:] if done.returncode > 0 else "")
    return done.returncode


def begin(folder: Path, data: Path, config: str) -> Path:
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "my.yaml").write_text(config)
    return folder


@pytest.fixture(scope="module", params=OBJECTIVES)
def undisturbed(request, tmp_path_factory, data):
    """The config of an objective, its undisturbed run, and the changes of files that it made."""
    place = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXOPS_STATE", "state")
        whole = begin(place / "whole", data, OBJECTIVES[request.param])
        assert train(whole, "--cpu-devices", str(len(jax.devices())), log=place / "points") == 0
    return OBJECTIVES[request.param], whole / "runs/km", read_log(place / "points")


def test_a_killed_run_becomes_the_undisturbed_one(undisturbed, data, tmp_path, monkeypatch):
    """SIGKILL at three moments, each in the run that goes on from the one before."""
    monkeypatch.setenv("JAXOPS_STATE", "state")
    config, whole, points = undisturbed
    folder = begin(tmp_path / "killed", data, config)
    inside = [point for point in points if "runs/km" in point.kind]
    chosen = random.Random(config).sample(inside, 3)
    for point in chosen:
        # what a run that goes on has no need to do again does not kill it: then it is whole already
        assert train(folder, "--cpu-devices", str(len(jax.devices())), point=point) in (-signal.SIGKILL, 0)
    with working_in(folder):
        assert main(["train", "my.yaml"]) == 0
    killed = folder / "runs/km"
    assert run_records.records(killed) == run_records.records(whole), chosen
    assert run_records.state(killed) == run_records.state(whole), chosen
    assert run_records.summary(killed) == run_records.summary(whole), chosen


def test_two_processes_train_as_one(undisturbed, data, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPS_STATE", "state")
    config, whole, _ = undisturbed
    folder = begin(tmp_path / "two", data, config)
    assert train(folder, "--processes", "2", "--cpu-devices", "4") == 0
    found, expected = (run_records.records(run) for run in (folder / "runs/km", whole))
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, float):
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-4), (name, ours["step"])
    ours, theirs = (run_records.state(run) for run in (folder / "runs/km", whole))
    assert ours.keys() == theirs.keys()
    for path, (dtype, shape, content) in theirs.items():
        if path.startswith("params/") and dtype == "float32":
            got = np.frombuffer(ours[path][2], np.float32)
            np.testing.assert_allclose(got, np.frombuffer(content, np.float32), atol=1e-5, err_msg=f"{path} {shape}")
