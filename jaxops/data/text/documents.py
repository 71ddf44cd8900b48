"""Examples as tokens: one flat array of ids, where each document ends, and which tokens are learnt from."""

import dataclasses
import datetime
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64

from jaxops.core.failures import UserError
from jaxops.data import notes
from jaxops.data.text.assistant import Ends, assistant_parts, completion_part
from jaxops.data.text.formats import Example
from jaxops.data.text.spec import ChatData, OneTextData, Templated, TextData
from jaxops.data.text.template import ChatTemplate, Rendered
from jaxops.data.text.tokenizer import EncodedText, Tokenizer

MODEL = "model"
"""The name of the chat template that the tokenizer has."""
AT_ONCE = 1024
"""Texts that are given to the tokenizer at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Tokenised examples, one after the other.

    Attributes:
      tokens: the ids of all documents.
      trained: True for a token that is learnt from as a target.
      offsets: where each document begins among the tokens, and where the last one ends.
    """

    tokens: Int32[np.ndarray, " tokens"]
    trained: Bool[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " documents_and_one"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def digest(self) -> str:
        """Returns a digest of all arrays, which tells whether two runs read the same."""
        found = hashlib.sha256()
        for values in (self.tokens, self.trained, self.offsets):
            found.update(np.ascontiguousarray(values).tobytes())
        return found.hexdigest()


def tokenise(config: OneTextData, examples: Sequence[Example], tokenizer: Tokenizer) -> Documents:
    """Turns examples into tokens, and says what a person should know about how that went.

    Raises:
      UserError: a template that fails or hides what the assistant says, with the example's file and row.
    """
    writer = _Writer(config, tokenizer)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    texts: list[tuple[Example, Rendered]] = []
    for example in examples:
        texts += [(example, rendered) for rendered in writer.rendered(example)]
        if len(texts) >= AT_ONCE:
            parts += writer.encoded(texts)
            texts = []
    parts += writer.encoded(texts)
    writer.tell()
    offsets = np.cumsum([0, *(len(ids) for ids, _ in parts)], dtype=np.int64)
    return Documents(np.concatenate([ids for ids, _ in parts]), np.concatenate([mask for _, mask in parts]), offsets)


class _Writer:
    """Renders and encodes examples, and counts what is odd about them."""

    def __init__(self, config: OneTextData, tokenizer: Tokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        special = tuple(tokenizer.token(index) for index in sorted(tokenizer.special))
        stops = tuple(tokenizer.token(index) for index in tokenizer.stops)
        self._ends = Ends(stops, tuple(dict.fromkeys([*stops, *special])))
        self._template: ChatTemplate | None = None
        self._unstopped = self._straddling = self._twice = self._unwritten = self._quoted = self._count = 0

    def rendered(self, example: Example) -> Iterator[Rendered]:
        """Yields the texts that an example becomes, with the spans that are learnt from."""
        if example.text is not None:
            everything = isinstance(self._config, TextData) or self._config.loss_on == "all"
            yield Rendered(example.text, ((0 if everything else example.prompt, len(example.text)),))
            return
        assert isinstance(self._config, Templated)
        if self._template is None:
            self._template = open_template(self._config, self._tokenizer)
        for messages in self._conversations(example):
            try:
                found = self._conversation(self._template, messages, example)
            except UserError as error:
                raise UserError(f"{example.where}: {error}") from None
            if not any(stop > start for start, stop in found.spans):
                raise UserError(
                    f"{example.where}: {self._template.name} marks nothing of the conversation as the assistant's"
                )
            yield found

    def _conversations(self, example: Example) -> Iterator[tuple[Any, ...]]:
        if not (isinstance(self._config, ChatData) and self._config.turns == "apart"):
            yield example.messages
            return
        for at, message in enumerate(example.messages):
            if message["role"] == "assistant":
                yield example.messages[: at + 1]

    def _conversation(self, template: ChatTemplate, messages: tuple[Any, ...], example: Example) -> Rendered:
        tools, arguments = example.tools, dict(example.arguments)
        if self._config.loss_on == "all":  # type: ignore[union-attr]
            whole = template.render(messages, tools=tools, arguments=arguments).text
            return Rendered(whole, ((0, len(whole)),))
        if not isinstance(self._config, ChatData):
            before, after = messages[: example.asked], messages[example.asked :]
            found = completion_part(template, before, after, self._ends, tools, arguments)
        elif self._config.turns == "apart" and not template.marked:
            found = completion_part(template, messages[:-1], messages[-1:], self._ends, tools, arguments)
        else:
            found = assistant_parts(template, messages, self._ends, tools, arguments)
            if self._config.turns == "apart":
                found = Rendered(found.text, found.spans[self._marked_before(template, messages, tools, arguments) :])
        together = isinstance(self._config, ChatData) and self._config.turns == "together"
        turns = sum(message["role"] == "assistant" for message in messages) if together else 1
        # a template may mark one turn in several pieces, of which the last one holds the stop
        self._unstopped += sum(self._ends.closed(found.text, span) for span in found.spans) < turns
        self._check_written(found.text, messages, example)
        return found

    @staticmethod
    def _marked_before(template: ChatTemplate, messages: Sequence[Any], tools: Any, arguments: Any) -> int:
        """Counts the spans that a template marks before the last turn, which may have several itself."""
        earlier = messages[:-1]
        return len(template.render(earlier, tools=tools, arguments=arguments).spans) if earlier else 0

    def _check_written(self, text: str, messages: Sequence[Any], example: Example) -> None:
        """Checks that the template wrote what is in the messages: many write no tools, some no system turn.

        Raises:
          UserError: a call of a function is not in the text, so that an empty answer would be learnt.
        """
        for at, message in enumerate(messages):
            for name in filter(None, map(function_name, message.get("tool_calls") or ())):
                if name not in text:
                    raise UserError(f"turn {at + 1} calls {name!r}, and the chat template does not write it")
        everything = " ".join(message["content"] for message in messages)
        self._quoted += any(word in everything for word in self._ends.special)
        turns = [message["content"].strip() for message in messages if message["role"] in ("system", "user")]
        tools = [name for name in map(function_name, example.tools or ()) if name]
        self._unwritten += not all(said in text for said in (*turns, *tools))

    def encoded(self, texts: Sequence[tuple[Example, Rendered]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the ids of each text and which of them are learnt from.

        A plain text gets what the vocabulary puts around every text, and the end token; a template writes both itself.
        """
        out = []
        for plain in (True, False):
            chosen = [at for at, (example, _) in enumerate(texts) if (example.text is not None) == plain]
            given = self._tokenizer.encode_batch([texts[at][1].text for at in chosen], special=plain)
            for at, found in zip(chosen, given, strict=True):
                out.append((at, self._document(found, texts[at][1].spans, plain)))
        self._count += len(texts)
        return [document for _, document in sorted(out, key=lambda pair: pair[0])]

    def _document(
        self, found: EncodedText, spans: Sequence[tuple[int, int]], plain: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        ids, trained = found.ids, found.inside(spans)
        bos, eos = self._tokenizer.bos, self._tokenizer.eos
        self._straddling += any(bool(((found.start < start) & (found.end > start)).any()) for start, _ in spans)
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            ids, trained = ids[1:], trained[1:]
            self._twice += 1
        if plain and eos is not None:
            if not len(ids) or ids[-1] != eos:
                ids, trained = np.append(ids, np.int32(eos)), np.append(trained, False)
            trained[-1] = True
        return ids, trained

    def tell(self) -> None:
        """Says what is odd."""
        kind, count = self._tokenizer.kind, self._count
        if self._config.kind != "chat" and self._tokenizer.eos is None:
            notes.tell(
                f"the tokenizer ({kind}) names no end token: a model trained on these texts never learns to stop"
            )
        if self._unstopped:
            notes.tell(
                f"in {self._unstopped} of {count} examples what is learnt from does not end with a token that stops "
                f"the model ({', '.join(self._ends.stops) or 'it has none'}): it may never learn to stop. The chat "
                "template must put the end of the turn inside {% generation %}, and the tokenizer or "
                "generation_config.json must name it"
            )
        if self._unwritten:
            notes.tell(
                f"in {self._unwritten} of {count} examples the chat template leaves out or rewrites what a user or the "
                "system says, or the tools"
            )
        if self._quoted:
            notes.tell(
                f"in {self._quoted} of {count} examples a message holds the words of a control token, which become "
                f"that token: whoever wrote the message could end a turn ({', '.join(self._ends.special[:3])}, ...)"
            )
        if self._straddling:
            notes.tell(
                f"in {self._straddling} of {count} examples a token is half prompt and half answer; it is learnt from. "
                "Where the model writes, the prompt ends before that token: begin the answer with the blank, or end "
                "the prompt without one"
            )
        if self._twice:
            notes.tell(f"{self._twice} of {count} examples began with two begin tokens; one was left out of each")


def function_name(described: Any) -> str | None:
    """Returns the name of the function that a call or a description is about."""
    inner = described.get("function", described) if isinstance(described, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else None


def open_template(config: Templated, tokenizer: Tokenizer) -> ChatTemplate:
    """Compiles the chat template that a config names.

    Raises:
      UserError: the model has none, the file is not there or is no template, or `date` is no date.
    """
    try:
        now = None if config.date is None else datetime.datetime.fromisoformat(config.date)
    except ValueError:
        raise UserError(f"data.date: {config.date!r} is no date; expected one such as 2026-01-31") from None
    if config.template is None:
        raise UserError("data.template: messages need a template: `model`, or the path of a file")
    if config.template == MODEL:
        if tokenizer.template is None:
            raise UserError(
                f"data.template: the tokenizer ({tokenizer.kind}) came without a chat template; write one into a file "
                "and give its path: template: my.jinja"
            )
        text, name = tokenizer.template, "the chat template"
    else:
        text, name = _template_file(config.template), config.template
    return ChatTemplate(text, tokenizer.words, name=name, arguments=config.arguments, now=now)


def with_learnt_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """Returns the tokenizer with the chat template that a run learns with in place of its own.

    A run keeps it so: whoever serves, exports or goes on from the run has the template without its file.

    Args:
      tokenizer: the tokenizer.
      template: the template of a data section: `model`, a file, or None.

    Raises:
      UserError: the file cannot be read.
    """
    if template is None or template == MODEL:
        return tokenizer
    return tokenizer.with_template(_template_file(template))


def _template_file(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template: cannot read {name} ({error}); expected `model` or a file") from None
