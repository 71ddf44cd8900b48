"""The loop on reviews, as it is shipped but for its sizes and small data, by one command."""

import json
from pathlib import Path

import pytest
import yaml
from small_data import NAMED
from tiny_runs import no_report, working_in  # noqa: F401 (fixtures)

from jaxops.cli.main import main
from jaxops.config.load import load
from jaxops.flow.rlhf.config import RlhfConfig
from jaxops.run.build import load_config

RUN = {"steps": 2, "loggers": [], "log_every": 1}
MODEL = {"dim": 32, "layers": 1, "heads": 2, "hidden": 64}
SMALL = {
    "language/sft_sentiment": {
        "tokenizer": {"vocab": 300},
        "model": MODEL,
        "optimizer": {"schedule": "constant"},
        "checkpoint": {"best": None},
    },
    "reward/ratings_sentiment": {
        "tokenizer": {"vocab": 300},
        "model": MODEL,
        "optimizer": {"schedule": "constant"},
        "checkpoint": {"best": None},
    },
    "reward/votes_sentiment": {"optimizer": {"schedule": "constant"}, "batch": {"global": 8}},
    "policy/ppo_sentiment": {
        "sample": {"max_tokens": 8, "slots": 16},
        "batch": {"prompts": 16},
        "evaluate": {"prompts": 8, "judge": None, "metrics": ["reward", "kl"]},
    },
}
"""What is smaller in each config of the chain."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "cache"))
    NAMED["named://icwsm14_reviews"](monkeypatch)
    with working_in(tmp_path):
        yield tmp_path


def loop() -> RlhfConfig:
    return load(RlhfConfig, "policy/rlhf_sentiment").config


def test_what_the_loop_names_is_there_and_goes_together():
    config = loop()
    sft, gold = [load_config(name).config for name in config.prepare]
    policy, reward = load_config(config.policy).config, load_config(config.reward).config
    of = lambda one: f"{one.run.dir}/{one.run.name}"
    assert policy.model.weights == reward.model.weights == of(sft)
    assert config.judge.run == of(gold)
    assert policy.data.path == sft.data.path == gold.data.path
    assert policy.data.valid == sft.data.valid == gold.data.valid  # the same texts are held out of all


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_one_command_trains_prefers_optimises_and_compares(place, capsys):
    for name, changes in SMALL.items():
        length = {"epochs": None, **RUN, "name": load_config(name).config.run.name}
        changed = {"base": name, **changes, "run": length}
        Path(f"{name.partition('/')[2]}.yaml").write_text(yaml.safe_dump(changed))
    local = lambda name: f"{name.partition('/')[2]}.yaml"
    shipped = loop()
    small = {
        "base": "policy/rlhf_sentiment",
        "prepare": [local(name) for name in shipped.prepare],
        "policy": local(shipped.policy),
        "reward": local(shipped.reward),
        "pairs": {"per_round": 24},
        "answers": {"max_tokens": 8, "slots": 16},
        "compare": {"count": 8},
    }
    Path("loop.yaml").write_text(yaml.safe_dump(small))
    assert main(["rlhf", "loop.yaml", "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["rounds"]
    assert only["start"] == "runs/sft-sentiment" and only["win_rate"]["comparisons"] <= 8
    folder = Path("runs/rlhf-sentiment/round-1")
    beginnings = [json.loads(line)["prompt"] for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert beginnings and all(len(text.split()) <= 4 for text in beginnings)
    compared = [json.loads(line)["prompt"] for line in (folder / "comparisons.jsonl").read_text().splitlines()]
    assert len(compared) == 8 and not {*compared} & {*beginnings}  # policies are compared on what is held out
    assert json.loads((folder / "policy/summary.json").read_text())["step"] == 2
    assert main(["rlhf", "loop.yaml"]) == 0  # nothing is left to do
