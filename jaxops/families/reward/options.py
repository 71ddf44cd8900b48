"""The options of `jaxops predict` for reward models."""

import dataclasses
from typing import Annotated

from pydantic import Field


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardPredict:
    """The options of `predict`, which scores texts; `batch` is the number of texts that are read at a time."""

    batch: Annotated[int, Field(ge=1)] = 64
