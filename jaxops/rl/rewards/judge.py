"""A trained reward model as policy optimisation needs it: its parameters join the state, and it scores on the mesh."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    """

    model: Any
    scores: Callable[[Params, Mapping[str, Array]], Float[Array, "batch heads"]]
    rows: Callable[[Sequence[Any], Sequence[str]], tuple[dict[str, np.ndarray], Bool[np.ndarray, " batch"]]]
    normalised: Callable[[Float[np.ndarray, "batch heads"]], Float[np.ndarray, "batch heads"]]
    source: WeightSource
