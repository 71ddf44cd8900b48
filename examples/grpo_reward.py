"""A reward function of one's own for GRPO: a small model learns to answer with vowels.

`python examples/grpo_reward.py [a.b=VALUE ...]` begins with a model that knows nothing; on a laptop, a minute or two.
With `model: {weights: runs/sft}` or a published model's folder the same lines train that.
"""

import sys
from pathlib import Path

import jaxops as jx


def vowels(prompts, completions):
    """Returns the share of vowels in each completion: a number for each, or None to leave a sample out."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


CONFIG = """
base: policy/grpo                       # or policy/ppo: nothing else changes
tokenizer: bytes
model: {kind: decoder, dim: 64, layers: 2, length: 64}
data: {kind: prompts, path: prompts.txt, template: none, max_tokens: 16, valid: {share: 0.1}}
rewards: [{fn: "grpo_reward:vowels"}]
sample: {max_tokens: 16}
optimizer: {lr: 3e-3}
run: {name: vowels, steps: 40}
"""


def main(overrides=()):
    Path("prompts.txt").write_text("".join(f"say {number}\n" for number in range(200)))
    Path("vowels.yaml").write_text(CONFIG)
    run = jx.fit(jx.build_task(jx.load_config("vowels.yaml", list(overrides))))
    rewards = run.history()["train/reward"].drop_null().to_pylist()
    print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}; what it writes is in {run.dir}/report.html")
    return run


if __name__ == "__main__":
    main(sys.argv[1:])
