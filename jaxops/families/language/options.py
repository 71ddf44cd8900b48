"""The options of `jaxops predict` and `export` for language models."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguagePredict:
    """The options of `predict`, which scores texts; `batch` is the number of texts that are read at a time."""

    batch: Annotated[int, Field(ge=1)] = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageExport:
    """The options of `export`: a folder that `transformers` and vLLM open; `dtype` is that of its files."""

    to: Literal["hf"] = "hf"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
