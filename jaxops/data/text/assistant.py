"""The parts of a conversation that a model learns to write: the assistant's turns, up to the token that ends each.

A template with `{% generation %}` says it. For the others, which are most, the conversation is rendered turn by turn:
an assistant's turn begins where the words end after which the model would write it.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxops.core.failures import UserError
from jaxops.data.text.template import ChatTemplate, Message, Rendered

APART = "`turns: apart` makes each assistant turn an example of its own, rendered as the model would meet it"


@dataclasses.dataclass(frozen=True)
class Ends:
    """The words that may end a turn: `stops` end what a model writes, `special` are all control tokens."""

    stops: tuple[str, ...]
    special: tuple[str, ...]

    def close(self, text: str, start: int, stop: int) -> int:
        """Returns where a turn ends that is inside `[start, stop)`: blanks after a last control token are not of it."""
        inside = text[start:stop].rstrip()
        return start + len(inside) if inside.endswith(self.special) else stop

    def closed(self, text: str, span: tuple[int, int]) -> bool:
        """Returns whether a span ends with a control token, so that a model which learns it learns to stop."""
        return text[span[0] : span[1]].rstrip().endswith(self.special)

    def first(self, text: str, start: int) -> int:
        """Returns where the first stop after `start` ends; -1 where there is none."""
        found = re.compile("|".join(map(re.escape, self.stops)) or r"(?!)").search(text, start)
        return found.end() if found else -1


def assistant_parts(
    template: ChatTemplate,
    messages: Sequence[Message],
    ends: Ends,
    tools: Sequence[Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Rendered:
    """Renders a conversation; the spans are the assistant's turns.

    Args:
      template: the chat template.
      messages: the conversation.
      ends: what may end a turn.
      tools: descriptions of functions.
      arguments: variables of the template for this conversation.

    Raises:
      UserError: the template has no `{% generation %}` and its assistant turns cannot be told from the rest.
    """
    whole = template.render(messages, tools=tools, arguments=arguments)
    if template.marked:
        return whole
    spans: list[tuple[int, int]] = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if at == 0:
            raise UserError(
                f"the conversation begins with the assistant, and {template.name} has no {{% generation %}} to say "
                "what the assistant writes"
            )
        before = template.render(messages[:at], prompt=True, tools=tools, arguments=arguments).text
        if not whole.text.startswith(before) or (spans and len(before) < spans[-1][1]):
            raise UserError(f"turn {at + 1}: {template.name} rewrites earlier turns, so the turn is not found; {APART}")
        through = template.render(messages[: at + 1], tools=tools, arguments=arguments).text
        start, stop = len(before), len(through)
        if whole.text.startswith(through):
            spans.append((start, ends.close(whole.text, start, stop)))
        else:
            spans.append((start, _to_stop(whole.text, start, message, ends, template.name, at)))
    return Rendered(whole.text, tuple(spans))


def completion_part(
    template: ChatTemplate,
    prompt: Sequence[Message],
    completion: Sequence[Message],
    ends: Ends,
    tools: Sequence[Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Rendered:
    """Renders a prompt and its completion; the one span is everything after the words that ask for the completion.

    Raises:
      UserError: the template renders the prompt in another way once the completion is there.
    """
    whole = template.render([*prompt, *completion], tools=tools, arguments=arguments).text
    before = template.render(prompt, prompt=True, tools=tools, arguments=arguments).text
    if not whole.startswith(before):
        raise UserError(
            f"{template.name} renders the prompt in another way once the completion follows it, so the two cannot be "
            f"told apart: it would ask with ...{before[-40:]!r}"
        )
    return Rendered(whole, ((len(before), ends.close(whole, len(before), len(whole))),))


def _to_stop(text: str, start: int, message: Message, ends: Ends, name: str, at: int) -> int:
    """Returns where a turn ends that its template writes in another way when it is the last one.

    The first stop after the beginning ends it, if what is before the stop ends as the message does.
    """
    stop = ends.first(text, start)
    inside = text[start:stop].rstrip()
    for word in ends.stops:
        inside = inside.removesuffix(word)
    said = str(message.get("content") or "").strip()
    if stop < 0 or not inside.strip() or not said.endswith(inside.strip()):
        raise UserError(
            f"turn {at + 1}: {name} writes this turn in another way when it is the last, so its end is not "
            f"found; {APART}"
        )
    return stop
