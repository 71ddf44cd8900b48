"""Judgements that are read, and those that are ready to be trained on: what each kind of them gives a run."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from jaxops.data.preferences.agreement import AnnotatorAgreement
from jaxops.data.preferences.pairs import Pairs, Texts
from jaxops.data.preferences.spec import AnsweredPart, JudgementConfig
from jaxops.data.protocol import Source
from jaxops.data.text.documents import Documents, tokenise
from jaxops.data.text.formats import Example
from jaxops.data.text.spec import CompletionData, OneTextData, TextData
from jaxops.data.text.tokenizer import Tokenizer

Featured = Callable[[Texts], Texts]
"""A function that gives texts the features of a frozen model."""


class Judgements(Protocol):
    """Judgements that are read and split, before they are tokenised."""

    @property
    def words(self) -> list[str]:
        """All that is said in the texts of training."""
        ...

    def opened(
        self, tokenizer: Tokenizer, featured: Featured | None = None, *, answers: bool = False
    ) -> "OpenedJudgements":
        """Tokenises the texts.

        Args:
          tokenizer: that of the model.
          featured: gives the texts of training and those that are held out their features.
          answers: leave out what has no token of an answer to learn from, which a score of whole texts does not need.

        Raises:
          UserError: a template fails, or nothing is left to learn from.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedJudgements:
    """Judgements that are ready to be trained on.

    Attributes:
      source: given a seed, the pairs of training.
      texts: the texts of training.
      valid: the held-out pairs, or None.
      agreement: how far people agree with each other.
      inspection: plain values that describe the data, their digest among them.
    """

    source: Callable[[int], Source]
    texts: Texts
    valid: Pairs | None
    agreement: AnnotatorAgreement
    inspection: dict[str, Any]


def tokenised(config: JudgementConfig, examples: Sequence[Example], tokenizer: Tokenizer) -> Documents:
    """Turns texts into tokens, one document each; answers to prompts are marked, of ratings all is.

    Raises:
      UserError: a template fails.
    """
    form: OneTextData = TextData(path=config.path, pack=False)
    if isinstance(config, AnsweredPart):
        form = CompletionData(
            path=config.path, template=config.template, arguments=config.arguments, date=config.date, pack=False
        )
    return tokenise(form, examples, tokenizer)


def fill_id(tokenizer: Tokenizer) -> int:
    """Returns the id that stands where a row has no token; nothing reads it."""
    return next((one for one in (tokenizer.pad, tokenizer.eos) if one is not None), 0)


def inspected(
    config: JudgementConfig, tokenizer: Tokenizer, parts: dict[str, Any], remarks: list[str]
) -> dict[str, Any]:
    """Returns plain values that describe the data, with a digest of all that training and evaluation read."""
    there = {name: part for name, part in parts.items() if part is not None}
    said = [f"{config.length} {config.too_long}", *(f"{name} {_digest(part)}" for name, part in there.items())]
    found: dict[str, Any] = {
        "kind": config.kind,
        "length": config.length,
        "tokenizer": tokenizer.digest,
        "digest": hashlib.sha256("\n".join(said).encode()).hexdigest(),
    }
    found |= {name: _counts(part) for name, part in there.items()}
    return found | ({"notes": remarks} if remarks else {})


def _counts(part: Pairs | Texts) -> dict[str, int]:
    texts = part.texts if isinstance(part, Pairs) else part
    counts = {"pairs": len(part), "ties": int((part.label == 0.5).sum())} if isinstance(part, Pairs) else {}
    return {"texts": len(texts), "tokens": int(texts.width.sum())} | counts


def _digest(part: Pairs | Texts) -> str:
    texts = part.texts if isinstance(part, Pairs) else part
    found = hashlib.sha256(texts.documents.digest().encode())
    if isinstance(part, Pairs):
        for values in (part.sides, part.weight, part.label, part.margin):
            found.update(b"" if values is None else np.ascontiguousarray(values).tobytes())
    return found.hexdigest()
