"""A language model on texts whose vocabulary is made out of them: trained, its tokenizer kept, and begun with again."""

import json

import pytest

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.failures import UserError

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a film to see again"] * 20
CONFIG = """
task: language
tokenizer: {kind: trained, vocab: 320, lowercase: true}
model: {kind: decoder, dim: 8, layers: 1, heads: 2, hidden: 16, length: 16}
data: %s
batch: {global: 8}
evaluate: {batch: 8}
run: {name: words, steps: 1, loggers: []}
"""
DATA = {
    "text": ("{kind: text, path: t.jsonl, length: 16, valid: {share: 0.3}}", lambda text: {"text": text}),
    "completion": (
        "{kind: completion, path: t.jsonl, length: 16}",
        lambda text: {"prompt": text[:5], "completion": text[5:]},
    ),
    "mixture": (
        "{kind: mixture, sources: [{kind: text, path: t.jsonl, length: 16}]}",
        lambda text: {"text": text},
    ),
}


def write(folder, kind):
    data, row = DATA[kind]
    (folder / "t.jsonl").write_text("".join(json.dumps(row(f"{text} {at}")) + "\n" for at, text in enumerate(TEXTS)))
    (folder / "c.yaml").write_text(CONFIG % data)


@pytest.mark.parametrize("kind", DATA)
def test_texts_of_training_make_the_vocabulary(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, kind)
    assert main(["data", "preview", "c.yaml"]) == 0
    assert "sat on the" in capsys.readouterr().out
    assert jx.build_task(jx.load_config("c.yaml")).model.config.vocab == 320


def test_a_run_keeps_its_vocabulary_and_others_begin_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "text")
    assert main(["train", "c.yaml"]) == 0
    served = jx.load("runs/words")
    assert len(served.tokenizer.encode("THE CAT")) < 7
    again = (tmp_path / "c.yaml").read_text().replace("name: words", "name: again")
    again = again.replace("tokenizer: {kind: trained, vocab: 320, lowercase: true}\n", "")
    model = again[again.index("model:") : again.index("\ndata:")]
    (tmp_path / "c.yaml").write_text(again.replace(model, "model: {weights: runs/words}"))
    assert main(["train", "c.yaml"]) == 0
    assert jx.load("runs/again").tokenizer.digest == served.tokenizer.digest


def test_it_takes_no_further_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "text")
    with pytest.raises(UserError, match="a vocabulary that is trained has no further tokens"):
        jx.load_config("c.yaml", ["add_tokens=[<x>]"])
