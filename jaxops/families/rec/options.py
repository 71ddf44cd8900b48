"""The options of `jaxops predict` and `jaxops export` for recommenders."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    """The options of `predict`; a click model takes none of them.

    Attributes:
      top: how many items each user gets.
      index: the search of the items. `approx` finds nearly all and is faster on a TPU; `auto` uses it on TPUs only.
    """

    top: int | None = None
    index: Literal["auto", "exact", "approx"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """The options of `export`: item vectors with their original ids, in Parquet."""

    to: Literal["parquet"] = "parquet"
