"""The config of human judgements: frozen dataclasses and nothing else (`open.py` opens them)."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from jaxops.config.part import Part
from jaxops.data.spec import Format
from jaxops.data.text.spec import Share

TooLong = Literal["cut_start", "cut_end", "drop"]
"""What happens to a text of more than `length` tokens. `drop` leaves out its pair. Cuts are counted and said."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceColumns:
    """Names of the columns of preferences. Of the last five, those that a file lacks are not read, unless renamed here.

    Attributes:
      chosen: the better text.
      rejected: the other text.
      prompt: what both answer. Without it, the prompt is what the two have in common at their beginning.
      weight: how much the row counts, 1 without it.
      margin: by how much the chosen text is better.
      annotator: who judged.
      label: the probability that the chosen text is better, 0.5 or "tie" for a tie, 1 without it.
    """

    chosen: str = "chosen"
    rejected: str = "rejected"
    prompt: str | None = "prompt"
    weight: str | None = "weight"
    margin: str | None = "margin"
    annotator: str | None = "annotator"
    label: str | None = "label"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatingColumns:
    """Names of the columns of ratings: a text, the list of single people's ratings of it, and its group.

    Only texts of one group are compared; with `group: null` all are of one. A file without the column `source` has one
    group too.
    """

    text: str = "text"
    ratings: str = "ratings"
    group: str | None = "source"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedPart(Part):
    """The fields that both kinds of judgements share.

    `length` is the number of tokens of a text that are read, its end token included. `valid` is the held-out part: a
    share of the prompts (of the texts, for ratings), or files of its own.
    """

    sort: ClassVar[str] = "text"

    path: str | tuple[str, ...]
    length: Annotated[int, Field(ge=2, le=2**20)] = 1024
    valid: Share | str | tuple[str, ...] | None = None
    format: Format = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnsweredPart(JudgedPart):
    """The fields that judgements of answers to prompts share, whose answers may be texts or lists of messages.

    `template`, `arguments` and `date` are those of `kind: completion`.
    """

    template: str | None = "model"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    date: str | None = None
    too_long: TooLong = "cut_start"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceData(AnsweredPart):
    """Pairs of answers to a prompt, of which a person chose one: {"prompt", "chosen", "rejected"}.

    Texts and lists of messages are read as TRL has them, with the prompt in a column of its own or as the beginning of
    both sides. Transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...", Bai et al. 2022) become messages, unless `template`
    is null.
    """

    kind: Literal["preferences"] = "preferences"
    columns: PreferenceColumns = PreferenceColumns()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceColumns:
    """Names of the columns of choices. Of the last two, those that a file lacks are not read, unless renamed here.

    Attributes:
      prompt: what all completions answer.
      completions: the list of answers.
      best: the place of the best one in that list, from 0 on.
      weight: how much the row counts, 1 without it.
      annotator: who judged.
    """

    prompt: str = "prompt"
    completions: str = "completions"
    best: str = "best"
    weight: str | None = "weight"
    annotator: str | None = "annotator"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceData(AnsweredPart):
    """Several answers to a prompt, of which a person chose the best: {"prompt", "completions", "best"}.

    Rows may have different numbers of completions. Validation is on the pairs of the best one and each other one.
    """

    kind: Literal["best_of_k"] = "best_of_k"
    columns: ChoiceColumns = ChoiceColumns()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatingData(JudgedPart):
    """Texts with the ratings of single people: {"text", "ratings"}. Two texts and a rating of each make a judgement.

    Every epoch pairs each text with another one of its group. With `labels: single` one rating of each decides who is
    better, and equal ratings are a tie; with `labels: share` the label is the share of all pairs of their ratings in
    which the first is rated higher, ties counted half. Validation is on single judgements in any case, `judgements` of
    each held-out text.
    """

    kind: Literal["ratings"] = "ratings"
    columns: RatingColumns = RatingColumns()
    labels: Literal["single", "share"] = "single"
    judgements: Annotated[int, Field(ge=1, le=1000)] = 4
    too_long: TooLong = "cut_end"

    def problems(self) -> Iterable[tuple[str, str]]:
        """Returns what does not go together, as (dotted path, message)."""
        if self.too_long == "drop":
            yield "too_long", "ratings are of whole texts: `cut_end` or `cut_start`"


JudgementConfig = PreferenceData | ChoiceData | RatingData
