"""Reads prompts from JSON lines, Parquet, CSV and lines of text, each with the other columns of its row.

A row that is wrong is told with its file and line; nothing is skipped or repaired unseen.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jaxops.core.failures import UserError
from jaxops.data.files import expand_paths
from jaxops.data.formats import columns
from jaxops.data.prompts.spec import AnyPrompts
from jaxops.data.prompts.writer import Row, users_turn
from jaxops.data.sources import local
from jaxops.data.text.formats import (
    Example,
    WrongRow,
    arguments_in,
    messages_in,
    parsed_rows,
    rows_of,
    text_in,
    tools_in,
    value_in,
)
from jaxops.data.text.template import Message

LINES = ".txt"
"""The suffix of files with a prompt a line."""


@dataclasses.dataclass(frozen=True)
class AskedPrompt:
    """One prompt as it was written, and as the model is asked.

    Attributes:
      asked: what the model is asked: a conversation, or a text that is continued.
      written: the text as the user wrote it, or the messages that are asked.
      columns: the other columns of its row.
      answered: whether the row's messages ended with an answer, which is not asked.
      whole: the whole text, where only its first words are asked.
    """

    asked: Example
    written: str | tuple[Message, ...]
    columns: dict[str, Any]
    answered: bool = False
    whole: str | None = None

    @property
    def held_by(self) -> bytes:
        """A digest of what decides whether the prompt is held out: what is asked, or the whole of a text."""
        return (self.asked if self.whole is None else Example(self.where, text=self.whole)).digest()

    @property
    def where(self) -> str:
        """The prompt's file and row, for messages."""
        return self.asked.where


def read_prompts(config: AnyPrompts, path: str | Sequence[str]) -> list[AskedPrompt]:
    """Reads all prompts of the files at `path`, in order.

    Raises:
      UserError: no file, a file that is not of its format, rows without a prompt (the first ones, with their lines),
        or no row at all.
    """
    return parsed_rows(_rows(config, path), path, lambda where, row: _asked(config, where, row))


def prompt_lines(content: bytes, name: str) -> list[tuple[str, str]]:
    """Returns the lines of a text file that are not blank, each with its place for messages.

    Raises:
      UserError: the content is no UTF-8.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {name} ({error}); expected a text file with a prompt a line") from None
    # Not `splitlines`, which cuts a prompt at U+2028 and at a form feed too.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [(f"{name}:{at}", line) for at, line in enumerate(lines, 1) if line.strip()]


def first_words(text: str, count: int) -> str:
    """Returns the first `count` words of a text, with the spaces between them as they are."""
    found = re.match(rf"\s*(?:\S+\s+){{0,{count - 1}}}\S+", text)
    return text if found is None else found.group()


def _rows(config: AnyPrompts, path: str | Sequence[str]) -> Iterator[Row]:
    name = config.columns.prompt
    given = [local(one) for one in ([path] if isinstance(path, str) else path)]
    lines = [one for one in given if config.format == "auto" and one.lower().endswith(LINES)]
    if lines and len(lines) < len(given):
        other = next(one for one in given if one not in lines)
        raise UserError(
            f"data files of different formats cannot be read together: {lines[0]}, {other}; list one format"
        )
    for file in expand_paths(given, "jsonl" if lines else config.format):
        if lines:
            with file.stream() as stream:
                yield from ((where, {name: line}) for where, line in prompt_lines(stream.read(), file.name))
        elif file.format == "jsonl":
            yield from rows_of(file, None)
        else:
            yield from rows_of(file, dict.fromkeys([name, *columns(file)], True))


def _asked(config: AnyPrompts, where: str, row: dict[str, Any]) -> AskedPrompt:
    name = config.columns.prompt
    others = {column: value for column, value in row.items() if column != name}
    value = value_in(row, name)
    if not isinstance(value, list):
        text = text_in(row, name)
        whole = None if config.words is None else text
        text = text if config.words is None else first_words(text, config.words)
        if config.template == "none":
            return AskedPrompt(Example(where, text=text), text, others, whole=whole)
        return AskedPrompt(_conversation(config, where, row, users_turn(text)), text, others, whole=whole)
    if config.words is not None:
        raise WrongRow(f"column {name!r} holds messages, and data.words takes the first words of texts")
    messages = messages_in(value, name)
    answered = messages[-1]["role"] == "assistant"
    if answered:  # what the model is to write is no part of the prompt
        messages = messages[:-1]
    if not messages:
        raise WrongRow(f"column {name!r} has nothing but an answer")
    return AskedPrompt(_conversation(config, where, row, messages), messages, others, answered)


def _conversation(config: AnyPrompts, where: str, row: dict[str, Any], messages: tuple[Message, ...]) -> Example:
    tools = tools_in(row, config.columns.tools)
    return Example(where, messages=messages, asked=len(messages), tools=tools, arguments=arguments_in(row))
