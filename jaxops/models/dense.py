"""A linear layer whose kernel is constrained to its logical axes where it is used.

A kernel may be stored over fsdp too; multiplied as it lies it gives silently wrong gradients on some meshes
(core/fence.py).
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from jaxops.core.sharding import constrain


class Dense(nnx.Linear):
    """`nnx.Linear` with a logical name (or None) for both dimensions of its kernel; its parameters are the same."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        names: tuple[str | None, str | None],
        *,
        bias: bool = True,
        kernel_init: Callable[..., Any],
        rngs: nnx.Rngs,
    ):
        def product(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
            return jax.lax.dot_general(x, constrain(kernel, names), *args, **options)

        super().__init__(inputs, outputs, use_bias=bias, kernel_init=kernel_init, dot_general=product, rngs=rngs)
