"""A policy that continues the first words of texts, whole: trained against answers that can be checked, and judged."""

import json

import pytest

from jaxops.cli.main import main
from jaxops.core.metrics_file import read_metrics

CONFIG = """
task: policy
tokenizer: bytes
model: {kind: decoder, dim: 8, layers: 1, heads: 2, hidden: 16, length: 32}
data: {kind: beginnings, path: t.jsonl, words: 2, max_tokens: 16, valid: {share: 0.3}}
rewards: [{fn: "jaxops.rl.rewards.verifiable:exact"}]
sample: {max_tokens: 2, slots: 8, segment: 2}
algorithm: {kind: grpo, group: 2, minibatches: 1, kl: {coef: 0.1}}
batch: {prompts: 8}
evaluate: {every: 2, metrics: [reward, win_rate, kl], prompts: 4, judge: "judge_of_words:longer", samples: 2}
run: {name: words, steps: 2, loggers: []}
"""
JUDGE = """
def longer(prompts, completions, references):
    assert all(prompt.startswith("text ") and prompt.count(" ") == 1 for prompt in prompts), prompts
    return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(completions, references)]
"""


@pytest.mark.slow
def test_first_words_are_continued_judged_and_served(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"text {at} goes on and on", "answer": "x"} for at in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge_of_words.py").write_text(JUDGE)
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert main(["train", "c.yaml"]) == 0
    last = [row for row in read_metrics("runs/words/metrics.jsonl") if "valid/win_rate" in row][-1]
    assert 0 <= last["valid/win_rate"] <= 1 and 0 <= last["valid/reward"] <= 1 and last["valid/kl"] >= -1
    shown = [json.loads(line)["prompt"] for line in (tmp_path / "runs/words/samples.jsonl").read_text().splitlines()]
    assert shown and all(prompt.count(" ") == 1 for prompt in shown)
    assert main(["sample", "runs/words", "--prompt", "text 3", "--max-tokens", "2"]) == 0
    capsys.readouterr()
