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

    def close(self, text: str, start: int, stop: int, said: Sequence[Message]) -> int:
        """Returns where turns end that are inside `[start, stop)`.

        The last stop ends them: some templates write the words that ask for the next turn behind it. Where there is
        none, or the messages hold one themselves, blanks after a last control token are left out.

        Args:
          text: the rendered conversation.
          start: the place where the turns begin.
          stop: the place where they end at the latest.
          said: the messages of the turns.
        """
        found = [match.end() for match in self._pattern().finditer(text, start, stop)]
        if found and not any(word in str(message.get("content")) for message in said for word in self.stops):
            return found[-1]
        inside = text[start:stop].rstrip()
        return start + len(inside) if inside.endswith(self.special) else stop

    def closed(self, text: str, span: tuple[int, int]) -> bool:
        """Returns whether a span ends with a stop, so that a model which learns it learns to stop."""
        return text[span[0] : span[1]].rstrip().endswith(self.stops)

    def first(self, text: str, start: int) -> int:
        """Returns where the first stop after `start` ends; -1 where there is none."""
        found = self._pattern().search(text, start)
        return found.end() if found else -1

    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.stops)) or r"(?!)")


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
        start, stop = len(before), _written_end(whole.text, len(before), message, ends)
        if stop < 0:
            last = at == len(messages) - 1
            through = whole if last else template.render(messages[: at + 1], tools=tools, arguments=arguments)
            if not whole.text.startswith(through.text):
                raise UserError(
                    f"turn {at + 1}: {template.name} writes this turn in another way when it is the last, so its end "
                    f"is not found; {APART}"
                )
            stop = ends.close(whole.text, start, len(through.text), [message])
        spans.append((start, stop))
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

    Args:
      template: the chat template.
      prompt: the messages before the completion.
      completion: the messages of the completion.
      ends: the words that may end a turn.
      tools: descriptions of functions.
      arguments: variables of the template.

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
    return Rendered(whole, ((len(before), ends.close(whole, len(before), len(whole), completion)),))


def _written_end(text: str, start: int, message: Message, ends: Ends) -> int:
    """Returns where a turn ends whose words, or the last of them, stand alone before the first stop; -1 for others.

    Templates that leave out the thoughts of earlier turns write the last words of a message alone.
    """
    said, stop = str(message.get("content") or "").strip(), ends.first(text, start)
    inside = text[start:stop].strip()
    word = next((word for word in ends.stops if inside.endswith(word)), "")
    inside = inside.removesuffix(word).strip()
    quoted = any(word in said for word in ends.stops)
    return stop if stop >= 0 and inside and said.endswith(inside) and not quoted else -1
