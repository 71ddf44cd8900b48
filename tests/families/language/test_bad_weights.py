"""Weights, tokenizers, templates and texts that nothing can be trained on: one message each, and exit status 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import WORDS, write_gguf

from jaxops.cli.main import main
from jaxops.core.safetensors import open_safetensors, save_safetensors
from jaxops.core.sharding import named_leaves
from jaxops.core.weights import with_arrays
from jaxops.data.text.open_tokenizer import open_tokenizer
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import build_decoder
from jaxops.models.decoder.pretrained import save_pretrained

CONFIG = """
task: language
model: {weights: model}
data: {kind: chat, path: chat.jsonl, length: 48}
batch: {global: 8}
run: {name: bad, steps: 1, loggers: []}
"""
MODEL = "model.safetensors"
TURNS = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red!"}]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a config, conversations, and a model in two shards with its tokenizer."""
    folder = tmp_path_factory.mktemp("good")
    words = open_tokenizer(str(WORDS))
    decoder = build_decoder(Architecture(dim=16, layers=1, heads=2, hidden=32, length=64), words.vocab)
    draw = np.random.default_rng(0)
    arrays = {path: draw.normal(size=x.shape).astype(np.float32) for path, x in named_leaves(decoder.shapes)}
    save_pretrained(folder / "model", decoder.config, with_arrays(decoder.shapes, arrays))
    for name, content in words.files.items():
        (folder / "model" / name).write_bytes(content)
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": TURNS}) + "\n" for _ in range(20)))
    (folder / "own.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def folder(good, tmp_path, monkeypatch):
    shutil.copytree(good, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def told(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What `train` says of a config that is wrong."""
    assert main(["train", "own.yaml", *overrides]) == 2
    error = capsys.readouterr().err
    assert error.count("jaxops: ") == 1 and "Traceback" not in error and not Path("runs").exists()
    return error


def config_json(**changes: object) -> Callable[[], None]:
    def change() -> None:
        path = Path("model/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(edit: Callable[[dict[str, np.ndarray]], object]) -> Callable[[], None]:
    def change() -> None:
        held = {name: np.array(x) for name, x in open_safetensors("model").items()}
        edit(held)
        Path("model", MODEL).unlink()
        save_safetensors(Path("model", MODEL), held, {})

    return change


def truncated(path: str) -> Callable[[], None]:
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:-100])


def shards() -> None:
    Path("model", MODEL).rename("model/model-00001-of-00002.safetensors")
    names = [*open_safetensors("model/model-00001-of-00002.safetensors")]
    places = {name: f"model-0000{1 + (name == names[-1])}-of-00002.safetensors" for name in names}
    Path("model/model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def text(path: str, content: str) -> Callable[[], None]:
    return lambda: Path(path).write_text(content)


def removed(path: str) -> Callable[[], None]:
    return lambda: Path(path).unlink()


def infinite(held: dict[str, np.ndarray], value: float = np.nan) -> None:
    held["model.norm.weight"][3] = value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(config_json(model_type="lama"), "did you mean 'llama'", id="unknown architecture"),
        pytest.param(config_json(num_hidden_layers=2), "are missing", id="layers that are not there"),
        pytest.param(config_json(hidden_size=32), "other shapes", id="another width"),
        pytest.param(
            config_json(rope_scaling={"rope_type": "magic"}), "rope: type 'magic' is not known", id="unknown rope"
        ),
        pytest.param(config_json(vocab_size=100), "is [362, 16], expected [100, 16]", id="smaller vocabulary"),
        pytest.param(config_json(max_position_embeddings=32), "reads 32 at most", id="shorter rows"),
        pytest.param(text("model/config.json", "{"), "is no JSON", id="config cut off"),
        pytest.param(removed("model/config.json"), "config.json: there is no such file", id="no config"),
        pytest.param(truncated(f"model/{MODEL}"), "is truncated", id="truncated weights"),
        pytest.param(shards, "which is not there", id="missing shard"),
        pytest.param(removed(f"model/{MODEL}"), "no safetensors", id="no weights"),
        pytest.param(
            tensors(lambda held: held.pop("model.norm.weight")), "are missing: model.norm.weight", id="missing tensor"
        ),
        pytest.param(tensors(lambda held: held.update(more=np.zeros(3))), "has not: more", id="left over"),
        pytest.param(tensors(infinite), "not finite", id="NaN"),
        pytest.param(tensors(lambda held: infinite(held, np.inf)), "not finite", id="infinity", marks=pytest.mark.slow),
        pytest.param(removed("model/tokenizer.json"), "model: no tokenizer.json", id="no tokenizer"),
        pytest.param(text("model/tokenizer.json", "{}"), "tokenizer.json: not a tokenizer", id="broken tokenizer"),
        pytest.param(text("model/tokenizer_config.json", "[]"), "tokenizer_config.json", id="odd tokenizer config"),
        pytest.param(text("chat.jsonl", ""), "no example in chat.jsonl", id="empty file"),
        pytest.param(
            text("chat.jsonl", '{"messages": []}\n'), "chat.jsonl:1: column 'messages' has no message", id="no turns"
        ),
        pytest.param(
            text("chat.jsonl", '{"messages": [{"role": "me", "content": "a"}]}\n'), "unknown role 'me'", id="odd role"
        ),
        pytest.param(
            text("chat.jsonl", '{"messages": [{"role": "user"}]}\n'), "the user turn has no content", id="no content"
        ),
        pytest.param(text("chat.jsonl", '{"messages": \n'), "chat.jsonl:1: not JSON", id="not JSON"),
        pytest.param(
            text("chat.jsonl", json.dumps({"messages": TURNS[:1]})), "has no assistant turn", id="nobody answers"
        ),
    ],
)
def test_what_cannot_be_trained_on_is_told(folder, capsys, change, said):
    change()
    assert said in told(capsys)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}", "mine.jinja, line 1: Unexpected end of template"),
        ("{{ raise_exception('never') }}", "chat.jsonl:1: mine.jinja refuses the conversation: never"),
        ("{{ messages[7].content }}", "chat.jsonl:1: mine.jinja fails: UndefinedError"),
        ("{{ messages.__class__ }}", "chat.jsonl:1: mine.jinja marks nothing of the conversation"),
    ],
)
def test_a_template_that_fails_is_told(folder, capsys, template, said):
    Path("mine.jinja").write_text(template)
    assert said in told(capsys, "data.template=mine.jinja")


@pytest.mark.parametrize(
    ("rows", "override", "said"),
    [
        ('{"prompt": "a", "completion": ""}', "data.length=48", "pairs.jsonl:1: column 'completion' is empty"),
        ('{"prompt": "a", "completion": null}', "data.length=48", "pairs.jsonl:1: column 'completion' is null"),
        (
            '{"prompt": "a b c d e f g h i j", "completion": "k"}',
            "data.length=8",
            "within data.length 8; the longest has",
        ),
        ('{"prompt": "a"}', "data.length=48", "pairs.jsonl:1: no column 'completion'"),
    ],
)
def test_a_completion_that_nothing_is_learnt_from_is_told(folder, capsys, rows, override, said):
    Path("pairs.jsonl").write_text(rows + "\n")
    assert said in told(capsys, "data={kind: completion, path: pairs.jsonl, length: 48}", override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("add_tokens=[<a>, <b>]", "has 364 ids and the embedding of model has 362 rows"),
        ("model.lora={match: nothing}", "'nothing' matches no kernel"),
        ("model.lora={rank: 64}", "64 is not below the sides of"),
        ("model.weights=tiny.gguf", "tiny.gguf is no GGUF file, or is damaged"),
        ("model.weights=model/config.json", "model/config.json: there is no such folder"),
        ("model.dropout=1", "model.dropout"),
    ],
)
def test_options_that_do_not_go_with_the_weights_are_told(folder, capsys, override, said):
    write_gguf(Path("tiny.gguf"))
    truncated("tiny.gguf")()
    assert said in told(capsys, override)
