"""A policy's run is paused by an alarm, goes on by the same command, and its report shows first and last answers."""

import json
from pathlib import Path

import pytest
from policy_runs import furnish

from jaxops.cli.main import main
from jaxops.core.metrics_file import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.pictures]
WATCHED = (
    "watch={kl_above: 1.0e-4, entropy_below: null, length_below: null, length_above: null, on_alarm: pause}",
    "algorithm={kind: grpo, group: 2, kl: {coef: 0.001}}",
    "evaluate.metrics=[reward, kl, win_rate]",
    'evaluate.judge="judges_of_policies:longer"',
    "evaluate.temperature=0",
    "optimizer.lr=0.05",
    "run.name=watched",
    "run.steps=6",
)


def test_an_alarm_pauses_a_policy_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "ppo.yaml", *WATCHED]) == 75
    paused = json.loads(Path("runs/watched/summary.json").read_text())
    assert paused["state"] == "paused" and paused["step"] < 6 and "from its reference" in paused["reason"]
    (alarm,) = paused["alarms"]
    assert alarm["rule"] == "watch.kl_above=0.0001" and alarm["value"] > 1e-4 and alarm["metric"] == "train/kl"
    assert "(watch.kl_above=0.0001)" in "".join(capsys.readouterr())

    assert main(["train", "ppo.yaml", *WATCHED, "watch.ratio0_above=null"]) == 0  # what is watched may change
    summary = json.loads(Path("runs/watched/summary.json").read_text())
    assert (summary["state"], summary["step"], summary["alarms"]) == ("finished", 6, [alarm])
    lines = read_metrics("runs/watched/metrics.jsonl")
    assert [line["event"] for line in lines if "event" in line] == ["alarm", "paused", "resumed"]
    assert max(line["train/ratio0"] for line in lines if "train/ratio0" in line) < 1e-4

    page = Path("runs/watched/report.html").read_text()
    steps = sorted(line["step"] for line in lines if "valid/reward" in line)
    assert f"Completion, step {steps[0]}" in page and f"Completion, step {steps[-1]}" in page
    assert "Reward against KL to the reference" in page and "Win rate over the reference against KL" in page
