"""What docs/rlhf.md prints runs as it is printed; only the number of steps is cut."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxops.cli.main import main
from jaxops.run.build import load_config

TEXT = (Path(__file__).parents[3] / "docs/rlhf.md").read_text().split("\n## ")[1]
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.S | re.M))


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for language in ("python", "yaml"):
        name, _, text = BLOCKS[language].partition("\n")
        Path(name.removeprefix("# ")).write_text(text)
    lines = [line.partition(" #")[0].strip() for line in BLOCKS["bash"].splitlines()]
    subprocess.run(["bash", "-c", lines[0]], check=True)
    return [shlex.split(line)[1:] for line in lines[1:]]


def test_the_config_is_whole_and_short(written):
    assert len(BLOCKS["yaml"].splitlines()) + len(BLOCKS["python"].splitlines()) <= 13
    config = load_config("mine.yaml").config
    assert config.task == "policy" and config.completions == 32 * 8
    swapped = {**yaml.safe_load(Path("mine.yaml").read_text()), "base": "policy/ppo"}
    Path("ppo.yaml").write_text(yaml.safe_dump(swapped))
    assert load_config("ppo.yaml").config.algorithm.kind == "ppo"


@pytest.mark.slow
def test_the_commands_run_as_printed(written, capsys):
    train, *others = written
    assert main([*train, "run.steps=2"]) == 0
    capsys.readouterr()
    for words in others:
        assert main(words) == 0
    assert "reward" in capsys.readouterr().out


@pytest.mark.slow
def test_the_vowels_are_learnt(written):
    assert main([*written[0]]) == 0
    lines = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    rewards = [line["valid/reward"] for line in lines if "valid/reward" in line]
    assert rewards[-1] > 0.2, rewards
