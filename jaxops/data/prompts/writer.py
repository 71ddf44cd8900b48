"""Turns prompts, which are texts or conversations, into the tokens that a language model continues."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxops.core.failures import UserError, nearest
from jaxops.data.text.documents import MODEL, open_template
from jaxops.data.text.formats import checked_messages
from jaxops.data.text.spec import ChatData
from jaxops.data.text.template import ChatTemplate, Message
from jaxops.data.text.tokenizer import Tokenizer

COLUMNS = ("prompt", "messages")
Row = tuple[str, dict[str, Any]]
"""A row with its place, for messages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptForm:
    """How a run turns prompts into tokens, beside its tokenizer, which has the chat template.

    Attributes:
      chats: whether a text is put to the model as a user's turn.
      arguments: further variables of the template.
      date: the day that the template may write into a conversation; None refuses templates that ask.
    """

    chats: bool
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    date: str | None = None


def users_turn(text: str) -> tuple[Message, ...]:
    """Returns a text as a conversation that begins with it."""
    return ({"role": "user", "content": text},)


class PromptWriter:
    """Turns prompts into tokens as a run does.

    Args:
      form: how the run does it.
      tokenizer: the tokenizer that the run keeps, with the template that was learnt with.
      say: it is called with each line that a person should read.
    """

    def __init__(self, form: PromptForm, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
        self._form, self._tokenizer, self._say, self._said = form, tokenizer, say, False
        self.chats = form.chats
        """Whether a text is put to the model as a user's turn."""

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The chat template that the run learnt with.

        Raises:
          UserError: there is none.
        """
        # The run's tokenizer has the template that was learnt with: its file may be another one by now.
        given = ChatData(path="", template=MODEL, arguments=self._form.arguments, date=self._form.date)
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
        return self.conversation(users_turn(value), where) if self.chats else self.text(value)

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
        return self.encoded(self.rendered(messages, where), where)

    def rendered(
        self,
        messages: Sequence[Message],
        where: str = "the conversation",
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the text of a conversation, up to where the model's answer begins.

        Args:
          messages: the conversation.
          where: its place, for messages.
          tools: descriptions of functions.
          arguments: variables of the template for this conversation alone.

        Raises:
          UserError: there is no template, or it refuses the conversation.
        """
        try:
            return self.template.render(messages, prompt=True, tools=tools, arguments=arguments).text
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def encoded(self, rendered: str, where: str = "the conversation") -> list[int]:
        """Returns the tokens of a text that the template wrote, control tokens and all.

        Raises:
          UserError: it is no Unicode text.
        """
        try:
            return self._once(self._tokenizer.encode(rendered))
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
