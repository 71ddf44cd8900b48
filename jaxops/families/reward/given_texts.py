"""The texts that `predict` is to score: rows of a file of one's own, in the forms that the run's data has."""

import dataclasses
from typing import Any

import pyarrow as pa

from jaxops.core.failures import UserError
from jaxops.data.preferences.formats import TURN, turns_of
from jaxops.data.preferences.spec import ChoiceData, JudgementConfig, PreferenceData, RatingData
from jaxops.data.text.formats import Example, WrongRow, messages_in, parsed, sort_of, text_in, value_in
from jaxops.run.given_table import columns_of_rows

COMPLETION, MESSAGES = "completion", "messages"
WRITTEN = ("score", "disagreement", "tokens", "cut")
"""The columns that `predict` adds."""


@dataclasses.dataclass(frozen=True, eq=False)
class GivenTexts:
    """Texts to score, and the columns that they came with."""

    examples: list[Example]
    table: pa.Table


def read_given(config: JudgementConfig, path: str) -> GivenTexts:
    """Reads texts: {"prompt", "completion"}, {"messages"} or {"text"}; of a run on ratings, its own column of texts.

    Raises:
      UserError: no file, a row that is wrong, or a column that has the name of one that is added.
    """

    def parse(where: str, row: dict[str, Any]) -> tuple[dict[str, Any], Example]:
        return row, _example(config, where, row)

    found = parsed(path, "auto", None, parse)
    try:
        table = pa.table(columns_of_rows([row for row, _ in found]))
    except UserError as error:
        raise UserError(f"{path}: the rows are of different forms, so they make no table: {error}") from None
    taken = [name for name in WRITTEN if name in table.column_names]
    if taken:
        raise UserError(f"{path}: {', '.join(taken)} is what predict writes; rename the column")
    return GivenTexts([example for _, example in found], table)


def _example(config: JudgementConfig, where: str, row: dict[str, Any]) -> Example:
    if isinstance(config, RatingData):
        return Example(where, text=text_in(row, config.columns.text))
    if COMPLETION in row:
        return _completion(config, where, row)
    if MESSAGES in row:
        messages = messages_in(value_in(row, MESSAGES), MESSAGES)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise WrongRow(f"{MESSAGES!r} does not end with an answer of the assistant, which is what is scored")
        return Example(where, messages=messages, asked=len(messages) - 1)
    if "text" not in row:
        there = ", ".join(map(str, row)) or "none"
        raise WrongRow(f"nothing to score: expected prompt and completion, messages, or text (columns: {there})")
    text = text_in(row, "text")
    if config.template is not None and TURN.match(text):
        turns = turns_of(text)
        if len(turns) > 1 and turns[-1]["role"] == "assistant":
            return Example(where, messages=turns, asked=len(turns) - 1)
    return Example(where, text=text)


def _completion(config: PreferenceData | ChoiceData, where: str, row: dict[str, Any]) -> Example:
    prompt = config.columns.prompt or "prompt"
    asked, said = value_in(row, prompt), value_in(row, COMPLETION)
    if isinstance(asked, str) != isinstance(said, str):
        raise WrongRow(f"{prompt!r} is {sort_of(asked)} and {COMPLETION!r} {sort_of(said)}; both are of one form")
    if isinstance(asked, str):
        before = text_in(row, prompt, empty=True)
        return Example(where, text=before + text_in(row, COMPLETION), prompt=len(before))
    first, second = messages_in(asked, prompt), messages_in(said, COMPLETION)
    if not any(message["role"] == "assistant" for message in second):
        raise WrongRow(f"{COMPLETION!r} has no answer of the assistant, which is what is scored")
    return Example(where, messages=first + second, asked=len(first))
