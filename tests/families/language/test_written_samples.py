"""Samples during evaluation: the same held-out prompts every time, greedy, beside the answers that the data has."""

import json
from pathlib import Path

import numpy as np
import pytest

import jaxops as jx
from jaxops.cli.main import main
from jaxops.data.text.documents import Documents
from jaxops.families.language.written_samples import BEGINNING, TOKENS, asked_of
from jaxops.run.fit import fit

CONFIG = """
task: language
tokenizer: bytes
model: {kind: decoder, dim: 16, layers: 1, heads: 2, hidden: 32, length: 64}
data: {kind: chat, path: chat.jsonl, length: 64, valid: {share: 0.3}}
optimizer: {kind: adamw, lr: 1e-2, schedule: constant}
batch: {global: 8}
evaluate: {every: 2, batch: 8, samples: 3}
run: {name: sft, steps: 4, log_every: 2, loggers: []}
"""
VOTES = "data={kind: preferences, path: votes.jsonl, length: 64, valid: {share: 0.3}}"


def turns(at):
    return [{"role": "user", "content": f"say {at}"}, {"role": "assistant", "content": f"yes {at}"}]


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chat.jsonl").write_text("".join(json.dumps({"messages": turns(at)}) + "\n" for at in range(40)))
    Path("sft.yaml").write_text(CONFIG)
    return tmp_path


def task_of(*overrides):
    return jx.build_task(jx.load_config("sft.yaml", list(overrides)))


def written(name):
    return [json.loads(line) for line in Path(f"runs/{name}/samples.jsonl").read_text().splitlines()]


def test_each_evaluation_completes_the_same_prompts(there):
    fit(task_of(), quiet=True)
    lines = written("sft")
    assert [line["step"] for line in lines] == [2] * 3 + [4] * 3
    first, last = lines[:3], lines[3:]
    assert [line["prompt"] for line in first] == [line["prompt"] for line in last]
    for line in last:
        number = line["prompt"].split("say ")[1].split("<")[0]
        assert line["part"] == "valid" and line["answer"] == f"yes {number}"
        assert line["prompt"] == f"<|im_start|>user\nsay {number}<|im_end|>\n<|im_start|>assistant\n"
    asked = [line["prompt"].split("\n")[1].removesuffix("<|im_end|>") for line in last]
    found = jx.load("runs/sft").generate(asked, temperature=0, max_tokens=TOKENS)
    assert found["completion"].to_pylist() == [line["completion"] for line in last]
    page = Path("runs/sft/report.html").read_text()
    assert '<h2 id="samples">Samples</h2>' in page and last[0]["answer"] in page
    assert main(["evaluate", "runs/sft", "--json"]) == 0 and len(written("sft")) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["mesh={data: 2, fsdp: 2, tensor: 2}"],
        ["mesh={data: 2, fsdp: 2, tensor: 2}", "model.weights=runs/base", "model.lora={rank: 2}", "tokenizer=null"],
        ["mesh={data: 1, fsdp: -1}", VOTES, "objective={kind: dpo}"],
    ],
)
def test_on_meshes_under_adapters_and_of_policies(there, overrides):
    row = {"prompt": "say 1:", "chosen": " yes", "rejected": " no"}
    Path("votes.jsonl").write_text("".join(json.dumps({**row, "prompt": f"say {at}:"}) + "\n" for at in range(40)))
    fit(task_of("run.name=base", "run.steps=1", "evaluate.samples=0"), quiet=True)
    assert not Path("runs/base/samples.jsonl").exists()
    fit(task_of(*overrides), quiet=True)
    lines = written("sft")
    assert len(lines) == 6 and all(line["answer"].strip().startswith("yes") for line in lines)


def test_without_held_out_text_there_is_nothing_to_complete(there, capsys):
    assert main(["train", "sft.yaml", "data.valid=null"]) == 2
    assert "evaluate.samples" in capsys.readouterr().err


def test_prompts_are_cut_out_of_documents():
    trained = [[0, 0, 0, 1, 1, 0, 1], [1] * 100, [0, 1, 1], [0, 0, 0, 1, 1, 0, 1], [0] * 9 + [1]]
    sizes = [len(one) for one in trained]
    tokens = np.concatenate([np.arange(size) + 10 * (at % 3) for at, size in enumerate(sizes)]).astype(np.int32)
    documents = Documents(tokens, np.concatenate(trained).astype(bool), np.cumsum([0, *sizes]))
    found = asked_of(documents, range(5), 32, 9)
    assert found[0] == ([0, 1, 2], [3, 4])
    assert (len(found[1].prompt), len(found[1].answer)) == (BEGINNING, TOKENS)  # a text that has no prompt
    assert found[2] == ([20], [21, 22])
    assert len(found) == 4 and found[3].answer == [19]  # the fourth document asks what the first one asks
    assert [len(one.prompt) for one in asked_of(documents, range(5), 4, 9)] == [3, 1]
    assert len(asked_of(documents, range(5), 32, 1)) == 1 and asked_of(documents, range(5), 32, 0) == []
