"""One layer of the decoder: attention and a feed-forward layer on the residual stream, as an NNX module."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from jaxops.core.random import dropout
from jaxops.core.sharding import Rule, constrain
from jaxops.core.sums import wide_dtype
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.attention import attend
from jaxops.models.decoder.rope import rotate
from jaxops.models.dense import Dense

LAYER_RULES: list[Rule] = [
    (r"^layers/.*(query|key|value|gate|up)/kernel$", (None, "fsdp", "tensor")),
    (r"^layers/.*(out|down)/kernel$", (None, "tensor", "fsdp")),
]
"""Sharding of the kernels, stacked over layers."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
_STREAM = ("batch", "length", "embed")


class Norm(nnx.Module):
    """Normalisation of the last dimension with statistics in float32 (float64 for an input of that dtype).

    Root mean square (Zhang & Sennrich 2019), or layer normalisation (Ba et al. 2016). With `rms_one_plus` the scale is
    stored around zero, and one is added in that dtype.

    Args:
      architecture: names the kind of norm, and its epsilon.
      dim: width of the input.
      rngs: unused; modules take it.
    """

    def __init__(self, architecture: Architecture, dim: int, *, rngs: nnx.Rngs):
        del rngs
        self.kind, self.eps = architecture.norm, architecture.norm_eps
        self.scale = nnx.Param(jnp.zeros((dim,)) if self.kind == "rms_one_plus" else jnp.ones((dim,)))
        if self.kind == "layer":
            self.bias = nnx.Param(jnp.zeros((dim,)))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        wide = x.astype(wide_dtype(x.dtype))
        row = lambda vector: vector[...].astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        wide = wide * (row(self.scale) + 1.0 if self.kind == "rms_one_plus" else row(self.scale))
        if self.kind == "layer":
            wide = wide + row(self.bias)
        return wide.astype(x.dtype)


class DecoderAttention(nnx.Module):
    """The projections of attention; `attend` stands between them."""

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs):
        self.config = a
        normal, small = nnx.initializers.normal(0.02), nnx.initializers.normal(0.02 / (2 * a.layers) ** 0.5)
        queries, keys = a.heads * a.width, a.key_heads * a.width

        def into(outputs: int) -> Dense:
            return Dense(a.dim, outputs, ("embed", "heads"), bias=a.qkv_bias, kernel_init=normal, rngs=rngs)

        self.query, self.key, self.value = into(queries), into(keys), into(keys)
        self.out = Dense(queries, a.dim, ("heads", "embed"), bias=a.out_bias, kernel_init=small, rngs=rngs)
        if a.qk_norm:
            self.query_norm, self.key_norm = Norm(a, a.width, rngs=rngs), Norm(a, a.width, rngs=rngs)

    def project(
        self, x: Float[Array, "batch length dim"], turned: Float[Array, "two batch length half"] | None
    ) -> tuple[
        Float[Array, "batch length heads width"],
        Float[Array, "batch length key_heads width"],
        Float[Array, "batch length key_heads width"],
    ]:
        """Returns queries, keys and values of every head, normalised and rotated as the architecture says."""

        def split(y: Array, length: str | None) -> Array:
            y = y.reshape(*y.shape[:2], -1, self.config.width)
            return constrain(y, ("batch", length, "heads", None))

        # Each device sees all keys: where the length is sharded they are gathered here, once a layer.
        q, k, v = split(self.query(x), "length"), split(self.key(x), None), split(self.value(x), None)
        if self.config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        return (q, k, v) if turned is None else (rotate(q, turned), rotate(k, turned), v)

    def __call__(self, attended: Float[Array, "batch length heads width"]) -> Float[Array, "batch length dim"]:
        """Projects what the heads saw back to the residual stream."""
        return self.out(attended.reshape(*attended.shape[:2], -1))


class DecoderFeedForward(nnx.Module):
    """Two linear layers with a nonlinearity between them, which a third layer may multiply (Shazeer 2020)."""

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs):
        self.config = a
        normal, small = nnx.initializers.normal(0.02), nnx.initializers.normal(0.02 / (2 * a.layers) ** 0.5)
        if a.gated:
            self.gate = Dense(a.dim, a.inner, ("embed", "mlp"), bias=a.mlp_bias, kernel_init=normal, rngs=rngs)
        self.up = Dense(a.dim, a.inner, ("embed", "mlp"), bias=a.mlp_bias, kernel_init=normal, rngs=rngs)
        self.down = Dense(a.inner, a.dim, ("mlp", "embed"), bias=a.mlp_bias, kernel_init=small, rngs=rngs)

    def __call__(self, x: Float[Array, "batch length dim"]) -> Float[Array, "batch length dim"]:
        activation = ACTIVATIONS[self.config.activation]
        inner = activation(self.gate(x)) * self.up(x) if self.config.gated else activation(self.up(x))
        return self.down(constrain(inner, ("batch", "length", "mlp")))


class DecoderBlock(nnx.Module):
    """One layer. `project` and `finish` are its two halves; a cache of keys and values stands between them."""

    def __init__(self, a: Architecture, rngs: nnx.Rngs):
        self.config = a
        self.attention, self.mlp = DecoderAttention(a, rngs=rngs), DecoderFeedForward(a, rngs=rngs)
        self.norm_attention, self.norm_mlp = Norm(a, a.dim, rngs=rngs), Norm(a, a.dim, rngs=rngs)
        if a.post_norms:
            self.norm_attention_out, self.norm_mlp_out = Norm(a, a.dim, rngs=rngs), Norm(a, a.dim, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        turned: Float[Array, "two batch length half"] | None,
        mask: Bool[Array, "batch length seen"],
        keys: Key[Array, " batch"] | None,
    ) -> tuple[Float[Array, "batch length dim"], tuple[Array, Array]]:
        """Returns the residual stream after this layer, and the layer's keys and values.

        The mask lets no position see one after it.
        """
        q, k, v = self.project(x, turned)
        return self.finish(x, self.attend(q, k, v, mask, causal=True), keys), (k, v)

    def project(
        self, x: Float[Array, "batch length dim"], turned: Float[Array, "two batch length half"] | None
    ) -> tuple[Array, Array, Array]:
        """Returns queries, keys and values of these positions."""
        return self.attention.project(self.norm_attention(x), turned)

    def attend(
        self, q: Array, k: Array, v: Array, mask: Bool[Array, "batch length seen"], causal: bool = False
    ) -> Array:
        """Returns what every head sees.

        Args:
          q: queries.
          k: keys.
          v: values.
          mask: True where a position may be seen.
          causal: whether no position sees one after it.
        """
        return attend(q, k, v, mask, self.config.scale, self.config.attention_cap, causal=causal)

    def finish(
        self,
        x: Float[Array, "batch length dim"],
        attended: Float[Array, "batch length heads width"],
        keys: Key[Array, " batch"] | None,
    ) -> Float[Array, "batch length dim"]:
        """Adds what the heads saw, and then the feed-forward layer, to the residual stream."""
        rate = self.config.dropout
        added = self.attention(attended)
        if self.config.post_norms:
            added = self.norm_attention_out(added)
        x = constrain(x + dropout(added, rate, keys, 0), _STREAM)
        added = self.mlp(self.norm_mlp(x))
        if self.config.post_norms:
            added = self.norm_mlp_out(added)
        return constrain(x + dropout(added, rate, keys, 1), _STREAM)
