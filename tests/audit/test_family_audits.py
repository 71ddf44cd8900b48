"""Small configs of the language, reward and policy families pass every check on eight devices."""

import json
import sys
from pathlib import Path

import pytest

from jaxops.cli.main import main

sys.path.append(str(Path(__file__).parents[1] / "families" / "policy"))
from policy_runs import furnish

TINY = "{kind: decoder, dim: 16, layers: 2, heads: 2, hidden: 32, length: 32%s}"
CUBE = ["mesh={data: 2, fsdp: 2, tensor: 2}"]

pytestmark = pytest.mark.slow


@pytest.fixture
def _furnished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "cache"))
    furnish(tmp_path)
    texts = [{"text": f"{at} and {at * at} are friends"[: 8 + at % 13]} for at in range(80)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))


CONFIGS = {
    "language": [
        "language/sft",
        "tokenizer=bytes",
        f"model={TINY % ''}",
        *CUBE,
        "data={kind: text, path: texts.jsonl, length: 32, pack: true}",
        "batch.global=16",
        "run={name: x, steps: 4}",
    ],
    "reward": ["rm.yaml", "tokenizer=bytes", "model={weights: base}", "mesh={data: 8}", "batch.global=16"],
    "ppo": ["ppo.yaml", *CUBE],
    "grpo": ["ppo.yaml", "algorithm={kind: grpo, group: 4}", "mesh={data: 2}"],
}


@pytest.mark.usefixtures("_furnished")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_small_config_passes(config, capsys):
    assert main(["audit", *config, "--json"]) == 0, capsys.readouterr()
    found = {one["check"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    for name in ("counts", "sums", "examples", "gradients", "one device", "accumulation", "recompiles", "donation"):
        assert found[name]["verdict"] == "passed", found[name]
    if "pack: true" in " ".join(config):
        assert found["packing"]["verdict"] == "passed" and "separate ones" in found["packing"]["why"]


@pytest.mark.usefixtures("_furnished")
def test_a_config_whose_data_are_not_here_is_audited_over_stand_ins(capsys):
    config = [*CONFIGS["language"], "data.path=none.jsonl", "mesh={data: 1, fsdp: 8, tensor: 1}"]
    assert main(["audit", *config]) == 2
    assert "--stand-ins audits what needs neither data nor weights" in capsys.readouterr().err
    assert main(["audit", *config, "--stand-ins", "--json"]) == 0
    found = {one["check"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert found["fence"]["verdict"] == found["donation"]["verdict"] == found["collectives"]["verdict"] == "passed"
    assert found["sums"]["verdict"] == "not applicable" and "stand-ins" in found["sums"]["why"]
