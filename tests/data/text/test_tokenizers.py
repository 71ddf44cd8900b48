"""Tokenizers: bytes and tokenizer.json agree with each other and with their own files; mistakes are told in words."""

import builtins
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxops.core.failures import UserError
from jaxops.data import notes
from jaxops.data.text.byte_tokenizer import ByteTokenizer
from jaxops.data.text.hf_tokenizer import HFTokenizer
from jaxops.data.text.open_tokenizer import open_tokenizer, tokenizer_of
from jaxops.data.text.tokenizer import EncodedText, check_vocabulary

TINY = pathlib.Path(__file__).parents[2] / "fixtures" / "text" / "tiny"
TEXTS = st.lists(
    st.sampled_from(["<|im_start|>", "<|im_end|>", "<|bos|>", "<think>", "é", "🙂", "e\u0301", " ", "\n", "the", "."]),
    max_size=12,
).map("".join)


def tiny_files(**changes):
    """The files of the tiny tokenizer, with entries of its config changed (None: left out)."""
    files = {path.name: path.read_bytes() for path in TINY.iterdir()}
    config = json.loads(files["tokenizer_config.json"]) | changes
    config = {key: value for key, value in config.items() if value is not None}
    return files | {"tokenizer_config.json": json.dumps(config).encode()}


@pytest.mark.parametrize("special", [False, True])
@given(text=TEXTS)
def test_bytes_are_what_their_own_tokenizer_json_says(text, special):
    """An exported model opens elsewhere with the same ids."""
    ours, written = ByteTokenizer(["<x>"]), HFTokenizer(ByteTokenizer(["<x>"]).files, "bytes")
    (one,), (other,) = ours.encode_batch([text], special), written.encode_batch([text], special)
    assert one.ids.tolist() == other.ids.tolist() == ours.encode(text, special)
    assert one.start.tolist() == other.start.tolist() and one.end.tolist() == other.end.tolist()
    assert ours.decode(ours.encode(text)) == text
    assert (ours.vocab, ours.bos, ours.eos, ours.pad, ours.stops) == (261, 256, 257, 258, (257,))
    assert (written.vocab, written.bos, written.eos, written.pad, written.stops) == (261, 256, 257, 258, (257,))
    assert ours.special == written.special and ours.template == written.template


@given(text=TEXTS)
def test_every_character_belongs_to_a_token(text):
    """`tokenizers` would take blanks out of a token's characters, and cut and pad as the file asks."""
    (found,) = open_tokenizer(str(TINY)).encode_batch([text])
    covered = np.zeros(len(text), bool)
    for start, end in zip(found.start, found.end, strict=True):
        covered[start:end] = True
    assert covered.all()


def test_tokens_inside_of_spans():
    """One that stands for no character belongs to what it stands before; one across an edge belongs to the span."""
    array = lambda *values: np.array(values, np.int32)
    found = EncodedText(array(7, 8, 9, 10, 11), array(0, 0, 3, 3, 6), array(0, 3, 3, 6, 9))
    assert found.inside([(3, 6)]).tolist() == [False, False, True, True, False]
    assert found.inside([(2, 4), (8, 9)]).tolist() == [False, True, True, True, True]
    assert not found.inside([(4, 4)]).any()


def test_the_file_asks_for_16_tokens_and_gets_none_of_it():
    tokenizer = open_tokenizer(str(TINY / "tokenizer.json"))
    assert json.loads((TINY / "tokenizer.json").read_text())["truncation"]["max_length"] == 16
    assert len(tokenizer.encode("cat " * 50)) > 50 and len(tokenizer.encode("cat")) < 16


def test_what_a_folder_says_about_its_tokens():
    tokenizer = open_tokenizer(str(TINY))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 2, 2)
    assert tokenizer.stops == (2,) and tokenizer.special == {0, 1, 2}
    assert tokenizer.words["eos_token"] == "<|im_end|>"
    assert tokenizer.token(tokenizer.vocab - 1) == "</think>"
    assert tokenizer.decode(tokenizer.encode("<|im_start|>it is <think>4")) == "<|im_start|>it is <think>4"
    assert tokenizer.decode(tokenizer.encode("<|im_start|>it is 4"), skip_special=True) == "it is 4"
    again = tokenizer_of(tokenizer.files, "run")
    assert again.digest == tokenizer.digest and again.template == tokenizer.template


def test_generation_config_and_the_turn_s_end_are_stops_too():
    files = tiny_files(eos_token="<|bos|>") | {"generation_config.json": b'{"eos_token_id": [0, 1, 99999]}'}
    assert HFTokenizer(files, "x").stops == (0, 1, 2)
    assert HFTokenizer(HFTokenizer(files, "x").files, "run").stops == (0, 1, 2)
    only = tiny_files() | {"config.json": b'{"eos_token_id": 1, "vocab_size": 362}'}
    kept = HFTokenizer(only, "x").files
    assert HFTokenizer(kept, "run").stops == (2, 1) and "config.json" not in kept


def test_templates_of_a_folder():
    several = [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
    assert HFTokenizer(tiny_files(chat_template=several), "x").template == "b"
    assert HFTokenizer(tiny_files(chat_template=several[:1]), "x").template == "a"
    assert HFTokenizer(tiny_files(chat_template=None), "x").template is None
    assert HFTokenizer(tiny_files() | {"chat_template.jinja": b"c"}, "x").template == "c"
    with pytest.raises(UserError, match=r"several chat templates .rag, tool. and none is called `default`"):
        HFTokenizer(tiny_files(chat_template=[several[0], {"name": "tool", "template": "b"}]), "x")


@pytest.mark.parametrize("address", ["bytes", str(TINY)])
def test_another_template_is_in_the_files_too(address):
    tokenizer = open_tokenizer(address)
    changed = tokenizer.with_template("{{ 'é' }}").with_tokens(["<x>"])
    again = tokenizer_of(changed.files, "run")
    assert changed.template == again.template == "{{ 'é' }}" != tokenizer.template
    assert json.loads(again.files["tokenizer_config.json"])["chat_template"] == "{{ 'é' }}"
    assert (again.encode("a<x>b"), again.stops) == (changed.encode("a<x>b"), tokenizer.stops)


@pytest.mark.parametrize("address", ["bytes", str(TINY)])
def test_added_tokens_get_the_next_ids_and_are_kept(address):
    tokenizer = open_tokenizer(address)
    larger = tokenizer.with_tokens(["<call>", "<|im_end|>", "<call>", "<ok>"])
    assert larger.vocab == tokenizer.vocab + 2
    assert larger.encode("a<call>b<ok>")[1::2] == [tokenizer.vocab, tokenizer.vocab + 1]
    assert larger.encode("a cat<|im_end|>") == tokenizer.encode("a cat<|im_end|>")
    assert larger.digest != tokenizer.digest and larger.special > tokenizer.special
    again = tokenizer_of(larger.files, "run")
    assert again.vocab == larger.vocab and again.encode("<ok>é") == larger.encode("<ok>é")
    with pytest.raises(UserError, match="added token is empty"):
        tokenizer.with_tokens([""])


def test_a_vocabulary_that_is_larger_than_the_model_is_refused_and_a_small_one_told():
    tokenizer = ByteTokenizer(["<a>"])
    with pytest.raises(
        UserError, match=r"has 261 ids and the embedding of SmolLM has 260 rows: those from 260 .'<a>'. on"
    ):
        check_vocabulary(tokenizer, 260, "SmolLM")
    with notes.collected() as told:
        check_vocabulary(tokenizer, 261)
        check_vocabulary(tokenizer, 320)
    assert not told
    with notes.collected() as told:
        check_vocabulary(tokenizer, 49152)
    assert "261 ids" in told[0]


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": b'{"model": '}, "tokenizer.json: not JSON"),
        ({"tokenizer.json": b"[1]"}, "expected a JSON object"),
        ({"tokenizer.json": b'{"model": {"type": "Magic"}}'}, "not a tokenizer"),
        (tiny_files(eos_token="</s>"), "eos_token is '</s>', which tokenizer.json does not have"),
        (tiny_files(eos_token=3), "eos_token is 3, expected a string"),
        (tiny_files(chat_template={"a": 1}), "chat_template is no text"),
        (tiny_files() | {"chat_template.jinja": b"\xff"}, "chat_template.jinja: no UTF-8"),
        (tiny_files(chat_template=[{"name": [1], "template": "x"}]), "chat_template is a list, of which each needs a"),
        (tiny_files(chat_template=["x"]), "chat_template is a list, of which each needs a"),
        ({"tokenizer.json": b'{"post_processor": {"processors": 5}}'}, "not a tokenizer"),
        ({"tokenizer.json": b"[" * 100_000}, "tokenizer.json: brackets within brackets"),
        ({"tokenizer_config.json": b"[" * 100_000}, "tokenizer_config.json: brackets within brackets"),
    ],
)
def test_files_that_make_no_tokenizer(files, message):
    with pytest.raises(UserError, match=message):
        tokenizer_of(files, "folder")


@pytest.mark.parametrize("added", [5, [1], None, "abc", {"a": 1}, [""], ["\ud800"]])
def test_files_of_bytes_with_no_list_of_tokens(added):
    config = {"jaxops": {"kind": "bytes", "added": added}}
    with pytest.raises(UserError, match=r"folder/tokenizer_config.json: jaxops.added"):
        tokenizer_of({"tokenizer_config.json": json.dumps(config).encode()}, "folder")


@pytest.mark.parametrize("address", ["bytes", str(TINY)])
@pytest.mark.parametrize(("token", "said"), [("", "is empty"), ("\ud800", "half of a character")])
def test_added_tokens_that_no_text_can_hold(address, token, said):
    with pytest.raises(UserError, match=f"an added token .*{said}"):
        open_tokenizer(address).with_tokens(["<x>", token])


def test_an_address_that_is_nothing(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at byte; did you mean 'bytes'"):
        open_tokenizer("byte")
    with pytest.raises(UserError, match="save_pretrained"):
        open_tokenizer(str(tmp_path))


@pytest.mark.parametrize("address", ["bytes", str(TINY)])
def test_half_a_character_is_refused_in_words(address):
    with pytest.raises(UserError, match="half of a character"):
        open_tokenizer(address).encode("a\ud83d")


def test_the_extra_is_named_where_the_package_is_missing(monkeypatch):
    real = builtins.__import__
    missing = lambda name, *rest: (
        (_ for _ in ()).throw(ImportError(name)) if name == "tokenizers" else real(name, *rest)
    )
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'jaxops\[lm\]'"):
        open_tokenizer(str(TINY))
    assert open_tokenizer("bytes").encode("a") == [97]
