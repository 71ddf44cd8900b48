"""Prompts as tokens: what the model reads of each, what is too long, and what is odd about them."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64

from jaxops.core.failures import UserError
from jaxops.data import notes
from jaxops.data.prompts.formats import AskedPrompt
from jaxops.data.prompts.spec import AnyPrompts
from jaxops.data.prompts.writer import PromptForm, PromptWriter
from jaxops.data.text.documents import function_name
from jaxops.data.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """The prompts of a part that are answered, with their tokens.

    Attributes:
      rows: the prompts.
      tokens: the tokens of all prompts, one after the other.
      offsets: where each prompt begins among the tokens, and where the last one ends.
      too_long: how many prompts were longer than `max_tokens`, which were left out or cut.
      empty: how many prompts became no token, but for a begin token, and were left out.
    """

    rows: list[AskedPrompt]
    tokens: Int32[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " prompts_and_one"]
    too_long: int
    empty: int

    @property
    def longest(self) -> int:
        """The number of tokens of the longest prompt."""
        return int(np.diff(self.offsets).max(initial=0))


def form_of(config: AnyPrompts) -> PromptForm:
    """Returns how a policy that answers such prompts turns prompts into tokens: in training and when it is served."""
    return PromptForm(chats=config.template == "chat", arguments=config.arguments, date=config.date)


def encode_prompts(
    config: AnyPrompts, prompts: Sequence[AskedPrompt], tokenizer: Tokenizer, part: str
) -> EncodedPrompts:
    """Turns prompts into tokens, and says what a person should know about how that went.

    Args:
      config: the data section.
      prompts: the prompts.
      tokenizer: that of the model.
      part: names the prompts in messages (`train`).

    Raises:
      UserError: there is no chat template, it refuses a prompt, or no prompt is left.
    """
    ids = _Encoder(config, tokenizer, part).encoded(prompts)
    lengths = np.array([len(one) for one in ids], np.int64)
    over, empty = lengths > config.max_tokens, np.array([one in ([], [tokenizer.bos]) for one in ids])
    left_out = empty | over if config.too_long == "drop" else empty
    if empty.any():
        first = prompts[int(np.argmax(empty))].where
        notes.tell(
            f"{part}: {empty.sum()} of {len(prompts)} prompts become no token and are left out, the first {first}"
        )
    if over.any():
        done = "are left out" if config.too_long == "drop" else "lose their beginning"
        notes.tell(
            f"{part}: {over.sum()} of {len(prompts)} prompts are longer than data.max_tokens {config.max_tokens} and "
            f"{done}; the longest has {lengths.max()} tokens: {prompts[int(np.argmax(lengths))].where}"
        )
    if left_out.all():
        raise UserError(
            f"{part}: no prompt is left of {len(prompts)}: {over.sum()} are longer than data.max_tokens "
            f"{config.max_tokens}, {empty.sum()} become no token. Raise data.max_tokens, or see data.too_long"
        )
    cut = [_cut(one, config.max_tokens, tokenizer.bos) for one, out in zip(ids, left_out, strict=True) if not out]
    tokens = np.array([token for one in cut for token in one], np.int32)
    if tokens.max() >= tokenizer.vocab or tokens.min() < 0:
        raise UserError(f"the tokenizer ({tokenizer.kind}) gives ids outside of its vocabulary of {tokenizer.vocab}")
    offsets = np.cumsum([0, *(len(one) for one in cut)], dtype=np.int64)
    rows = [prompt for prompt, out in zip(prompts, left_out, strict=True) if not out]
    return EncodedPrompts(rows, tokens, offsets, int(over.sum()), int(empty.sum()))


def _cut(ids: list[int], most: int, bos: int | None) -> list[int]:
    """Returns the last tokens of a prompt that is too long, after its begin token, which models need to see."""
    if len(ids) <= most:
        return ids
    return [ids[0], *ids[len(ids) - most + 1 :]] if ids[0] == bos and most > 1 else ids[-most:]


class _Encoder:
    """Encodes the prompts of a part, and counts what is odd about them."""

    def __init__(self, config: AnyPrompts, tokenizer: Tokenizer, part: str) -> None:
        self._writer = PromptWriter(form_of(config), tokenizer, notes.tell)
        self._tokenizer, self._part = tokenizer, part
        self._words = tuple(tokenizer.token(index) for index in sorted(tokenizer.special))
        self._quoted = self._unwritten = 0

    def encoded(self, prompts: Sequence[AskedPrompt]) -> list[list[int]]:
        """Returns the tokens of each prompt.

        Raises:
          UserError: there is no chat template, or it refuses a prompt.
        """
        found = [self._ids(prompt) for prompt in prompts]
        start = f"{self._part}: in {{}} of {len(prompts)} prompts"
        if answered := sum(prompt.answered for prompt in prompts):
            notes.tell(f"{start.format(answered)} the assistant has the last turn, which is not asked")
        if self._unwritten:
            notes.tell(
                f"{start.format(self._unwritten)} the chat template leaves out or rewrites what a user or the system "
                "says, or the tools"
            )
        if self._quoted:
            notes.tell(
                f"{start.format(self._quoted)} a message holds the words of a control token, which become that token: "
                f"whoever wrote the message could end a turn ({', '.join(self._words[:3])}, ...)"
            )
        return found

    def _ids(self, prompt: AskedPrompt) -> list[int]:
        asked = prompt.asked
        if asked.text is not None:
            return self._writer.text(asked.text)
        if self._tokenizer.template is None:
            told = (
                "data.template: `chat` needs" if isinstance(prompt.written, str) else f"{prompt.where}: messages need"
            )
            raise UserError(
                f"{told} a chat template, and the tokenizer ({self._tokenizer.kind}) came without one; `template: none`"
                " continues texts as they are"
            )
        text = self._writer.rendered(asked.messages, asked.where, asked.tools, dict(asked.arguments))
        said = [message["content"] for message in asked.messages]
        self._quoted += any(word in one for word in self._words for one in said)
        turns = [message["content"].strip() for message in asked.messages if message["role"] in ("system", "user")]
        names = [name for tool in asked.tools or () if (name := function_name(tool))]
        self._unwritten += not all(one in text for one in (*turns, *names))
        return self._writer.encoded(text, asked.where)
