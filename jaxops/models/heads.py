"""Logits above a shared trunk: each label has a tower of its own (the shared bottom of Caruana 1997)."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxops.core.sharding import constrain
from jaxops.models.mlp import Mlp


class Logit(nnx.Module):
    """One linear unit whose product is computed in float32: rounded scores would tie, and AUC counts a tie as half."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.glorot_normal()(rngs.params(), (width, 1)))
        self.bias = nnx.Param(jnp.zeros((1,)))

    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, " batch"]:
        product = jnp.matmul(x, constrain(self.kernel[...], ("embed", None)), preferred_element_type=jnp.float32)
        return product[:, 0] + self.bias[...].astype(jnp.float32)


class Head(nnx.Module):
    """ReLU layers of the widths `hidden`, and a logit above them."""

    def __init__(self, width: int, hidden: Sequence[int], *, rngs: nnx.Rngs):
        self.tower = Mlp(width, hidden, 0.0, rngs=rngs)
        self.out = Logit(self.tower.width, rngs=rngs)

    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, " batch"]:
        return self.out(self.tower(x))


class Heads(nnx.Module):
    """One `Head` for each label. The logits are float32: [batch] for one label, [batch, outputs] for several.

    Args:
      width: width of the input.
      hidden: widths of the hidden layers of each head.
      outputs: number of labels.
      rngs: source of randomness for the parameters.
    """

    def __init__(self, width: int, hidden: Sequence[int], outputs: int, *, rngs: nnx.Rngs):
        self.outputs = outputs
        for at in range(outputs):
            setattr(self, f"head_{at}", Head(width, hidden, rngs=rngs))

    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch ..."]:
        found = [getattr(self, f"head_{at}")(x) for at in range(self.outputs)]
        return found[0] if self.outputs == 1 else jnp.stack(found, axis=-1)
