"""The options of `jaxops predict`, `export` and `sample` for language models."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from jaxops.rl.options import SampleOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    """The options of `predict`, which scores texts; `batch` is the number of texts that are read at a time."""

    batch: Annotated[int, Field(ge=1)] = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """The options of `export`: a folder that `transformers` and vLLM open; `dtype` is that of its files."""

    to: Literal["hf"] = "hf"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(SampleOptions):
    """The options of `sample` and `chat`, with those of the distribution.

    Attributes:
      n: number of completions of each prompt.
      seed: seed of the noise.
      template: whether a prompt that is text is put to the model as a user's turn (`chat`) or continued as it is
        (`none`); `auto` does what the run learnt from. A prompt of messages is always a conversation.
      slots: number of completions that are written at a time.
      segment: number of tokens between two looks for stops.
      room: number of tokens that a prompt and its completion have room for; null is enough for the longest prompt.
    """

    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    template: Literal["auto", "chat", "none"] = "auto"
    slots: Annotated[int, Field(ge=1)] = 32
    segment: Annotated[int, Field(ge=1)] = 16
    room: Annotated[int, Field(ge=2)] | None = None
