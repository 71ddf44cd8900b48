"""Prompts for a trained language model: rows of a file, texts or conversations become the tokens that it continues."""

import dataclasses
import datetime
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxops.core.failures import UserError, nearest
from jaxops.data.preferences.spec import PreferenceData, RatingData
from jaxops.data.text.documents import MODEL, open_template
from jaxops.data.text.formats import checked_messages, read_rows
from jaxops.data.text.spec import ChatData, Templated, conversations_of, sources_of
from jaxops.data.text.template import ChatTemplate, Message
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.run.given_table import as_file

COLUMNS = ("prompt", "messages")
Row = tuple[str, dict[str, Any]]
"""A row with its place, for messages."""


def prompt_rows(source: Any) -> list[Row]:
    """Reads prompts: a file (JSON lines, Parquet, CSV; of `.txt` each line), a table, or a list of texts or messages.

    Raises:
      UserError: there is no such file, it is not of its format, or it has no prompt.
    """
    if isinstance(source, Sequence) and not isinstance(source, str):
        rows = [(f"prompt {at}", one if isinstance(one, dict) else {"prompt": one}) for at, one in enumerate(source)]
    elif str(source).endswith(".txt"):
        rows = _lines(Path(source))
    else:
        with as_file(source) as path:
            rows = read_rows(str(path))
    if not rows:
        raise UserError(f"no prompt in {source}" if isinstance(source, str | Path) else "there is no prompt")
    return rows


def _lines(path: Path) -> list[Row]:
    try:
        text = path.expanduser().read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); expected a text file with a prompt a line") from None
    # Not `splitlines`, which cuts a prompt at U+2028 and at a form feed too.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [(f"{path}:{at}", {"prompt": line}) for at, line in enumerate(lines, 1) if line.strip()]


def written_as(data: Any) -> Templated:
    """Returns how the conversations of a data section become text."""
    if isinstance(data, PreferenceData):
        return ChatData(path="", template=data.template, arguments=data.arguments, date=data.date)
    return ChatData(path="") if isinstance(data, RatingData) else conversations_of(data)


class PromptWriter:
    """Turns prompts into tokens as the run's data were turned into tokens.

    Args:
      data: the data section of the run's config.
      tokenizer: the tokenizer that the run keeps, with the template that was learnt with.
      template: what is done with prompts that are text, as `Generate.template`.
      say: it is called with each line that a person should read.
      conversations: true where the run learnt from pairs of conversations, which their data section does not tell.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: Tokenizer,
        template: str,
        say: Callable[[str], None],
        conversations: bool = False,
    ) -> None:
        self._data = written_as(data)
        judged = isinstance(data, PreferenceData | RatingData)
        learnt = conversations if judged else any(isinstance(one, ChatData) for one in sources_of(data))
        self._tokenizer, self._say, self._said = tokenizer, say, False
        self.chats = template == "chat" or (template == "auto" and learnt)
        """Whether a text is put to the model as a user's turn."""

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The chat template that the run learnt with.

        Raises:
          UserError: there is none.
        """
        date = self._data.date or datetime.date.today().isoformat()
        # The run's tokenizer has the template that was learnt with: its file may be another one by now.
        given = dataclasses.replace(self._data, date=date, template=MODEL)
        return open_template(given, self._tokenizer)

    def ids(self, row: Row) -> list[int]:
        """Returns the tokens of the prompt in a row.

        Raises:
          UserError: there is no prompt in it, it is empty, or the template refuses it.
        """
        where, values = row
        name = next((one for one in COLUMNS if values.get(one) is not None), None)
        if name is None and (null := next((one for one in COLUMNS if one in values), None)):
            raise UserError(f"{where}: the column {null!r} is null; expected a text or a list of messages")
        if name is None:
            there = ", ".join(map(str, values)) or "none"
            hint = next((found for one in values if (found := nearest(str(one), COLUMNS))), "")
            raise UserError(f"{where}: no column 'prompt' or 'messages' (there are: {there}){hint}")
        value = values[name]
        if not isinstance(value, str):
            return self.conversation(self._asked(checked_messages(value, name, where)), where)
        if not value.strip():
            raise UserError(f"{where}: the prompt is empty")
        return self.conversation(({"role": "user", "content": value},), where) if self.chats else self.text(value)

    def text(self, text: str) -> list[int]:
        """Returns the tokens of a text that is continued."""
        ids = self._once(self._tokenizer.encode(text, special=True))
        eos = self._tokenizer.eos
        # Some vocabularies end every text with the end token: there would be nothing to continue.
        while len(ids) > 1 and ids[-1] == eos and not text.endswith(self._tokenizer.token(ids[-1])):
            ids = ids[:-1]
        return ids

    def conversation(self, messages: Sequence[Message], where: str = "the conversation") -> list[int]:
        """Returns the tokens of a conversation, up to where the model's answer begins.

        Raises:
          UserError: there is no template, or it refuses the conversation.
        """
        try:
            return self._once(self._tokenizer.encode(self.template.render(messages, prompt=True).text))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _once(self, ids: list[int]) -> list[int]:
        """Takes away the second of two begin tokens: the template and the vocabulary may both write one."""
        bos = self._tokenizer.bos
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def _asked(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """Leaves out an answer at the end: it is what the model is to write."""
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            return messages
        if not self._said:
            self._say("conversations that end with the assistant are asked without that last turn")
            self._said = True
        return messages[:-1]
