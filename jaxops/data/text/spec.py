"""The config of text data: frozen dataclasses and nothing else (`open.py` opens them)."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from jaxops.config.part import Part
from jaxops.data.spec import Format

TooLong = Literal["split", "cut_end", "cut_start", "drop"]
"""What happens to an example of more than `length` tokens; cuts and drops are counted and said.

`split` makes several of it, which loses nothing. `cut_end` and `cut_start` lose that side. `drop` loses all of it.
"""


@dataclasses.dataclass(frozen=True)
class Share:
    """Holds out this share of the examples, by a hash of what they say: copies of an example are on one side."""

    share: Annotated[float, Field(gt=0, lt=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextColumns:
    """The name of the column that holds the text."""

    text: str = "text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatColumns:
    """Names of the columns that hold the messages and, where there are any, the tools."""

    messages: str = "messages"
    tools: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionColumns:
    """Names of the columns that hold the prompt and the completion: both text, or both lists of messages."""

    prompt: str = "prompt"
    completion: str = "completion"
    tools: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPart(Part):
    """The fields that all kinds of text data share.

    `length` is the number of tokens in a row. With `pack`, several examples share a row and do not see each other.
    `valid` is the held-out part: a share of the examples, or files of its own. Exact copies are counted and said, and
    left out by `copies: drop`. `weight` counts in a mixture alone.
    """

    sort: ClassVar[str] = "text"

    path: str | tuple[str, ...]
    length: Annotated[int, Field(ge=2, le=2**20)] = 1024
    pack: bool = True
    valid: Share | str | tuple[str, ...] | None = None
    copies: Literal["keep", "drop"] = "keep"
    format: Format = "auto"
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def problems_in(self, run: Any) -> list[tuple[str, str]]:
        """Returns what does not go with the rest of the config: a weight, where there is nothing to weigh against."""
        alone = run.data is self and self.weight != 1
        return [("data.weight", "counts in `kind: mixture` alone, between its sources; leave it out")] if alone else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Templated(TextPart):
    """The fields that kinds of messages share.

    `template` is that of the model or a file of one's own.
    `arguments` are variables of the template, such as `enable_thinking: false`. `date` is the day that a template may
    write into a conversation (2026-01-31).
    """

    template: str | None = "model"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    date: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextData(TextPart):
    """Plain texts, {"text"}: everything is learnt from, the end too."""

    kind: Literal["text"] = "text"
    columns: TextColumns = TextColumns()
    too_long: TooLong = "split"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatData(Templated):
    """Conversations, {"messages": [{"role", "content"}]}, learnt from where the assistant speaks.

    With `turns: apart` each assistant turn is an example of its own, after what came before it. That is for templates
    that write a turn in another way once another turn follows.
    """

    kind: Literal["chat"] = "chat"
    columns: ChatColumns = ChatColumns()
    loss_on: Literal["assistant", "all"] = "assistant"
    turns: Literal["together", "apart"] = "together"
    too_long: TooLong = "cut_end"

    def problems(self) -> Iterable[tuple[str, str]]:
        """Returns what does not go together, as (dotted path, message)."""
        if self.template is None:
            yield "template", "conversations need a template: `model`, or the path of a file"
        if self.turns == "apart" and self.loss_on == "all":
            yield "turns", "with `apart` and loss_on `all`, first turns would be learnt from many times"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionData(Templated):
    """Prompts and completions, {"prompt", "completion"}, as text or as messages; learnt from in the completion."""

    kind: Literal["completion"] = "completion"
    columns: CompletionColumns = CompletionColumns()
    loss_on: Literal["completion", "all"] = "completion"
    too_long: TooLong = "cut_end"


OneTextData = TextData | ChatData | CompletionData


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureData(Part):
    """Several sources of text, each drawn in proportion to its `weight`; a weight of 2 gives twice the rows of 1."""

    sort: ClassVar[str] = "text"

    sources: tuple[OneTextData, ...]
    kind: Literal["mixture"] = "mixture"

    @property
    def length(self) -> int:
        """The number of tokens in a row, which is the same in all sources."""
        return self.sources[0].length

    def problems(self) -> Iterable[tuple[str, str]]:
        """Returns what does not go together, as (dotted path, message)."""
        if not self.sources:
            yield "sources", "a mixture needs a source or more"
        for at, source in enumerate(self.sources):
            if source.length != self.length:
                yield f"sources.{at}.length", f"{source.length} here and {self.length} in the first source; use one"


TextDataConfig = TextData | ChatData | CompletionData | MixtureData


def sources_of(data: TextDataConfig) -> tuple[OneTextData, ...]:
    """Returns the sources of a data section: those of a mixture, or itself."""
    return data.sources if isinstance(data, MixtureData) else (data,)


def conversations_of(data: TextDataConfig) -> Templated:
    """Returns the source that says how conversations become text: the first of conversations, else of completions.

    Texts alone say nothing, so that their model's own template is meant.
    """
    templated = [one for one in sources_of(data) if isinstance(one, Templated)]
    chats = [one for one in templated if isinstance(one, ChatData)]
    return next(iter([*chats, *templated]), ChatData(path=""))
