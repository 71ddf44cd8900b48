"""A vocabulary made out of the texts of training: byte pairs, for models that begin with nothing (extra `lm`)."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxops.core.failures import UserError
from jaxops.data.text.byte_tokenizer import ByteTokenizer
from jaxops.data.text.hf_tokenizer import HFTokenizer

BYTES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedTokenizer:
    """A vocabulary of byte pairs (Sennrich et al. 2016) out of the texts of training, which knows every text.

    Attributes:
      vocab: the number of ids, the 256 bytes and the marks of conversations among them.
      lowercase: capital letters are read as small ones.
    """

    kind: Literal["trained"] = "trained"
    vocab: Annotated[int, Field(ge=300, le=1_000_000)] = 4096
    lowercase: bool = False

    def build(self, texts: Sequence[str]) -> HFTokenizer:
        """Makes the vocabulary; the same texts in the same order give the same one.

        Raises:
          UserError: the package `tokenizers` is missing.
        """
        try:
            from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
        except ImportError:
            raise UserError("tokenizer.kind trained needs the package tokenizers: pip install 'jaxops[lm]'") from None
        marks = ByteTokenizer()
        special = [marks.token(one) for one in range(BYTES, marks.vocab)]
        inner = Tokenizer(models.BPE())
        if self.lowercase:
            inner.normalizer = normalizers.Lowercase()
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(_pieces(texts), trainer)
        named = {"eos_token": marks.words["eos_token"], "pad_token": marks.words["pad_token"]}
        config: dict[str, Any] = {**named, "chat_template": marks.template}
        files = {"tokenizer.json": inner.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
        return HFTokenizer(files, "the tokenizer of the texts of training")


def _pieces(texts: Sequence[str], size: int = 1024) -> Iterator[list[str]]:
    for at in range(0, len(texts), size):
        yield list(texts[at : at + size])
