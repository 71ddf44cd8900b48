"""Tokenizers: what text becomes before a model sees it, whatever wrote the vocabulary.

Three kinds: `bytes` (no file and no dependency), a folder with the `tokenizer.json` of Hugging Face (extra `lm`), and
the vocabulary inside a GGUF file (extra `gguf`). `open_tokenizer.py` opens each by its address.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int32

from jaxops.core.failures import UserError
from jaxops.data import notes

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""The files that a tokenizer is made of and that an exported model needs."""
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>")
"""Words that end a turn in every vocabulary that has them as special tokens; others need a generation_config.json."""


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedText:
    """The tokens of one text, and the characters `[start, end)` of the text that each of them stands for.

    A token that stands for no character, such as one that was put before the text, has `start == end`.
    """

    ids: Int32[np.ndarray, " tokens"]
    start: Int32[np.ndarray, " tokens"]
    end: Int32[np.ndarray, " tokens"]

    def inside(self, spans: Sequence[tuple[int, int]]) -> np.ndarray:
        """Returns, for each token, whether it stands for a character of one of the spans, in part or in full."""
        found = np.zeros(len(self.ids), bool)
        end = np.maximum(self.end, self.start + 1)
        for start, stop in spans:
            if stop > start:
                found |= (self.start < stop) & (end > start)
        return found


class Tokenizer(Protocol):
    """A vocabulary and the way from text to its ids and back.

    Attributes:
      kind: the word for it in messages: `bytes`, `tokenizer.json`, `gguf`.
      vocab: one more than the largest id.
      bos: the id that begins a text; None where the vocabulary has none.
      eos: the id that ends a text.
      pad: the id that fills rows. It may equal `eos`: what is padding is never told by an id.
      stops: every id that ends what a model writes, `eos` first.
      special: ids of control tokens, which stand for no text of a user's.
      words: the variables that chat templates read: bos_token, eos_token and so on.
      template: the chat template that came with the vocabulary.
      digest: differs where a text could become other ids.
      files: everything that rebuilds it (`open_tokenizer.tokenizer_of`) and that an exported model needs, by name.
    """

    kind: str
    vocab: int
    bos: int | None
    eos: int | None
    pad: int | None
    stops: tuple[int, ...]
    special: frozenset[int]
    words: Mapping[str, str]
    template: str | None
    digest: str
    files: Mapping[str, bytes]

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Returns the ids of a text; with `special`, with those that the vocabulary puts around every text."""
        ...

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[EncodedText]:
        """Returns the ids of each text and the characters that they stand for."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Returns the text of ids; bytes that are no UTF-8 become U+FFFD."""
        ...

    def token(self, index: int) -> str:
        """Returns the name of an id as the vocabulary spells it."""
        ...

    def with_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """Returns a tokenizer that has these as special tokens too; new ones get the ids from `vocab` on."""
        ...

    def with_template(self, template: str) -> "Tokenizer":
        """Returns a tokenizer with another chat template, which its `files` hold too."""
        ...


def check_vocabulary(tokenizer: Tokenizer, rows: int, model: str = "the model") -> None:
    """Refuses a tokenizer with ids that a model's embedding of `rows` rows does not have.

    Some more rows than ids are usual (vocabularies are padded); far more are told: is it the tokenizer of this model?

    Raises:
      UserError: the tokenizer has more ids than the embedding has rows.
    """
    if tokenizer.vocab > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab:,} ids and the embedding of {model} has {rows:,} rows: those "
            f"from {rows} ({tokenizer.token(rows)!r}) on have none. Either the tokenizer belongs to another model, or "
            "tokens were added and the embedding must be resized"
        )
    if rows > 1.1 * tokenizer.vocab + 1024:
        notes.tell(
            f"the tokenizer has {tokenizer.vocab:,} ids and the embedding of {model} has {rows:,} rows; "
            "is it the tokenizer of this model?"
        )


def check_added(tokens: Sequence[str]) -> None:
    """Refuses tokens that no text can hold.

    Raises:
      UserError: a token is empty, or no Unicode text.
    """
    for token in tokens:
        if not token:
            raise UserError("an added token is empty; each needs a character or more")
        encoded(token, "an added token")


def encoded(text: str, what: str = "a text") -> bytes:
    """Returns the UTF-8 of a text.

    Raises:
      UserError: it holds half of a character, which has none.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds {text[error.start]!a}, half of a character, which is no Unicode text") from None


def digest_of(files: Mapping[str, bytes]) -> str:
    """Returns a digest of files by name and content."""
    found = hashlib.sha256()
    for name in sorted(files):
        found.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    return found.hexdigest()


def json_object(content: bytes, name: str) -> dict:
    """Reads a JSON object.

    Raises:
      UserError: it is none.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{name}: not JSON ({error}); is the file whole?") from None
    except RecursionError:
        raise UserError(f"{name}: brackets within brackets, too deep to be read; is the file damaged?") from None
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected a JSON object, got {str(value)[:40]!r}")
    return value
