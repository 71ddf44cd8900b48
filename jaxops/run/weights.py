"""What of a state is evaluated and served, said once: of a state in training, and of a checkpoint."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from jaxops.core.checkpoint import Checkpoints
from jaxops.core.evaluation import evaluated_params
from jaxops.core.rows import put
from jaxops.core.state import Params, State, join
from jaxops.tables.average import AVERAGE, SINCE

SERVED_SLOTS = ("rows", AVERAGE, SINCE, "count")
"""What of a table evaluation and serving need: never the optimizer's slots."""
AVERAGED = "ema"
"""The entry of `State.extra` that is served instead of the trained parameters, where it is there."""


class Weights(NamedTuple):
    """All that evaluation and serving read: parameters (with the frozen ones), and of tables `SERVED_SLOTS`."""

    params: Params
    tables: dict[str, dict[str, Array]]


def served_weights(state: State) -> Weights:
    """The weights of a state in training: the moving average where there is one, else the parameters."""
    tables = {
        name: {slot: x for slot, x in table.items() if slot in SERVED_SLOTS} for name, table in state.tables.items()
    }
    return Weights(evaluated_params(state), tables)


def read_weights(checkpoints: Checkpoints, step: int) -> Weights:
    """The weights in the checkpoint of a step, as numpy arrays.

    Raises:
      UserError: no such step, or a file is missing or truncated.
    """
    parts = {leaf.path.split("/")[0] for leaf in checkpoints.describe(step)}
    params = checkpoints.load_params(step, served_part(checkpoints, step))
    if "frozen" in parts:
        params = join(params, checkpoints.load_params(step, "frozen"))
    tables = {}
    if "tables" in parts:
        tables = checkpoints.load_params(step, "tables", leaves=SERVED_SLOTS)
    return Weights(params, tables)


def served_part(checkpoints: Checkpoints, step: int) -> str:
    """The part of a checkpoint whose parameters are served: the moving average where there is one."""
    average = f"extra/{AVERAGED}"
    there = any(leaf.path.startswith(f"{average}/") for leaf in checkpoints.describe(step))
    return average if there else "params"


def placed_like(weights: Weights, like: Weights) -> Weights:
    """Weights from the host, placed as others are."""

    def place(value: Any, other: Any) -> Any:
        return put(np.asarray(value), other)

    return jax.tree.map(place, weights, like)
