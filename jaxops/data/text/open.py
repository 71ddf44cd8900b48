"""Opens text data: reads, splits, tokenises and packs, once in each process and to the same arrays."""

import dataclasses
import hashlib
from typing import Any

from jaxops.core.failures import UserError
from jaxops.data import notes
from jaxops.data.protocol import Source
from jaxops.data.text.documents import Documents, tokenise
from jaxops.data.text.formats import Example
from jaxops.data.text.heldout import read_parts
from jaxops.data.text.mixture import Mixture
from jaxops.data.text.source import Segments, TextBatches, TextRows, TextSource, fit
from jaxops.data.text.spec import OneTextData, TextDataConfig, sources_of
from jaxops.data.text.tokenizer import Tokenizer

PACKING = 0
"""The seed of the rows of evaluation, which are the same in every run."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """Training or validation of one source: its documents, cut to the length of a row."""

    documents: Documents
    segments: Segments


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedText:
    """One source of text: `train`, and `valid` where there is one."""

    config: OneTextData
    train: Prepared
    valid: Prepared | None
    fill: int
    inspection: dict[str, Any]

    def rows(self, part: Prepared, seed: int) -> TextRows:
        """Returns the rows of a part."""
        return TextRows(
            part.documents, part.segments, self.config.length, packed=self.config.pack, seed=seed, fill=self.fill
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TextParts:
    """Text data that is ready to be trained on.

    Attributes:
      sources: the sources of a mixture; one source where it is none.
      weights: their weights.
      inspection: plain values that describe the data, its digest among them.
    """

    sources: tuple[OpenedText, ...]
    weights: tuple[float, ...]
    inspection: dict[str, Any]

    @property
    def length(self) -> int:
        """The number of tokens in a row."""
        return self.sources[0].config.length

    def source(self, seed: int) -> Source:
        """Returns the training rows, shuffled anew every epoch; see `TextRows.batch` for what is in a batch."""
        sources = [TextSource(one.rows(one.train, seed + at), seed + at) for at, one in enumerate(self.sources)]
        return sources[0] if len(sources) == 1 else Mixture(sources, self.weights, seed)

    def held_out(self, size: int) -> dict[str, TextBatches]:
        """Returns evaluation batches by name: `valid`, and in a mixture `valid/0` and so on by source."""
        found = {
            "valid" if len(self.sources) == 1 else f"valid/{at}": TextBatches(one.rows(one.valid, PACKING), size)
            for at, one in enumerate(self.sources)
            if one.valid is not None
        }
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class ReadText:
    """Text data that is read and split, before it is tokenised.

    Attributes:
      config: the data section.
      parts: of each source its examples of training and validation, and the number of exact copies among them.
      remarks: what a person should see.
    """

    config: TextDataConfig
    parts: tuple[tuple[list[Example], list[Example], int], ...]
    remarks: list[str]

    @property
    def words(self) -> list[str]:
        """All that is said in the texts of training, for a vocabulary that is made out of them."""
        return [said for train, _, _ in self.parts for example in train for said in example.said]

    def opened(self, tokenizer: Tokenizer) -> TextParts:
        """Turns the texts into tokens of a tokenizer.

        Raises:
          UserError: what the template or cutting raises.
        """
        given = sources_of(self.config)
        with notes.collected() as remarks:
            sources = tuple(_opened(one, *read, tokenizer) for one, read in zip(given, self.parts, strict=True))
        inspections = [one.inspection for one in sources]
        whole = hashlib.sha256("".join(one["digest"] for one in inspections).encode()).hexdigest()
        inspection = inspections[0] if len(sources) == 1 else {"sources": inspections, "digest": whole}
        if told := list(dict.fromkeys([*self.remarks, *remarks])):
            inspection = inspection | {"notes": told}
        return TextParts(sources, tuple(one.weight for one in given), inspection)


def read_text(config: TextDataConfig) -> ReadText:
    """Reads text data and splits it.

    Raises:
      UserError: what reading raises.
    """
    with notes.collected() as remarks:
        return ReadText(config, tuple(read_parts(one) for one in sources_of(config)), remarks)


def open_text(config: TextDataConfig, tokenizer: Tokenizer) -> TextParts:
    """Reads text data and turns it into tokens.

    Args:
      config: the data section.
      tokenizer: that of the model.

    Raises:
      UserError: what reading, the template or cutting raises.
    """
    return read_text(config).opened(tokenizer)


def _opened(
    config: OneTextData, train: list[Example], valid: list[Example], copies: int, tokenizer: Tokenizer
) -> OpenedText:
    parts = {"train": _part(config, train, tokenizer, "train")}
    if valid:
        parts["valid"] = _part(config, valid, tokenizer, "valid")
    inspection: dict[str, Any] = {
        "kind": config.kind,
        "length": config.length,
        "copies": copies,
        "tokenizer": tokenizer.digest,
        "digest": _digest(config, parts),
    }
    inspection |= {name: _counts(part) for name, part in parts.items()}
    fill = next((one for one in (tokenizer.pad, tokenizer.eos) if one is not None), 0)
    return OpenedText(config, parts["train"], parts.get("valid"), fill, inspection)


def _part(config: OneTextData, examples: list[Example], tokenizer: Tokenizer, name: str) -> Prepared:
    documents = tokenise(config, examples, tokenizer)
    if documents.tokens.max(initial=0) >= tokenizer.vocab or documents.tokens.min(initial=0) < 0:
        raise UserError(f"the tokenizer ({tokenizer.kind}) gives ids outside of its vocabulary of {tokenizer.vocab}")
    return Prepared(documents, fit(documents, config.length, config.too_long, name))


def _counts(part: Prepared) -> dict[str, int]:
    """Counts what a part holds: `learnt` tokens are those in the loss."""
    return {
        "documents": len(part.documents),
        "segments": len(part.segments),
        "tokens": int(part.segments.width.sum()),
        "learnt": int(part.segments.learnt.sum()),
    }


def _digest(config: OneTextData, parts: dict[str, Prepared]) -> str:
    """Returns a digest of everything that decides which rows training reads, but for the seed."""
    said = [f"{config.length} {config.pack} {config.too_long} {config.weight!r}"]
    said += [f"{name} {part.documents.digest()}" for name, part in parts.items()]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()
