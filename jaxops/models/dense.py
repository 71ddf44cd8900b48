"""A linear layer whose kernel is constrained to its logical axes where it is used.

A kernel may also be sharded over fsdp. XLA gives silently wrong gradients on some meshes when such a kernel is
multiplied without that constraint (core/fence.py).
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from jaxops.core.sharding import constrain
from jaxops.models.lora import Adapted


class Dense(nnx.Linear):
    """`nnx.Linear` with logical axes for its kernel; its parameters are those of `nnx.Linear`.

    Args:
      inputs: width of the input.
      outputs: width of the output.
      names: a logical axis name, or None, for each of the kernel's two dimensions.
      bias: True adds a bias.
      kernel_init: initializer of the kernel.
      rngs: source of randomness for the parameters.
    """

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
        self.names = names

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Returns the product, with that of the layer's low-rank adapters where `Functional.bind` gave it any."""
        out: Array = super().__call__(inputs, out_sharding)
        adapter: Adapted | None = vars(self).get("adapter")
        if adapter is None:
            return out
        a, b = constrain(adapter.a, (self.names[0], None)), constrain(adapter.b, (None, self.names[1]))
        return out + adapter.scale * ((inputs @ a) @ b)
