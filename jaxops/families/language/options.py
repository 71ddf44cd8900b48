"""The options of `jaxops predict` for language models; those of `export` and `sample` are all decoders'."""

import dataclasses
from typing import Annotated

from pydantic import Field


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguagePredict:
    """The options of `predict`, which scores texts; `batch` is the number of texts that are read at a time."""

    batch: Annotated[int, Field(ge=1)] = 16
