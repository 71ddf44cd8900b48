"""Logits above a shared trunk: a tower of its own for each task (the shared bottom of Caruana 1997)."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxops.core.sharding import constrain
from jaxops.models.mlp import Mlp


class Logit(nnx.Module):
    """One linear unit, float32 out of the product itself: rounded scores would tie, and AUC counts ties half."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.glorot_normal()(rngs.params(), (width, 1)))
        self.bias = nnx.Param(jnp.zeros((1,)))

    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, " batch"]:
        product = jnp.matmul(x, constrain(self.kernel[...], ("embed", None)), preferred_element_type=jnp.float32)
        return product[:, 0] + self.bias[...].astype(jnp.float32)


class Head(nnx.Module):
    """ReLU layers of these widths and a logit above."""

    def __init__(self, width: int, hidden: Sequence[int], *, rngs: nnx.Rngs):
        self.tower = Mlp(width, hidden, 0.0, rngs=rngs)
        self.out = Logit(self.tower.width, rngs=rngs)

    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, " batch"]:
        return self.out(self.tower(x))


class Heads(nnx.Module):
    """A `Head` for each task; logits float32, [batch] of a single task and [batch, outputs] of several."""

    def __init__(self, width: int, hidden: Sequence[int], outputs: int, *, rngs: nnx.Rngs):
        self.outputs = outputs
        for at in range(outputs):
            setattr(self, f"head_{at}", Head(width, hidden, rngs=rngs))

    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch ..."]:
        found = [getattr(self, f"head_{at}")(x) for at in range(self.outputs)]
        return found[0] if self.outputs == 1 else jnp.stack(found, axis=-1)
