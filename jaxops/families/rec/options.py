"""The options of `jaxops predict` and `jaxops export` for recommenders."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    """The options of `predict`; a click model takes none of them.

    `approx` finds nearly all and is faster on a TPU; `auto` takes it there alone. `untrained_items` is the run's own
    setting, unless it is given. A model of clicks takes none of them.
    """

    top: int | None = None
    index: Literal["auto", "exact", "approx"] | None = None
    untrained_items: Literal["exclude", "allow"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """The options of `export`: item vectors with their original ids, in Parquet."""

    to: Literal["parquet"] = "parquet"
