"""Choices of the best among several answers to a prompt: read, tokenised, and as batches of training.

The best of k answers is what Ziegler et al. (2019) asked people for. Rows that are wrong are told with file and line.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from jaxops.core.failures import UserError
from jaxops.data import notes
from jaxops.data.epochs import Epochs
from jaxops.data.preferences.agreement import AnnotatorAgreement
from jaxops.data.preferences.formats import annotator_in, prompt_digest, weight_in
from jaxops.data.preferences.opened import Featured, OpenedJudgements, fill_id, inspected, tokenised
from jaxops.data.preferences.pairs import Pairs, Texts
from jaxops.data.preferences.spec import ChoiceColumns, ChoiceData
from jaxops.data.text.formats import (
    Example,
    WrongRow,
    checked_text,
    messages_in,
    parsed,
    shown,
    sort_of,
    text_in,
    value_in,
)
from jaxops.data.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class HumanChoice:
    """One person's choice among answers to a prompt.

    Attributes:
      where: its file and row.
      texts: the answers, each with the prompt.
      best: the place of the best one.
      prompt: a digest of the prompt, which decides whether the choice is held out.
      weight: how much it counts.
      annotator: who judged, or None.
    """

    where: str
    texts: tuple[Example, ...]
    best: int
    prompt: bytes
    weight: float = 1.0
    annotator: str | None = None


def read_choices(config: ChoiceData, path: str | Sequence[str]) -> list[HumanChoice]:
    """Reads all choices of the files at `path`, in order.

    Raises:
      UserError: no file, a file that is not of its format, rows that are wrong, or no row at all.
    """
    names, standard = config.columns, ChoiceColumns()
    wanted = {names.prompt: True, names.completions: True, names.best: True}
    for field in ("weight", "annotator"):
        name = getattr(names, field)
        if name is not None:  # a column that was named must be there, one of the usual names may
            wanted[name] = name != getattr(standard, field)

    def parse(where: str, row: dict[str, Any]) -> HumanChoice:
        for name in (name for name, must in wanted.items() if must):
            value_in(row, name)
        return _choice(names, where, row)

    return parsed(path, config.format, wanted, parse)


def _choice(names: ChoiceColumns, where: str, row: Mapping[str, Any]) -> HumanChoice:
    answers, best = value_in(row, names.completions), value_in(row, names.best)
    if not isinstance(answers, list) or len(answers) < 2:
        raise WrongRow(f"column {names.completions!r} is {shown(answers)}, expected a list of two answers or more")
    if isinstance(best, bool) or not isinstance(best, int) or not 0 <= best < len(answers):
        text = f"expected the place of the best of {len(answers)} completions, from 0 to {len(answers) - 1}"
        raise WrongRow(f"column {names.best!r} is {shown(best)}, {text}")
    alike = [at for at, answer in enumerate(answers) if answer == answers[best] and at != best]
    if alike:
        raise WrongRow(f"{names.completions}[{alike[0]}] equals the best one, so that nothing is preferred")
    texts = tuple(_answered(names, where, row, at, answer) for at, answer in enumerate(answers))
    return HumanChoice(
        where, texts, best, prompt_digest(texts), weight_in(row, names.weight), annotator_in(row, names.annotator)
    )


def _answered(names: ChoiceColumns, where: str, row: Mapping[str, Any], at: int, answer: Any) -> Example:
    """Returns a prompt with one of its answers: both are texts, or both lists of messages."""
    prompt, name = value_in(row, names.prompt), f"{names.completions}[{at}]"
    if sort_of(prompt) != sort_of(answer):
        raise WrongRow(f"{names.prompt!r} is {sort_of(prompt)} and {name} {sort_of(answer)}; they are of one form")
    if isinstance(prompt, str):
        before = text_in(row, names.prompt, empty=True)
        return Example(where, text=before + checked_text(answer, name), prompt=len(before))
    asked, said = messages_in(prompt, names.prompt), messages_in(answer, name)
    if not any(message["role"] == "assistant" for message in said):
        raise WrongRow(f"{name} has no answer of the assistant")
    return Example(where, messages=asked + said, asked=len(asked))


@dataclasses.dataclass(frozen=True, eq=False)
class TokenisedChoices:
    """Choices whose texts are tokens.

    Attributes:
      texts: the texts.
      candidates: the numbers of each choice's texts; where a choice has fewer than the most, its best one again.
      valid: False where `candidates` only fills the row.
      best: the place of the best one.
      weight: how much each counts.
      prompts: the number of each choice's prompt.
      annotators: who judged each, or None.
    """

    texts: Texts
    candidates: Int64[np.ndarray, "choices k"]
    valid: Bool[np.ndarray, "choices k"]
    best: Int64[np.ndarray, " choices"]
    weight: Float32[np.ndarray, " choices"]
    prompts: Int64[np.ndarray, " choices"]
    annotators: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.best)

    def batch(self, rows: Int[np.ndarray, " rows"]) -> dict[str, np.ndarray]:
        """Returns the choices of these numbers.

        They are "id" and "best" int32 [B], "weight" float32 [B], "valid" bool [B, k], and of shape [B, k, length] what
        `Texts.rows` has.
        """
        own = {"id": rows.astype(np.int32), "best": self.best[rows].astype(np.int32), "weight": self.weight[rows]}
        return own | {"valid": self.valid[rows]} | self.texts.rows(self.candidates[rows])

    def pairs(self) -> Pairs:
        """Returns the pairs of the best answer and each other one; those of a choice count as much as it does."""
        rows = np.arange(len(self))
        others = self.valid.copy()
        others[rows, self.best] = False
        choice, place = np.nonzero(others)
        best = self.candidates[choice, self.best[choice]]
        weight = self.weight[choice] / others.sum(axis=1)[choice]
        return Pairs(
            self.texts,
            np.stack([best, self.candidates[choice, place]], axis=1),
            weight.astype(np.float32),
            np.ones(len(choice), np.float32),
            None,
            np.stack([self.prompts[choice]] * 2, axis=1),
            tuple(self.annotators[at] for at in choice),
        )


class ChoiceSource:
    """A `Source` of choices, shuffled anew every epoch; see `TokenisedChoices.batch` for what is in a batch."""

    def __init__(self, choices: TokenisedChoices, seed: int) -> None:
        self.choices, self.examples, self.length = choices, len(choices), choices.texts.length
        self._epochs = Epochs(self.examples, seed)

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Choices `[cursor, cursor + size)` of the endless stream of epochs."""
        return self.choices.batch(self._epochs.ids(cursor, size))


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """Choices that are read and split."""

    config: ChoiceData
    train: list[HumanChoice]
    valid: list[HumanChoice]
    remarks: list[str]

    @property
    def words(self) -> list[str]:
        """All that is said in the texts of training."""
        return [said for choice in self.train for text in choice.texts for said in text.said]

    def opened(
        self, tokenizer: Tokenizer, featured: Featured | None = None, *, answers: bool = False
    ) -> OpenedJudgements:
        """Tokenises the texts and cuts them to the length of a row."""
        del answers  # no objective on choices reads single tokens
        with notes.collected() as remarks:
            train = self._tokenised(self.train, tokenizer, "train", featured)
            valid = self._tokenised(self.valid, tokenizer, "valid", featured).pairs() if self.valid else None
        parts = {"train": train.pairs(), "valid": valid}
        inspection = inspected(self.config, tokenizer, parts, self.remarks + remarks)
        inspection["train"]["choices"] = len(train)
        inspection["conversations"] = sum(choice.texts[0].text is None for choice in self.train)
        source = lambda seed: ChoiceSource(train, seed)
        return OpenedJudgements(source, train.texts, valid, AnnotatorAgreement(), inspection)

    def _tokenised(
        self, choices: list[HumanChoice], tokenizer: Tokenizer, part: str, featured: Featured | None
    ) -> TokenisedChoices:
        """Returns the choices that are learnt from, and tells what was cut or left out.

        Raises:
          UserError: none is left, or none of them counts.
        """
        config = self.config
        documents = tokenised(config, [text for choice in choices for text in choice.texts], tokenizer)
        texts = Texts.cut(documents, config.length, config.too_long, fill_id(tokenizer))
        starts = np.cumsum([0, *(len(choice.texts) for choice in choices)])
        over = np.diff(documents.offsets) > config.length
        if over.any():
            what = {
                "cut_start": "lose their beginning",
                "cut_end": "lose their end",
                "drop": "are left out with their choices",
            }
            notes.tell(
                f"{part}: {over.sum()} of {len(over)} texts are longer than data.length {config.length} and "
                f"{what[config.too_long]}"
            )
        kept = []
        alike = []
        for at, choice in enumerate(choices):
            own = range(starts[at], starts[at + 1])
            best = texts.of(own[choice.best])
            if any(place != choice.best and np.array_equal(texts.of(text), best) for place, text in enumerate(own)):
                alike.append(choice.where)
            elif not (config.too_long == "drop" and over[own.start : own.stop].any()):
                kept.append(at)
        if alike:
            notes.tell(
                f"{part}: {len(alike)} of {len(choices)} choices have the tokens of the best answer twice within "
                f"data.length {config.length} and are left out, the first {alike[0]}"
            )
        told = [choices[at] for at in kept]
        if not any(choice.weight > 0 for choice in told):
            raise UserError(
                f"{part}: no choice is left to learn from within data.length {config.length}; the longest text has "
                f"{int(np.diff(documents.offsets).max(initial=0))} tokens. Raise data.length, see data.too_long, "
                "and whether the weights are zero"
            )
        most = max(len(choice.texts) for choice in told)
        sizes = np.array([len(choice.texts) for choice in told])
        best = np.array([choice.best for choice in told])
        valid = np.arange(most) < sizes[:, None]
        begin = starts[kept][:, None]
        prompts = {prompt: at for at, prompt in enumerate(dict.fromkeys(choice.prompt for choice in told))}
        return TokenisedChoices(
            featured(texts) if featured else texts,
            begin + np.where(valid, np.arange(most), best[:, None]),
            valid,
            best,
            np.array([choice.weight for choice in told], np.float32),
            np.array([prompts[choice.prompt] for choice in told]),
            tuple(choice.annotator for choice in told),
        )
