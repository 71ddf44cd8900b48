"""The tokenizer of bytes: ids 0 to 255 are UTF-8, four more are marks. It needs no file, no package and no training."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxops.core.failures import UserError
from jaxops.data.text.tokenizer import EncodedText, check_added, digest_of, encoded

MARKS = ("<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>")
"""The marks from id 256 on. What ends a turn ends a text too, so a model learns to stop from either."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class ByteTokenizer:
    """A `Tokenizer` whose ids are bytes and the marks <|bos|>, <|im_end|> (the end), <|pad|> and <|im_start|>.

    `files` hold the same vocabulary as Hugging Face writes it, so that an exported model opens elsewhere.

    Args:
      added: further special tokens, from id 260 on.
      template: the chat template.
    """

    kind: str = "bytes"
    bos: int | None = 256
    eos: int | None = 257
    pad: int | None = 258
    stops: tuple[int, ...] = (257,)

    def __init__(self, added: Sequence[str] = (), template: str = TEMPLATE) -> None:
        self.template: str | None = template
        self._marks = (*MARKS, *added)
        self.vocab = 256 + len(self._marks)
        self.special = frozenset(range(256, self.vocab))
        self.words: Mapping[str, str] = {"bos_token": MARKS[0], "eos_token": MARKS[1], "pad_token": MARKS[2]}
        self._ids = {mark: 256 + at for at, mark in enumerate(self._marks)}
        longest_first = sorted(self._marks, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.files: Mapping[str, bytes] = _files(self._marks, added, template)
        self.digest = digest_of({"tokenizer.json": self.files["tokenizer.json"]})

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Returns the ids of a text; with `special`, after <|bos|>."""
        ids: list[int] = [256] if special else []
        for at, part in enumerate(self._split.split(text)):
            ids += [self._ids[part]] if at % 2 else encoded(part)
        return ids

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[EncodedText]:
        """Returns the ids of each text and the characters that they stand for."""
        return [self._encoded(text, special) for text in texts]

    def _encoded(self, text: str, special: bool) -> EncodedText:
        begin = [np.array([256])] if special else []
        ids, starts, ends, at = [*begin], [np.zeros(len(begin))], [np.zeros(len(begin))], 0
        for number, part in enumerate(self._split.split(text)):
            if number % 2:
                ids.append(np.array([self._ids[part]]))
                starts.append(np.array([at]))
                ends.append(np.array([at + len(part)]))
            else:
                ids.append(np.frombuffer(encoded(part), np.uint8))
                leads = (ids[-1] & 0xC0) != 0x80  # every byte of a character but the first is 10xxxxxx
                starts.append(at + np.cumsum(leads) - 1)
                ends.append(starts[-1] + 1)
            at += len(part)
        joined = lambda parts: np.concatenate(parts).astype(np.int32)
        return EncodedText(joined(ids), joined(starts), joined(ends))

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Returns the text of ids; bytes that are no UTF-8 become U+FFFD."""
        out, run = [], bytearray()
        for index in [*ids, None]:
            if index is not None and 0 <= index < 256:
                run.append(index)
                continue
            out.append(run.decode("utf-8", "replace"))
            run = bytearray()
            if index is not None and not skip_special:
                out.append(self.token(index))
        return "".join(out)

    def token(self, index: int) -> str:
        """Returns a mark by its name and a byte as `<0x41>`.

        Raises:
          UserError: there is no such id.
        """
        if not 0 <= index < self.vocab:
            raise UserError(f"the tokenizer of bytes has no id {index}; it has 0 to {self.vocab - 1}")
        return f"<0x{index:02X}>" if index < 256 else self._marks[index - 256]

    def with_tokens(self, tokens: Sequence[str]) -> "ByteTokenizer":
        """Returns a tokenizer that has these special tokens too.

        Raises:
          UserError: a token is empty, or no Unicode text.
        """
        check_added(tokens)
        assert self.template is not None
        return ByteTokenizer(tuple(dict.fromkeys([*self._marks, *tokens]))[len(MARKS) :], self.template)

    def with_template(self, template: str) -> "ByteTokenizer":
        """Returns a tokenizer with another chat template."""
        return ByteTokenizer(self._marks[len(MARKS) :], template)


def _files(marks: Sequence[str], added: Sequence[str], template: str) -> dict[str, bytes]:
    """Writes the vocabulary as a byte-level BPE without merges, which gives the same ids."""
    vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
    level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokens = [
        {"id": 256 + at, "content": mark, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for at, mark in enumerate(marks)
    ]
    begin: dict[str, Any] = {"SpecialToken": {"id": MARKS[0], "type_id": 0}}
    post: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {MARKS[0]: {"id": MARKS[0], "ids": [256], "tokens": [MARKS[0]]}},
    }
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    model |= {"vocab": vocabulary, "merges": []}
    whole: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": None,
    }
    whole |= {"pre_tokenizer": level, "post_processor": post, "decoder": level, "model": model}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": MARKS[0],
        "eos_token": MARKS[1],
        "pad_token": MARKS[2],
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
        "jaxops": {"kind": "bytes", "added": list(added)},
    }
    return {
        "tokenizer.json": json.dumps(whole, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
    }


def _letters() -> list[str]:
    """Returns the letter that byte-level vocabularies write for each byte: itself where it prints, else from U+0100."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printing else chr(next(others)) for byte in range(256)]
