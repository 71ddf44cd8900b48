"""Reads preferences in the forms that trainers of reward models share: texts, lists of messages, transcripts.

A row that is wrong is told with its file and line; nothing is skipped or repaired unseen.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxops.data import notes
from jaxops.data.preferences.spec import PreferenceColumns, PreferenceData
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
from jaxops.data.text.template import Message

TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """One judgement of two answers to a prompt.

    Attributes:
      where: its file and row.
      texts: the chosen and the rejected text, each with the prompt.
      prompt: a digest of the prompt, which decides whether the pair is held out.
      weight: how much it counts.
      margin: by how much the first is better, or None.
      label: the probability that the first is better.
      annotator: who judged, or None.
    """

    where: str
    texts: tuple[Example, Example]
    prompt: bytes
    weight: float = 1.0
    margin: float | None = None
    label: float = 1.0
    annotator: str | None = None

    @property
    def question(self) -> bytes:
        """A digest of prompt and texts whatever their order, the same for all judgements of the same two answers."""
        return b"".join(sorted(text.digest() for text in self.texts))


def read_pairs(config: PreferenceData, path: str | Sequence[str]) -> list[Pair]:
    """Reads all judgements of the files at `path`, in order.

    Raises:
      UserError: no file, a file that is not of its format, rows that are wrong, or no row at all.
    """
    names = config.columns
    standard = PreferenceColumns()
    wanted = {names.chosen: True, names.rejected: True}
    for field in ("prompt", "weight", "margin", "annotator", "label"):
        name = getattr(names, field)
        if name is not None:  # a column that was named must be there, one of the usual names may
            wanted[name] = name != getattr(standard, field)
    required = [name for name, must in wanted.items() if must]

    def parse(where: str, row: dict[str, Any]) -> Pair:
        for name in required:
            value_in(row, name)
        return _pair(config, where, row)

    found = parsed(path, config.format, wanted, parse)
    empty = sum(not said[-1]["content"] for pair in found for side in pair.texts if (said := side.messages))
    if empty:
        notes.tell(f"{empty} answers of transcripts are empty: the model learns to judge silence by them")
    return found


def _pair(config: PreferenceData, where: str, row: Mapping[str, Any]) -> Pair:
    names = config.columns
    sides = [value_in(row, name) for name in (names.chosen, names.rejected)]
    if sides[0] == sides[1]:
        raise WrongRow(f"{names.chosen!r} and {names.rejected!r} are equal, so that nothing is preferred")
    prompt = value_in(row, names.prompt) if names.prompt is not None and names.prompt in row else None
    kinds = {sort_of(side) for side in sides}
    if len(kinds) > 1:
        raise WrongRow(f"{names.chosen!r} is {sort_of(sides[0])} and {names.rejected!r} {sort_of(sides[1])}")
    if isinstance(sides[0], list):
        texts = _conversations(config, where, prompt, *sides)
    else:
        chosen, rejected = (text_in(row, name) for name in (names.chosen, names.rejected))
        if prompt is None and config.template is not None and TURN.match(chosen) and TURN.match(rejected):
            texts = _asked(names, where, turns_of(chosen), turns_of(rejected))
        else:
            texts = _plain(names, where, prompt, chosen, rejected)
    return Pair(
        where,
        texts,
        prompt_digest(texts),
        weight_in(row, names.weight),
        None if _given(row, names.margin) is None else _number(row, names.margin, 0.0, "a number of 0 or more"),
        _label(row, names.label),
        annotator_in(row, names.annotator),
    )


def _plain(names: PreferenceColumns, where: str, prompt: Any, chosen: str, rejected: str) -> tuple[Example, Example]:
    if prompt is not None:
        if not isinstance(prompt, str):
            raise WrongRow(
                f"{names.prompt!r} is {sort_of(prompt)} and {names.chosen!r} text; all are text, or lists of messages"
            )
        checked_text(prompt, f"column {names.prompt!r}")
        return (
            Example(where, text=prompt + chosen, prompt=len(prompt)),
            Example(where, text=prompt + rejected, prompt=len(prompt)),
        )
    same = _common(chosen, rejected)
    asked = chosen.rfind("\n\nAssistant:", 0, same)
    if TURN.match(chosen) and asked >= 0:
        same = asked + len("\n\nAssistant:")
    elif same and chosen[same - 1 : same] == " ":
        same -= 1  # a blank belongs to the word behind it
    return Example(where, text=chosen, prompt=same), Example(where, text=rejected, prompt=same)


def _common(a: str, b: str) -> int:
    """Returns the number of characters that two texts begin with alike."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _conversations(
    config: PreferenceData, where: str, prompt: Any, chosen: Any, rejected: Any
) -> tuple[Example, Example]:
    names = config.columns
    sides = messages_in(chosen, names.chosen), messages_in(rejected, names.rejected)
    if prompt is None:
        return _asked(names, where, *sides)
    if isinstance(prompt, str):  # both sides are whole conversations, and the prompt is told once more
        if all(side[0]["content"] == prompt for side in sides):
            return _asked(names, where, *sides)
        raise WrongRow(
            f"{names.prompt!r} is text and {names.chosen!r} a list of messages that does not begin with it; the prompt "
            "is a list of messages too, or there is none"
        )
    before = messages_in(prompt, str(names.prompt))
    if not all(side[: len(before)] == before for side in sides):
        sides = (*before, *sides[0]), (*before, *sides[1])
    return _asked(names, where, *sides)


def turns_of(transcript: str) -> tuple[Message, ...]:
    """Returns a transcript as messages. An answer may be empty, as some of the published ones are."""
    pieces = TURN.split(transcript)
    return tuple(
        {"role": ROLES[name], "content": checked_text(said.strip(), "a turn")}
        for name, said in zip(pieces[1::2], pieces[2::2], strict=True)
    )


def _asked(
    names: PreferenceColumns, where: str, chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[Example, Example]:
    """Returns two conversations as prompt and answer; the prompt is all messages that they begin with alike."""
    asked = 0
    while asked < min(len(chosen), len(rejected)) - 1 and chosen[asked] == rejected[asked]:
        asked += 1
    for name, side in ((names.chosen, chosen), (names.rejected, rejected)):
        if not any(message["role"] == "assistant" for message in side[asked:]):
            raise WrongRow(f"{name!r} has no answer of the assistant behind what both sides have in common")
    if not asked:
        raise WrongRow("the two conversations have no message in common: there is no prompt that both answer")
    return (
        Example(where, messages=tuple(chosen), asked=asked),
        Example(where, messages=tuple(rejected), asked=asked),
    )


def prompt_digest(texts: Sequence[Example]) -> bytes:
    """Returns a digest of what texts answer; of the texts themselves, where that is nothing."""
    first = texts[0]
    said: Any = first.messages[: first.asked] if first.text is None else first.text[: first.prompt].strip()
    if not said:
        said = sorted(str(text.text) for text in texts)
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16).digest()


def _given(row: Mapping[str, Any], name: str | None) -> Any:
    """Returns what a row has in a column, None for nothing; numbers that are written as text, as in CSV, as numbers."""
    value = None if name is None else row.get(name)
    if isinstance(value, str):
        try:
            return float(value) if value.strip() else None
        except ValueError:
            return value
    return value


def _number(row: Mapping[str, Any], name: str | None, default: float, expected: str) -> float:
    value = _given(row, name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise WrongRow(f"column {name!r} is {shown(value)}, expected {expected}")
    return float(value)


def _label(row: Mapping[str, Any], name: str | None) -> float:
    value = _given(row, name)
    if value is None:
        return 1.0
    if isinstance(value, str) and value.lower() == "tie":
        return 0.5
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise WrongRow(
            f'column {name!r} is {shown(value)}, expected "tie" or the probability from 0 to 1 that the chosen text is '
            "better"
        )
    return float(value)


def weight_in(row: Mapping[str, Any], name: str | None) -> float:
    """Returns how much a row counts: 1 where it does not say."""
    return _number(row, name, 1.0, "a number that is not negative")


def annotator_in(row: Mapping[str, Any], name: str | None) -> str | None:
    """Returns who judged a row; None where it does not say."""
    value = None if name is None else row.get(name)
    return None if value is None else str(value)
