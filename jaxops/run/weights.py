"""The weights that are evaluated and served, taken from a state in training or from a checkpoint."""

import functools
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
"""The slots of a table that evaluation and serving need; the optimizer's are not among them."""
AVERAGED = "ema"
"""The entry of `State.extra` that is served instead of the trained parameters, if the state has it."""


class Weights(NamedTuple):
    """All that evaluation and serving read.

    Attributes:
      params: the parameters, with the frozen ones.
      tables: by table, the arrays of its `SERVED_SLOTS`.
    """

    params: Params
    tables: dict[str, dict[str, Array]]


def served_weights(state: State) -> Weights:
    """Returns the weights of a state in training: the moving average if there is one, else the parameters."""
    tables = {
        name: {slot: x for slot, x in table.items() if slot in SERVED_SLOTS} for name, table in state.tables.items()
    }
    return Weights(evaluated_params(state), tables)


def read_weights(checkpoints: Checkpoints, step: int) -> Weights:
    """Reads the weights in the checkpoint of a step, as numpy arrays.

    Raises:
      UserError: there is no such step, or a file is missing or truncated.
    """
    tables = {}
    if any(leaf.path.startswith("tables/") for leaf in checkpoints.describe(step)):
        tables = checkpoints.load_params(step, "tables", leaves=SERVED_SLOTS)
    return Weights(read_params(checkpoints, step), tables)


def read_params(checkpoints: Checkpoints, step: int, below: str = "") -> Params:
    """Reads the parameters in the checkpoint of a step, as numpy arrays: those that are served, and the frozen ones.

    Args:
      checkpoints: the checkpoints.
      step: a saved step.
      below: what the paths of the parameters begin with (`policy/`); only they are read, by the rest of their paths.

    Raises:
      UserError: there is no such step or no such parameter, or a file is missing or truncated.
    """
    served = f"{served_part(checkpoints, step)}/{below}".rstrip("/")
    frozen = f"frozen/{below}".rstrip("/")
    there = [f"{leaf.path}/" for leaf in checkpoints.describe(step)]
    found = [part for part in (served, frozen) if any(path.startswith(f"{part}/") for path in there)] or [served]
    return functools.reduce(join, (checkpoints.load_params(step, part) for part in found))


def served_part(checkpoints: Checkpoints, step: int) -> str:
    """Returns the part of a checkpoint whose parameters are served: the moving average if there is one."""
    average = f"extra/{AVERAGED}"
    there = any(leaf.path.startswith(f"{average}/") for leaf in checkpoints.describe(step))
    return average if there else "params"


def placed_like(weights: Weights, like: Weights) -> Weights:
    """Places weights from the host with the shardings of other weights."""

    def place(value: Any, other: Any) -> Any:
        return put(np.asarray(value), other)

    return jax.tree.map(place, weights, like)
