"""The vocabulary inside a GGUF file, made into the tokenizer.json that the rest of the house reads (extra `gguf`)."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxops.core.failures import UserError, nearest
from jaxops.data.text.hf_tokenizer import HFTokenizer, imported_tokenizers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
"""How these families cut text before merging; Llama takes up to three digits together and Qwen one."""
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Kinds of tokens in GGUF."""


def read_gguf_tokenizer(path: Path) -> HFTokenizer:
    """Reads the tokenizer of a GGUF file.

    Raises:
      UserError: no such file, no GGUF, no vocabulary of byte-level BPE in it, or a package is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("a GGUF file is read by a package that is not installed: pip install 'jaxops[gguf]'") from error
    if not path.is_file():
        raise UserError(f"no GGUF file {path}")
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # `gguf` raises whatever numpy raises on a file that is cut or is none
        raise UserError(f"{path}: not a GGUF file, or not whole ({error})") from None
    read = lambda name: reader.fields[name].contents() if name in reader.fields else None
    return HFTokenizer(files_of(lambda name: read(f"tokenizer.{name}"), str(path)), str(path), kind="gguf")


def files_of(read: Callable[[str], Any], name: str) -> dict[str, bytes]:
    """Returns the files of a tokenizer.

    Args:
      read: returns the metadata `tokenizer.NAME`, None where there is none.
      name: names the file in messages.

    Raises:
      UserError: the vocabulary is of a sort that is not read.
    """
    tokenizers = imported_tokenizers()
    sort, cut = read("ggml.model"), read("ggml.pre") or "default"
    if sort != "gpt2":
        raise UserError(
            f"{name}: its vocabulary is of the sort {sort!r}; only byte-level BPE ('gpt2') is read from GGUF. "
            "Give the folder of the model with its tokenizer.json"
        )
    words, merges = read("ggml.tokens") or [], read("ggml.merges") or []
    kinds = read("ggml.token_type") or [1] * len(words)
    if not words or len(kinds) != len(words):
        raise UserError(f"{name}: {len(words)} tokens and {len(kinds)} kinds of tokens; the file is damaged")
    if len(set(words)) != len(words):
        raise UserError(f"{name}: the vocabulary has a token twice")
    try:
        model = tokenizers.models.BPE(
            {word: at for at, word in enumerate(words)},
            [tuple(merge.split(" ")) for merge in merges],
            ignore_merges=cut in ("llama-bpe", "llama3"),
        )
    except Exception as error:  # `tokenizers` raises a bare Exception for a merge of unknown tokens
        raise UserError(f"{name}: the vocabulary and its merges do not go together ({error})") from None
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = _cutting(tokenizers, cut, name)
    if cut == "qwen2":
        inner.normalizer = tokenizers.normalizers.NFC()
    inner.decoder = tokenizers.decoders.ByteLevel()
    added = lambda kind: [word for word, one in zip(words, kinds, strict=True) if one == kind]
    plain = [tokenizers.AddedToken(word, normalized=False) for word in added(USER_DEFINED)]
    inner.add_tokens(plain)
    inner.add_special_tokens([tokenizers.AddedToken(word, normalized=False, special=True) for word in added(CONTROL)])
    named = {which: _named(read, which, words, name) for which in ("bos", "eos", "padding", "unknown", "eot")}
    if read("ggml.add_bos_token") and named["bos"] is not None:
        begin = named["bos"]
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, words.index(begin))]
        )
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    keys = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    config |= {key: named[which] for which, key in keys.items() if named[which] is not None}
    config |= {"chat_template": read("chat_template")} if read("chat_template") else {}
    files = {"tokenizer.json": inner.to_str().encode(), "tokenizer_config.json": json.dumps(config, indent=2).encode()}
    if named["eot"] is not None:
        stops = [words.index(named[which]) for which in ("eos", "eot") if named[which] is not None]
        files["generation_config.json"] = json.dumps({"eos_token_id": stops}).encode()
    return files


def _named(read: Callable[[str], Any], which: str, words: Sequence[str], name: str) -> str | None:
    index = read(f"ggml.{which}_token_id")
    if index is not None and not 0 <= index < len(words):
        raise UserError(f"{name}: the {which} token is {index}, and the vocabulary has {len(words)}")
    return None if index is None else words[index]


def _cutting(tokenizers: Any, cut: str, name: str) -> Any:
    """Returns how a text is cut into words before merging.

    Raises:
      UserError: a way that is not known. Another one in its place would give other ids, and nobody would see it.
    """
    made = tokenizers.pre_tokenizers
    words = made.ByteLevel(add_prefix_space=False, use_regex=True)
    letters = made.ByteLevel(add_prefix_space=False, use_regex=False)
    split = lambda pattern: made.Sequence([made.Split(tokenizers.Regex(pattern), "isolated"), letters])
    known = {
        "gpt-2": words,
        "smollm": made.Sequence([made.Digits(individual_digits=True), words]),
        "llama-bpe": split(LLAMA3),
        "llama3": split(LLAMA3),
        "qwen2": split(QWEN2),
    }
    if cut not in known:
        raise UserError(
            f"{name}: it cuts text in the way {cut!r}{nearest(cut, known)} (known: {', '.join(known)}). Give the "
            "folder of the model with its tokenizer.json"
        )
    return known[cut]
