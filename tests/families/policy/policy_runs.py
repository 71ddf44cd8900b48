"""A folder with prompts, reward functions and configs of tiny runs, for the tests of policies."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax

import jaxops as jx
from jaxops.data.text.byte_tokenizer import ByteTokenizer
from jaxops.models.decoder.architecture import Architecture, Rope
from jaxops.models.decoder.decoder import build_decoder
from jaxops.models.decoder.pretrained import save_pretrained
from jaxops.run.fit import fit

CONFIG = """\
task: policy
tokenizer: bytes
model: {weights: base}
data: {kind: prompts, path: prompts.jsonl, template: none, max_tokens: 16, valid: {share: 0.3}}
rewards:
  - {fn: "judges_of_policies:low"}
  - {kind: missing_eos, penalty: 0.1}
sample: {max_tokens: 6, slots: 16, segment: 3}
algorithm: {kind: ppo, epochs: 2, minibatches: 2}
optimizer: {kind: adamw, lr: 1e-2, schedule: constant}
batch: {prompts: 16}
evaluate: {every: 2, prompts: 4, samples: 4}
checkpoint: {every: 2}
run: {name: ppo, steps: 2, log_every: 1, loggers: []}
"""
SFT = """\
task: language
tokenizer: bytes
model: {kind: decoder, dim: 16, layers: 1, heads: 2, hidden: 32, length: 40}
data: {kind: text, path: prompts.jsonl, columns: {text: prompt}, length: 24}
optimizer: {kind: adamw, lr: 1e-2, schedule: constant}
batch: {global: 8}
run: {name: sft, steps: 1, loggers: []}
"""
RM = """\
task: reward
model: {weights: runs/sft}
data: {kind: preferences, path: votes.jsonl, length: 24, template: null}
reference: 8
optimizer: {kind: adamw, lr: 1e-2, schedule: constant}
batch: {global: 8}
run: {name: rm, steps: 2, loggers: []}
"""


def prompt(at: int) -> dict:
    return {"prompt": f"say {at}", "answer": f"a{at}", "level": at % 3}


def vote(at: int) -> dict:
    return {"prompt": f"say {at} ", "chosen": "yes", "rejected": f"no{at % 7}"}


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def furnish(folder: Path) -> None:
    """Writes data, reward functions and configs."""
    (folder / "prompts.jsonl").write_text(lines([prompt(at) for at in range(40)]))
    base = Architecture(dim=16, layers=1, heads=2, hidden=32, length=40)
    other = {"wide": {"dim": 32}, "turned": {"rope": Rope(theta=5000.0)}}
    for name, changes in ({"base": {}} | other).items():
        decoder = build_decoder(dataclasses.replace(base, **changes), ByteTokenizer().vocab)
        save_pretrained(folder / name, decoder.config, decoder.init(jax.random.key(0)))
    (folder / "votes.jsonl").write_text(lines([vote(at) for at in range(40)]))
    shutil.copy(Path(__file__).with_name("judges_of_policies.py"), folder)
    for name, text in (("ppo", CONFIG), ("sft", SFT), ("rm", RM)):
        (folder / f"{name}.yaml").write_text(text)


def task_of(*overrides: str, config: str = "ppo.yaml") -> jx.Task:
    return jx.build_task(jx.load_config(config, list(overrides)))


def trained(name: str, *overrides: str, config: str = "ppo.yaml"):
    run = fit(task_of(f"run.name={name}", *overrides, config=config), quiet=True)
    assert run.state == "finished"
    return run
