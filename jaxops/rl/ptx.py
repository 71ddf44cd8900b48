"""PTX mixing: updates of a policy learn from text beside completions, so that it does not forget what it could.

The next-token loss on rows of text is added to an algorithm's own terms with a coefficient, over a count of its own:
the text's tokens of the global batch (Ouyang et al. 2022, "PPO-ptx"). The position in the text is in the state, and so
in every checkpoint. Tested in tests/rl/test_ptx.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from pydantic import Field

from jaxops.config.part import Part
from jaxops.core.accumulate import Objective
from jaxops.core.rows import global_arrays, local_rows
from jaxops.core.step import Extra
from jaxops.core.sums import Sum, Sums
from jaxops.data.loader import build_batches
from jaxops.data.protocol import Source
from jaxops.data.text.spec import ChatData, CompletionData, MixtureData, TextData
from jaxops.models.policy import PolicyModel
from jaxops.objectives.language import next_token

PTX = "ptx"
"""The name of the rows of text in an update's batch, and of the position among them in `State.extra`."""
Position = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ptx(Part):
    """Text that every update learns from beside completions, by the plain loss of the next token.

    Attributes:
      coef: the weight of that loss, a mean over tokens (InstructGPT has 27.8); 0 leaves it out.
      data: the text, a data section as of task `language`; what it holds out by `valid` is not learnt from.
      rows_per_completion: rows of text of an update for each of its completions (InstructGPT has 8).
    """

    coef: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    data: TextData | ChatData | CompletionData | MixtureData
    rows_per_completion: Annotated[int, Field(ge=1, le=1024)] = 1


def with_ptx(objective: Objective, model: PolicyModel, coef: float) -> Objective:
    """Adds `loss/ptx`, and the metric `ptx_nll` without the coefficient, to the objective of an algorithm.

    Args:
      objective: the objective of an update on completions.
      model: the models.
      coef: the weight of the loss.
    """
    text = next_token(model.decoder)

    def mixed(params: Any, batch: dict[str, Any], key: Array | None) -> Sums:
        nll = text(model.trained(params), batch[PTX], None)["loss/nll"]
        assert isinstance(nll, Sum)
        on = jnp.max(batch["policy_on"])  # 0 in all rows while values are trained alone
        return {**objective(params, batch, key), "loss/ptx": Sum(coef * on * nll.total, nll.count), "ptx_nll": nll}

    return mixed


class PtxRows:
    """The rows of text that updates read, in the order of the source and from where the state says.

    Args:
      source: the text.
      rows: the number of rows of an update.
      share: rows of text of a step without an early stop, for each example that it consumes.
      mesh: the mesh of the state.
    """

    def __init__(self, source: Source, rows: int, share: int, mesh: Mesh) -> None:
        self._source, self._rows, self._share, self._mesh = source, rows, share, mesh
        self._place = global_arrays(mesh, rows)
        self._next = jax.jit(_next_position, out_shardings=NamedSharding(mesh, P()))

    def begin(self, position: Position, cursor: int) -> int:
        """Returns the row that a step begins with.

        Examples that the run has gone past without learning from them, after a rollback, take their text with them.

        Args:
          position: the position in the state.
          cursor: the position of the step's batch in the stream of examples.
        """
        return int(position["row"]) + self._share * (cursor - int(position["example"]))

    def batch(self, row: int, update: int) -> Mapping[str, Any]:
        """Returns the rows of an update of a step that begins with `row`; each process builds those of its devices."""
        at = row + update * self._rows
        return self._place(build_batches(self._source, at, self._rows, local_rows(self._mesh, self._rows)))

    def after(self, row: int, updates: int, cursor: int) -> Position:
        """Returns the position after a step.

        Args:
          row: the row that it began with.
          updates: the number of its updates.
          cursor: the position of the next step's batch in the stream of examples.
        """
        return self._next(np.int32(row + updates * self._rows), np.int32(cursor))

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of `batch`."""
        return text_shapes(self._source, self._rows)


def _next_position(row: Array, example: Array) -> Position:
    return {"row": row, "example": example}


def text_shapes(source: Source, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of so many rows of text."""
    return {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in source.batch(0, 1).items()}


def ptx_extra() -> Extra:
    """Returns the position in the text as an entry of the state: the next row, and the next example with it."""
    return Extra(init=lambda params: {name: jnp.zeros((), jnp.int32) for name in ("row", "example")})
