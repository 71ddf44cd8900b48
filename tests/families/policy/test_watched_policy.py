"""A policy's run is paused by an alarm, goes on by the same command, and its report shows first and last answers."""

import json
import sys
from pathlib import Path

import pytest

from jaxops.cli.main import main
from jaxops.core.writers import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.pictures]
CONFIG = """\
task: policy
model: {kind: decoder, dim: 16, layers: 1, heads: 2, length: 32, hidden: 32}
tokenizer: bytes
data: {path: prompts.jsonl, template: none, max_tokens: 8, valid: {share: 0.25}}
rewards: [{fn: "judging_of_watch:vowels", weight: 10}]
algorithm: {kind: grpo, group: 4, kl: {coef: 0.001}}
sample: {max_tokens: 6, slots: 8, segment: 3}
watch: {kl_above: 1.0e-4, entropy_below: null, length_below: null, length_above: null, on_alarm: pause}
batch: {prompts: 8}
optimizer: {lr: 0.03}
mesh: {data: 8}
evaluate:
  {every: 2, metrics: [reward, kl, win_rate], judge: "judging_of_watch:shorter", prompts: 4, samples: 2, temperature: 0}
run: {name: watched, steps: 6, log_every: 1, loggers: []}
"""
JUDGING = """
def vowels(prompts, completions):
    return [sum(c in "aeiou" for c in text) - len(text) for text in completions]

def shorter(prompts, completions, references):
    return [0.5 + 0.5 * (len(a) < len(b)) for a, b in zip(completions, references)]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {at}"}) + "\n" for at in range(16)))
    (tmp_path / "judging_of_watch.py").write_text(JUDGING)
    (tmp_path / "policy.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("judging_of_watch", None)


def test_an_alarm_pauses_a_policy_and_the_same_command_goes_on(place, capsys):
    assert main(["train", "policy.yaml"]) == 75
    paused = json.loads(Path("runs/watched/summary.json").read_text())
    assert paused["state"] == "paused" and paused["step"] < 6 and "from its reference" in paused["reason"]
    (alarm,) = paused["alarms"]
    assert alarm["rule"] == "watch.kl_above=0.0001" and alarm["value"] > 1e-4 and alarm["metric"] == "train/kl"
    assert "(watch.kl_above=0.0001)" in "".join(capsys.readouterr())

    assert main(["train", "policy.yaml", "watch.ratio0_above=null"]) == 0  # what is watched may change
    summary = json.loads(Path("runs/watched/summary.json").read_text())
    assert (summary["state"], summary["step"], summary["alarms"]) == ("finished", 6, [alarm])
    lines = read_metrics("runs/watched/metrics.jsonl")
    assert [line["event"] for line in lines if "event" in line] == ["alarm", "paused", "resumed"]
    assert max(line["train/ratio0"] for line in lines if "train/ratio0" in line) < 1e-4

    page = Path("runs/watched/report.html").read_text()
    steps = sorted(line["step"] for line in lines if "valid/reward" in line)
    assert f"Completion, step {steps[0]}" in page and f"Completion, step {steps[-1]}" in page
    assert "Reward against KL to the reference" in page and "Win rate over the reference against KL" in page
