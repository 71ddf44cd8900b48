"""Linear layers with ReLU between them: the towers of click and retrieval models."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxops.core.random import dropout
from jaxops.core.sharding import Rule, constrain
from jaxops.models.dense import Dense

MLP_RULES: list[Rule] = [(r"layer_\d+/kernel$", (None, "tensor")), (r"kernel$", ()), (r"bias$", ())]
"""No kernel is sharded over fsdp, since these kernels are small beside the tables.

A config may shard them (`sharding.rules`); they are then gathered over fsdp where they are used. (Before they were
gathered, jax computed wrong updates of such kernels for some widths on meshes with a third axis.)
"""


class Mlp(nnx.Module):
    """Linear layers, each with ReLU and dropout, and a linear layer above them where `last` is given.

    Args:
      width: width of the input.
      hidden: widths of the layers with ReLU.
      rate: dropout rate.
      last: width of the linear layer above; None leaves it out.
      rngs: source of randomness for the parameters.
    """

    def __init__(self, width: int, hidden: Sequence[int], rate: float, *, last: int | None = None, rngs: nnx.Rngs):
        self.rate, self.depth, self.last = rate, len(hidden), last is not None
        for at, size in enumerate(hidden):
            layer = Dense(width, size, ("embed", "mlp"), kernel_init=nnx.initializers.he_normal(), rngs=rngs)
            setattr(self, f"layer_{at}", layer)
            width = size
        self.width = width if last is None else last
        if last is not None:
            self.out = Dense(width, last, (None, "embed"), kernel_init=nnx.initializers.glorot_normal(), rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch width"], keys: Key[Array, " batch"] | None = None, site: int = 0
    ) -> Float[Array, "batch out"]:
        for at in range(self.depth):
            x = constrain(jax.nn.relu(getattr(self, f"layer_{at}")(x)), ("batch", "mlp"))
            x = dropout(x, self.rate, keys, site + at)
        return constrain(self.out(x), ("batch", "embed")) if self.last else x


def width_problems(**widths: Sequence[int]) -> list[tuple[str, str]]:
    """Returns the fields that hold a width below one, as (field, message)."""
    return [(name, "expected positive numbers") for name, sizes in widths.items() if any(size < 1 for size in sizes)]
