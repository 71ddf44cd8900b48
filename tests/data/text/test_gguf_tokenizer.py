"""The vocabulary of a GGUF file gives the ids of the tokenizer.json that it was written from."""

import json
import pathlib

import gguf
import pytest

from jaxops.core.failures import UserError
from jaxops.data.text.gguf_tokenizer import files_of
from jaxops.data.text.hf_tokenizer import HFTokenizer
from jaxops.data.text.open_tokenizer import open_tokenizer, tokenizer_of

TINY = open_tokenizer(str(pathlib.Path(__file__).parents[2] / "fixtures" / "text" / "tiny"))
TEXTS = ["The grey cat, 1234!", " a  b\n\n c ", "é🙂", "<|im_start|>user\n<think>4</think><|im_end|>\n", ""]


def metadata(**changes):
    whole = json.loads(TINY.files["tokenizer.json"])
    words = [TINY.token(at) for at in range(TINY.vocab)]
    plain = {one["content"] for one in whole["added_tokens"] if not one["special"]}
    kinds = [3 if at in TINY.special else 4 if word in plain else 1 for at, word in enumerate(words)]
    found = {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": words,
        "ggml.token_type": kinds,
        "ggml.merges": [" ".join(pair) for pair in whole["model"]["merges"]],
        "ggml.eos_token_id": 2,
        "ggml.padding_token_id": 2,
        "ggml.bos_token_id": 0,
        "chat_template": TINY.template,
    }
    return found | changes


def made(**changes):
    return HFTokenizer(files_of(metadata(**changes).get, "my.gguf"), "my.gguf", "gguf")


def test_a_file_gives_the_same_ids_names_and_template(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    found = metadata()
    writer.add_tokenizer_model(found["ggml.model"])
    writer.add_tokenizer_pre(found["ggml.pre"])
    writer.add_token_list(found["ggml.tokens"])
    writer.add_token_types(found["ggml.token_type"])
    writer.add_token_merges(found["ggml.merges"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(found["chat_template"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    for address in (str(path), f"gguf://{path}"):
        tokenizer = open_tokenizer(address)
        assert tokenizer.kind == "gguf" and tokenizer.vocab == TINY.vocab and tokenizer.template == TINY.template
        assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.stops) == (0, 2, 2, (2,))
        assert [tokenizer.encode(text) for text in TEXTS] == [TINY.encode(text) for text in TEXTS]
        assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
        assert tokenizer.special == TINY.special
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"tiny.gguf: not a GGUF file, or not whole"):
        open_tokenizer(str(path))


def test_begin_tokens_and_ends_of_turns():
    begun = made(**{"ggml.add_bos_token": True, "ggml.eot_token_id": 1})
    assert begun.encode("cat", special=True) == [0, *TINY.encode("cat")] and begun.encode("cat") == TINY.encode("cat")
    assert begun.stops == (2, 1) and tokenizer_of(begun.files, "run").stops == (2, 1)


@pytest.mark.parametrize(
    "cut, text, words",
    [
        ("smollm", "a 123", ["a", " ", "1", "2", "3"]),
        ("qwen2", "a 123x", ["a", " ", "1", "2", "3", "x"]),
        ("llama-bpe", "DON'T 12345\n\n x", ["DON", "'T", " ", "123", "45", "\n\n", " x"]),
    ],
)
def test_each_family_cuts_text_in_its_own_way(cut, text, words):
    whole = json.loads(made(**{"ggml.pre": cut}).files["tokenizer.json"])
    assert whole["model"]["ignore_merges"] == (cut == "llama-bpe")
    inner = made(**{"ggml.pre": cut})._inner
    assert [text[a:b] for _, (a, b) in inner.pre_tokenizer.pre_tokenize_str(text)] == words


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ggml.model": "llama"}, "its vocabulary is of the sort 'llama'; only byte-level BPE"),
        ({"ggml.pre": "qwen3"}, "cuts text in the way 'qwen3'; did you mean 'qwen2'"),
        ({"ggml.token_type": [1]}, "362 tokens and 1 kinds of tokens"),
        ({"ggml.tokens": ["a", "a"], "ggml.token_type": [1, 1]}, "a token twice"),
        ({"ggml.merges": ["no such"]}, "do not go together"),
        ({"ggml.eos_token_id": 9999}, "the eos token is 9999, and the vocabulary has 362"),
    ],
)
def test_a_vocabulary_that_cannot_be_read(changes, message):
    with pytest.raises(UserError, match=message):
        made(**changes)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no GGUF file"):
        open_tokenizer(str(tmp_path / "x.gguf"))
