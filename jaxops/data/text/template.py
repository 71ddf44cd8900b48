"""Chat templates: how a conversation becomes the text that a model was trained to read.

Templates are Jinja programs out of other people's files, so they run in a sandbox that cannot change what it is given.
`{% generation %} ... {% endgeneration %}` marks what the model itself writes.
"""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from jaxops.core.failures import UserError

BEGIN, END = "\ufdd0", "\ufdd1"
"""Noncharacters of Unicode, which no text may hold: they mark the spans while a template is rendered."""
LARGEST = 10_000_000
"""The largest repetition or power that a template may compute: characters, entries, or bits."""
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A rendered conversation, and the character ranges `[start, stop)` that the template marks as the model's."""

    text: str
    spans: tuple[tuple[int, int], ...]


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}`: what is inside is put between `BEGIN` and `END`, in the scope around it."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = lambda text: jinja2.nodes.Output([jinja2.nodes.TemplateData(text)]).set_lineno(line)
        return [mark(BEGIN), *inside, mark(END)]


class ChatTemplate:
    """A chat template, compiled.

    Args:
      text: the Jinja program.
      words: variables that it reads, such as bos_token (`Tokenizer.words`).
      name: names it in messages.
      arguments: further variables, such as enable_thinking.
      now: the time that `strftime_now` tells; None refuses templates that ask, as their text would change by the day.

    Attributes:
      marked: whether it says itself what the model writes.

    Raises:
      UserError: the program is no Jinja.
    """

    def __init__(
        self,
        text: str,
        words: Mapping[str, str],
        *,
        name: str = "the chat template",
        arguments: Mapping[str, Any] | None = None,
        now: datetime.datetime | None = None,
    ) -> None:
        self.name, self._now = name, now
        self._variables = {**words, **(arguments or {})}
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        environment.filters["tojson"] = _tojson
        # The text of an example must be the same in each run.
        del environment.filters["random"], environment.globals["lipsum"]
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": self._strftime}
        try:
            self.marked = _is_marked(environment.parse(text))
            self._compiled = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name}, line {error.lineno}: {error.message}") from None
        except Exception as error:  # such as RecursionError, or Python's own SyntaxError for what Jinja lets pass
            raise UserError(f"{name} does not compile: {type(error).__name__}: {_line(error)}") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        prompt: bool = False,
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Returns the text of a conversation.

        Args:
          messages: turns with role and content.
          prompt: ends with the words after which the model writes its answer (`add_generation_prompt`).
          tools: descriptions of functions, for templates that take them.
          arguments: variables for this conversation alone.

        Raises:
          UserError: the template refuses the conversation, or fails on it.
        """
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            marked = self._compiled.render({**self._variables, **(arguments or {}), **given})
        except UserError:
            raise
        except _Refused as refused:
            raise UserError(f"{self.name} refuses the conversation: {refused}") from None
        except Exception as error:  # a program of somebody else may raise anything
            raise UserError(f"{self.name} fails: {type(error).__name__}: {_line(error)}") from None
        return _unmarked(marked, self.name)

    def _strftime(self, format: str) -> str:
        if self._now is None:
            raise UserError(
                f"{self.name} asks for today's date, so that a run which is resumed tomorrow would read other text; "
                "fix the date: `date: 2026-01-31`"
            )
        return self._now.strftime(format)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox in which products and powers stay small: `'a' * 10**11` would take the machine's memory."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Computes a product or a power.

        Args:
          context: the template's variables, which are not read.
          operator: `*` or `**`.
          left: the first factor, or the base.
          right: the second factor, or the exponent.

        Raises:
          OverflowError: it is too large.
        """
        if operator == "*":
            times = [one for one in (left, right) if isinstance(one, int)]
            parts = [one for one in (left, right) if isinstance(one, str | bytes | list | tuple)]
            if times and parts and len(parts[0]) * times[0] > LARGEST:
                raise OverflowError(f"a repetition has more than {LARGEST:,} characters or entries")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > LARGEST:
            raise OverflowError("a power is too large")
        return super().call_binop(context, operator, left, right)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or "no reason given"


class _Refused(Exception):
    """A template refuses a conversation by `raise_exception`, whose message this is."""


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` as chat templates expect it: letters stay letters, nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _is_marked(program: jinja2.nodes.Template) -> bool:
    return any(node.data == BEGIN for node in program.find_all(jinja2.nodes.TemplateData))


def _unmarked(marked: str, name: str) -> Rendered:
    """Takes the marks out of a rendered text and returns where they were."""
    text, spans, start = "", [], -1
    pieces = marked.replace(END, BEGIN + END).split(BEGIN)
    text = pieces[0]
    for piece in pieces[1:]:
        closes = piece.startswith(END)
        if closes != (start >= 0):
            raise UserError(f"{name}: {{% generation %}} inside {{% generation %}}, or cut apart by a filter")
        if closes:
            spans.append((start, len(text)))
        start = -1 if closes else len(text)
        text += piece.removeprefix(END)
    if start >= 0:
        raise UserError(f"{name}: {{% generation %}} is cut apart by a filter")
    return Rendered(text, tuple(spans))
