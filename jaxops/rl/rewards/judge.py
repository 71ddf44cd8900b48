"""A trained reward model as policy optimisation needs it: its parameters join the state, and it scores on the mesh."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxops.core.state import Params
from jaxops.core.weights import WeightSource


@dataclasses.dataclass(frozen=True)
class Judge:
    """A reward model that was read from its run.

    Attributes:
      model: its `init`, `shapes`, `rules` and `padding`.
      scores: (params, batch) -> each head's score of each text.
      rows: (prompts, completions) -> the batch that `scores` reads, and which texts it holds but a part of; a prompt
        is a text or a list of messages.
      normalised: gives scores a mean of 0 and a deviation of 1 on the run's reference texts.
      source: the trained parameters, by their paths in `model`.
      length: the number of tokens in a row of `rows`.
    """

    model: Any
    scores: Callable[[Params, Mapping[str, Array]], Float[Array, "batch heads"]]
    rows: Callable[[Sequence[Any], Sequence[str]], tuple[dict[str, np.ndarray], Bool[np.ndarray, " batch"]]]
    normalised: Callable[[Float[np.ndarray, "batch heads"]], Float[np.ndarray, "batch heads"]]
    source: WeightSource
    length: int

    def abstract_rows(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of the rows of `size` texts."""
        row = jax.ShapeDtypeStruct((size, self.length), np.int32)
        return dict.fromkeys(("tokens", "segment", "position"), row)
