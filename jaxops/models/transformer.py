"""A small causal transformer block with dropout per example and logical axes on activations and kernels."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from jaxops.core.random import dropout
from jaxops.core.sharding import Rule, constrain
from jaxops.models.dense import Dense

BLOCK_RULES: list[Rule] = [
    (r"attention/(query|key|value)/kernel$", ("fsdp", "tensor")),
    (r"attention/out/kernel$", ("tensor", "fsdp")),
    (r"mlp/up/kernel$", ("fsdp", "tensor")),
    (r"mlp/down/kernel$", ("tensor", "fsdp")),
]

_normal = nnx.initializers.normal(0.02)


class LayerNorm(nnx.Module):
    """Layer normalisation of the last dimension with statistics in float32 for any input dtype (Ba et al. 2016).

    (The layer of flax 0.12 fails in bfloat16 under strict promotion.)
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        del rngs
        self.scale, self.bias = nnx.Param(jnp.ones((dim,))), nnx.Param(jnp.zeros((dim,)))

    def __call__(self, x: Float[Array, "batch length dim"]) -> Float[Array, "batch length dim"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)
        return normal.astype(x.dtype) * self.scale[None, None] + self.bias[None, None]


class Attention(nnx.Module):
    """Multi-head self-attention with dropout on its probabilities (Vaswani et al. 2017).

    Args:
      dim: width of input and output.
      heads: number of heads; it divides `dim`.
      rate: dropout rate.
      rngs: source of randomness for the parameters.
    """

    def __init__(self, dim: int, heads: int, rate: float, *, rngs: nnx.Rngs):
        self.heads, self.rate = heads, rate
        self.query = Dense(dim, dim, ("embed", "heads"), kernel_init=_normal, rngs=rngs)
        self.key = Dense(dim, dim, ("embed", "heads"), kernel_init=_normal, rngs=rngs)
        self.value = Dense(dim, dim, ("embed", "heads"), kernel_init=_normal, rngs=rngs)
        self.out = Dense(dim, dim, ("heads", "embed"), kernel_init=_normal, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        mask: Bool[Array, "batch length length"],
        keys: Key[Array, " batch"] | None,
        site: int,
    ) -> Float[Array, "batch length dim"]:
        def split(y: Array) -> Array:
            y = y.reshape(*y.shape[:2], self.heads, -1)
            return constrain(y, ("batch", "length", "heads", None))

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scale = q.shape[-1] ** -0.5
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
        # The floor is finite because a row that may see nothing (padding) must stay finite.
        probs = jax.nn.softmax(jnp.where(mask[:, None], logits, -1e9), axis=-1).astype(x.dtype)
        probs = dropout(probs, self.rate, keys, site)
        out = jnp.einsum("bhqk,bkhd->bqhd", probs, v)
        return self.out(out.reshape(x.shape))


class FeedForward(nnx.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden: int, *, rngs: nnx.Rngs):
        self.up = Dense(dim, hidden, ("embed", "mlp"), kernel_init=_normal, rngs=rngs)
        self.down = Dense(hidden, dim, ("mlp", "embed"), kernel_init=_normal, rngs=rngs)

    def __call__(self, x: Float[Array, "batch length dim"]) -> Float[Array, "batch length dim"]:
        return self.down(constrain(jax.nn.gelu(self.up(x)), ("batch", "length", "mlp")))


class Block(nnx.Module):
    """Attention and feed-forward layers with residuals, normalised before (`pre`) or after (`post`) each.

    Args:
      dim: width of input and output.
      heads: number of attention heads; it divides `dim`.
      hidden: width of the feed-forward layer.
      rate: dropout rate.
      norm: `pre` or `post`.
      rngs: source of randomness for the parameters.
    """

    def __init__(self, dim: int, heads: int, hidden: int, rate: float, norm: str, *, rngs: nnx.Rngs):
        self.rate, self.pre = rate, norm == "pre"
        self.attention = Attention(dim, heads, rate, rngs=rngs)
        self.mlp = FeedForward(dim, hidden, rngs=rngs)
        self.norm_attention = LayerNorm(dim, rngs=rngs)
        self.norm_mlp = LayerNorm(dim, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        mask: Bool[Array, "batch length length"],
        keys: Key[Array, " batch"] | None,
        site: int,
    ) -> Float[Array, "batch length dim"]:
        names = ("batch", "length", "embed")
        if self.pre:
            x = x + dropout(self.attention(self.norm_attention(x), mask, keys, site), self.rate, keys, site + 1)
            x = constrain(x, names)
            return constrain(x + dropout(self.mlp(self.norm_mlp(x)), self.rate, keys, site + 2), names)
        attended = dropout(self.attention(x, mask, keys, site), self.rate, keys, site + 1)
        x = constrain(self.norm_attention(x + attended), names)
        return constrain(self.norm_mlp(x + dropout(self.mlp(x), self.rate, keys, site + 2)), names)
