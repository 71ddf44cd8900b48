"""`sample` and `chat` on runs that learnt a few sentences by heart: prompts, answers, streams, and bad input."""

import io
import json

import pyarrow.parquet as pq
import pytest

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.run.pretrained.options import Generate

CONFIG = """\
task: language
data: {{kind: {kind}, path: {folder}/{kind}.jsonl, length: 64}}
model: {{kind: decoder, dim: 32, layers: 1, heads: 2, length: 96}}
tokenizer: bytes
optimizer: {{kind: adamw, lr: 3e-2}}
batch: {{global: 8}}
run: {{name: {kind}, dir: {folder}/runs, steps: {steps}, loggers: []}}
"""


def turns(number):
    return [
        {"role": "user", "content": f"say {number}"},
        {"role": "assistant", "content": "ja, grün €"},
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two runs: `chat`, which answers `ja, grün €`, and `text`, which knows the alphabet."""
    folder = tmp_path_factory.mktemp("writing")
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": turns(at % 4)}) + "\n" for at in range(16)))
    (folder / "text.jsonl").write_text('{"text": "abcdefghij"}\n' * 16)
    for kind, steps in (("chat", 50), ("text", 90)):
        config = folder / f"{kind}.yaml"
        config.write_text(CONFIG.format(kind=kind, folder=folder, steps=steps))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jaxops.run.summary.write_report", lambda *_, **__: None, raising=False)
            jx.fit(jx.build_task(jx.load_config(str(config))), quiet=True)
    return folder / "runs"


@pytest.fixture(scope="module")
def chat(runs):
    return jx.load(runs / "chat")


def test_a_text_is_a_users_turn_where_the_run_learnt_to_answer(chat):
    table = chat.generate(["say 1", "say 3"], temperature=0, max_tokens=30)
    assert table["completion"].to_pylist() == ["ja, grün €"] * 2
    assert table["stopped"].to_pylist() == ["eos", "eos"]
    assert table["tokens"].to_pylist() == [len("ja, grün €".encode()) + 1] * 2
    assert all(-5 < logprob < 0 for logprob in table["logprob"].to_pylist())


def test_prompts_keep_their_columns_and_conversations_their_last_question(chat, tmp_path):
    rows = [
        {"id": "a", "messages": turns(0)},
        {"id": "b", "messages": [*turns(1), turns(2)[0]], "completion": "x"},
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    table = chat.generate(path, n=2, temperature=0.5, max_tokens=20, seed=1, say=said.append)
    found = table.to_pylist()
    assert [(row["id"], row["copy"]) for row in found] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert found[2]["given_completion"] == "x" and found[0]["completion"].startswith("ja")
    assert said == ["conversations that end with the assistant are asked without that last turn"]
    again = chat.generate(path, n=2, temperature=0.5, max_tokens=20, seed=1)
    assert again.to_pylist() == found
    assert chat.generate(["say 0"], template="none", temperature=0, max_tokens=4)["completion"][0].as_py() != "ja, "


def test_a_run_of_plain_text_goes_on_from_the_prompt(runs):
    model = jx.load(runs / "text")
    table = model.generate(["abc"], temperature=0, max_tokens=40)
    assert table["completion"][0].as_py() == "defghij"
    parts = []
    talk = model.chat(temperature=0)
    assert talk.answer("abcdef", parts.append) == "ghij" == "".join(parts)


def sampled(capsys, *given):
    status = main(["sample", *map(str, given)])
    out, err = capsys.readouterr()
    return status, out, err


def test_sample_prints_and_writes(runs, capsys, tmp_path):
    run = runs / "chat"
    status, out, err = sampled(capsys, run, "--prompt", "say 2", "--temperature", 0, "--max-tokens", 30, "--stop", "ü")
    assert (status, out, err) == (0, "ja, gr\n", "")
    (tmp_path / "asked.txt").write_text("say 0\n\nsay 1\n")
    target = tmp_path / "out.parquet"
    flags = ["--n", 2, "--temperature", ".1", "--top-p", ".9", "--max-tokens", 30, "--seed", 0]
    status, out, err = sampled(
        capsys, run, "--prompts", tmp_path / "asked.txt", "--out", target, *flags, "--stop", "grün", "--stop", "zz"
    )
    assert (status, out, err) == (0, f"4 completions -> {target}\n", "")
    table = pq.read_table(target)
    assert table["prompt"].to_pylist() == ["say 0", "say 0", "say 1", "say 1"]
    assert table["completion"].to_pylist() == ["ja, "] * 4
    assert table["stopped"].to_pylist() == ["stop"] * 4


def test_chat_streams_whole_characters_keeps_history_and_goes_on_after_a_mistake(runs, capsys, monkeypatch):
    lines = "say 1\n\nsay 2\nsay 3\nsay 4\n/reset\n/restart\nsay 3\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", str(runs / "chat"), "--temperature", "0", "--max-tokens", "20"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ja, grün €\n") and out.endswith("ja, grün €\n") and "\ufffd" not in out
    told = err.splitlines()
    assert "but the model reads 96 at most; /reset begins a new one" in told[0]
    assert told[-1].startswith("jaxops: no command /restart; /reset")


@pytest.mark.parametrize(
    ("content", "given", "told"),
    [
        (None, ["--prompt", "x" * 100], "prompt 0: the prompt has"),
        (None, ["--prompt", " "], "prompt 0: the prompt is empty"),
        (
            None,
            ["--prompt", "x", "--temperature", "-1"],
            "temperature [override 'temperature=-1']: must be at least 0, got -1",
        ),
        (None, ["--prompt", "x", "--top-p", "0"], "top_p=0']: must be at least 1e-30, got 0"),
        (None, ["--prompt", "x", "--top-p", "1.1"], "must be at most 1, got 1.1"),
        (None, ["--prompt", "x", "--max-token", "3"], "did you mean"),
        (None, ["--prompt", "x", "--room", "5"], "room: 5 tokens, but the longest prompt has"),
        (None, [], "one of the arguments --prompts --prompt is required"),
        (None, ["--prompt", "x", "--out", "answers.txt"], "nothing writes .txt files"),
        ('{"promt": "x"}', [], ":1: no column 'prompt' or 'messages' (there are: promt); did you mean 'prompt'?"),
        ('{"prompt": "x"}\n{"prompt": ""}', [], ":2: the prompt is empty"),
        ('{"messages": [{"role": "usr", "content": "x"}]}', [], "unknown role 'usr'; did you mean 'user'?"),
        ('{"messages": []}', [], "has no message"),
        ("[1]", [], "expected a JSON object a line"),
        ("", [], "no prompt in"),
    ],
)
def test_bad_input_is_one_message(runs, tmp_path, capsys, content, given, told):
    if content is not None:
        (tmp_path / "asked.jsonl").write_text(content)
        given = ["--prompts", tmp_path / "asked.jsonl"]
    status, out, err = sampled(capsys, runs / "chat", *given)
    assert (status, out) == (2, "")
    assert told in err and err.startswith("jaxops: ") and "Traceback" not in err


def test_options_out_of_range_and_empty_prompts_from_python(chat):
    with pytest.raises(UserError, match="temperature: expected 0"):
        chat.generate(["x"], Generate(temperature=-1.0))
    with pytest.raises(UserError, match="there is no prompt"):
        chat.generate([])
    with pytest.raises(UserError, match="nothing was said"):
        chat.chat().answer("  ", print)


def test_a_family_that_writes_no_text_says_so(runs, capsys, monkeypatch):
    monkeypatch.setattr("jaxops.run.load.saved_family", lambda *_: jx.run.family.family_of("rec"))
    for command in (["sample", "--prompt", "x"], ["chat"]):
        assert main([command[0], str(runs / "chat"), *command[1:]]) == 2
        assert f"jaxops {command[0]}: the model of {runs / 'chat'} writes no text" in capsys.readouterr().err
