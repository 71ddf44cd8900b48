"""Text data from a config to batches: what may be written there, what comes out, and how a person sees it."""

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest
import rich.console

from jaxops.config.load import load
from jaxops.core.failures import UserError
from jaxops.data.text.byte_tokenizer import ByteTokenizer
from jaxops.data.text.open import open_text
from jaxops.data.text.open_tokenizer import open_tokenizer
from jaxops.data.text.preview import preview
from jaxops.data.text.spec import ChatData, MixtureData, Share, TextData, TextDataConfig

TINY = str(pathlib.Path(__file__).parents[2] / "fixtures" / "text" / "tiny")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A config with text data alone."""

    data: TextDataConfig


def written(tmp_path, text, *overrides):
    (tmp_path / "run.yaml").write_text(text)
    return load(Run, tmp_path / "run.yaml", overrides).config.data


def chats(path, count=40, repeat=1):
    rows = [
        {"messages": [{"role": "user", "content": f"{at}+1?"}, {"role": "assistant", "content": f"{at + 1}"}]}
        for at in range(count)
    ] * repeat
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def texts(path, count=30):
    path.write_text("\n".join(json.dumps({"text": f"{at} " + "the cat. " * (at % 9)}) for at in range(count)))
    return str(path)


def test_what_a_config_may_say(tmp_path):
    found = written(
        tmp_path,
        "data: {kind: chat, path: 'data/*.jsonl', template: my.jinja, length: 64, date: 2026-01-31,\n"
        "  valid: {share: 0.05}, arguments: {enable_thinking: false}}\n",
    )
    assert isinstance(found, ChatData) and found.valid == Share(share=0.05) and found.loss_on == "assistant"
    assert found.arguments == {"enable_thinking": False} and found.date == "2026-01-31"
    assert written(tmp_path, "data: {kind: text, path: [a, b], valid: held.jsonl}").valid == "held.jsonl"
    assert written(tmp_path, "data: {kind: completion, path: a, valid: [v, w]}").valid == ("v", "w")
    mixed = written(
        tmp_path, "data: {kind: mixture, sources: [{kind: chat, path: a, weight: 3}, {kind: text, path: b}]}"
    )
    assert isinstance(mixed, MixtureData) and [one.weight for one in mixed.sources] == [3.0, 1.0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{kind: chats, path: a}", "data.kind .* unknown kind 'chats'; did you mean 'chat'"),
        ("{kind: chat}", "data.path .* missing"),
        ("{kind: chat, path: a, template: null}", "data.template .* conversations need a template"),
        ("{kind: chat, path: a, loss_on: completion}", "data.loss_on .* expected 'assistant' or 'all'"),
        ("{kind: chat, path: a, loss_on: all, turns: apart}", "data.turns .* learnt from many times"),
        ("{kind: text, path: a, length: 1}", "data.length .* must be at least 2"),
        ("{kind: text, path: a, valid: {share: 1.5}}", "data.valid.share .* must be less than 1"),
        ("{kind: text, path: a, template: x}", "data.template .* unknown key"),
        ("{kind: mixture, sources: []}", "data.sources .* needs a source"),
        (
            "{kind: mixture, sources: [{kind: text, path: a}, {kind: text, path: b, length: 64}]}",
            "data.sources.1.length .* 64 here and 1024 in the first source",
        ),
        ("{kind: mixture, sources: [{kind: text, path: a, weight: 0}]}", "weight .* must be greater than 0"),
    ],
)
def test_what_a_config_may_not_say(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        written(tmp_path, f"data: {text}")


def test_a_weight_counts_in_a_mixture_alone():
    alone, one = TextData(path="a", weight=2), TextData(path="a")
    assert alone.problems_in(Run(data=alone))[0][0] == "data.weight" and not one.problems_in(Run(data=one))
    mixed = MixtureData(sources=(alone, one))
    assert not mixed.problems_in(Run(data=mixed)) and not alone.problems_in(Run(data=mixed))


@pytest.mark.parametrize("tokenizer", ["bytes", TINY])
def test_from_a_file_to_batches(tokenizer, tmp_path):
    path = chats(tmp_path / "a.jsonl", repeat=2)
    config = ChatData(path=path, length=64, valid=Share(share=0.2))
    data = open_text(config, open_tokenizer(tokenizer))
    told = data.inspection
    assert told["train"]["documents"] + told["valid"]["documents"] == 80 and told["copies"] == 40
    assert "40 of 80 examples are exact copies" in told["notes"][0]
    source = data.source(seed=3)
    epoch = source.batch(0, source.examples)
    assert epoch["tokens"].shape == (source.examples, 64) and data.length == 64
    assert int(epoch["mask"].sum()) == told["train"]["learnt"]
    assert int((epoch["segment"] > 0).sum()) == told["train"]["tokens"]
    held = list(data.held_out(4)["valid"])
    assert sum(int(batch["mask"].sum()) for batch in held) == told["valid"]["learnt"]
    assert open_text(dataclasses.replace(config, valid=None), open_tokenizer(tokenizer)).held_out(4) == {}


def test_the_digest_tells_what_changes_the_rows(tmp_path):
    path = chats(tmp_path / "a.jsonl")
    config = ChatData(path=path, length=64)
    digest = lambda config, tokenizer: open_text(config, tokenizer).inspection["digest"]
    one = digest(config, ByteTokenizer())
    assert digest(config, ByteTokenizer()) == one
    others = [
        digest(dataclasses.replace(config, length=65), ByteTokenizer()),
        digest(dataclasses.replace(config, loss_on="all"), ByteTokenizer()),
        digest(config, open_tokenizer(TINY)),
    ]
    chats(tmp_path / "a.jsonl", count=39)
    others.append(digest(config, ByteTokenizer()))
    assert len({one, *others}) == 5


def test_a_mixture_of_conversations_and_texts(tmp_path):
    chat = ChatData(path=chats(tmp_path / "a.jsonl"), length=64, weight=3, valid=Share(share=0.2))
    text = TextData(path=texts(tmp_path / "b.jsonl"), length=64)
    data = open_text(MixtureData(sources=(chat, text)), ByteTokenizer())
    batch = data.source(0).batch(5, 400)
    assert abs((batch["source"] == 0).mean() - 0.75) < 0.03
    assert list(data.held_out(4)) == ["valid/0"]
    alone = open_text(text, ByteTokenizer()).source(1)
    rows = {row["tokens"].tobytes() for row in rows_of(alone.batch(0, alone.examples))}
    assert {row["tokens"].tobytes() for row in rows_of(batch) if row["source"] == 1} == rows


def rows_of(batch):
    return [{name: values[row] for name, values in batch.items()} for row in range(len(batch["id"]))]


def test_a_preview_shows_what_the_loss_sees(tmp_path):
    tokenizer = open_tokenizer(TINY)
    source = open_text(ChatData(path=chats(tmp_path / "a.jsonl", 2), length=64), tokenizer).source(0)
    plain = preview(source, tokenizer, rows=1).plain
    assert "<|im_start|>user\n0+1?<|im_end|>\n<|im_start|>assistant\n⟦1<|im_end|>⟧" in plain
    assert "<|im_start|>assistant\n⟦2<|im_end|>⟧" in plain and "4 tokens learnt from" in plain
    coloured = io.StringIO()
    console = rich.console.Console(file=coloured, force_terminal=True, color_system="standard", width=200)
    console.print(preview(source, tokenizer, rows=1, coloured=True))
    assert "\x1b[30;42m1<|im_end|>\x1b[0m" in coloured.getvalue() and "⟦" not in coloured.getvalue()


def test_a_preview_of_text_that_looks_like_markup(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "[red]é[/red] 🙂"}))
    source = open_text(TextData(path=str(tmp_path / "a.jsonl"), length=64), ByteTokenizer()).source(0)
    assert "<|bos|>⟦[red]é[/red] 🙂<|im_end|>⟧" in preview(source, ByteTokenizer(), rows=1).plain


def test_ids_outside_of_the_vocabulary_are_refused(tmp_path):
    class Wild(ByteTokenizer):
        def encode_batch(self, texts, special=False):
            return [dataclasses.replace(one, ids=one.ids + 5) for one in super().encode_batch(texts, special)]

    with pytest.raises(UserError, match="ids outside of its vocabulary of 260"):
        open_text(TextData(path=texts(tmp_path / "a.jsonl")), Wild())


READ = """
import hashlib, sys
from jaxops.data.text.open import open_text
from jaxops.data.text.open_tokenizer import open_tokenizer
from jaxops.data.text.spec import ChatData, MixtureData, Share, TextData
chat = ChatData(path=sys.argv[1], length=64, valid=Share(share=0.2), weight=3)
data = open_text(MixtureData(sources=(chat, TextData(path=sys.argv[2], length=64))), open_tokenizer(sys.argv[3]))
found = hashlib.sha256()
for name, values in sorted(data.source(7).batch(int(sys.argv[4]), 50).items()):
    found.update(name.encode() + values.tobytes())
print(data.inspection["digest"], found.hexdigest())
"""


def test_processes_read_the_same_whatever_their_hashes(tmp_path):
    given = [chats(tmp_path / "a.jsonl"), texts(tmp_path / "b.jsonl"), TINY, "333"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", READ, *given],
            env=os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed, threads in (("1", "1"), ("2", "4"))
    ]
    one, other = (process.communicate(timeout=120)[0] for process in started)
    assert one == other and len(one.split()) == 2


def test_rows_do_not_depend_on_how_many_texts_are_tokenised_at_once(tmp_path, monkeypatch):
    path = texts(tmp_path / "a.jsonl")
    whole = open_text(TextData(path=path, length=32), open_tokenizer(TINY)).inspection["digest"]
    monkeypatch.setattr("jaxops.data.text.documents.AT_ONCE", 7)
    assert open_text(TextData(path=path, length=32), open_tokenizer(TINY)).inspection["digest"] == whole
