"""The config of prompts: frozen dataclasses and nothing else (`open.py` opens them)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from jaxops.config.part import Part
from jaxops.data.spec import Format
from jaxops.data.text.spec import Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptColumns:
    """Names of the columns that hold the prompt and, where there are any, the tools.

    The prompt is a text, or a list of messages.
    """

    prompt: str = "prompt"
    tools: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptData(Part):
    """Prompts that a policy answers, {"prompt"}; every other column reaches the rewards by its name.

    The files are JSON lines, Parquet, CSV, or `.txt` with a prompt a line. With `template: chat` a text is put to the
    model as a user's turn, with `none` it is continued as it is; messages always go through the model's own template,
    of which `arguments` are variables. `date` is the day that a template may write into a prompt (2026-01-31).
    A prompt of more than `max_tokens` tokens is left out (`too_long: drop`), or keeps its last ones and its begin token
    (`cut_start`); both are counted and said. `valid` is the held-out part: a share of the prompts, or files of its own.
    """

    sort: ClassVar[str] = "text"
    words: ClassVar[int | None] = None

    path: str | tuple[str, ...]
    kind: Literal["prompts"] = "prompts"
    columns: PromptColumns = PromptColumns()
    template: Literal["chat", "none"] = "chat"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    date: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**20)] = 512
    too_long: Literal["drop", "cut_start"] = "drop"
    valid: Share | str | tuple[str, ...] | None = None
    format: Format = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeginningData(Part):
    """Texts whose first `words` words a policy continues; what follows them in the file is not shown to it.

    Every column but that of the text reaches the rewards by its name. What is held out is chosen by the whole text, so
    that a run on the whole texts with the same share (`kind: text`, `kind: ratings`) holds out the same ones. The rest
    is as in `kind: prompts`.
    """

    sort: ClassVar[str] = "text"
    template: ClassVar[Literal["chat", "none"]] = "none"
    arguments: ClassVar[Mapping[str, Any]] = {}
    date: ClassVar[str | None] = None

    path: str | tuple[str, ...]
    kind: Literal["beginnings"] = "beginnings"
    column: str = "text"
    words: Annotated[int, Field(ge=1)] = 4
    max_tokens: Annotated[int, Field(ge=1, le=2**20)] = 512
    too_long: Literal["drop", "cut_start"] = "drop"
    valid: Share | str | tuple[str, ...] | None = None
    format: Format = "auto"

    @property
    def columns(self) -> PromptColumns:
        """The name of the column that holds the text."""
        return PromptColumns(prompt=self.column)


AnyPrompts = PromptData | BeginningData
