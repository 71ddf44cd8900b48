"""Scaled dot-product attention with grouped queries: cuDNN's kernel where it covers the case, else plain products."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxops.core.sums import wide_dtype

MOST_FLASH_WIDTH = 128
"""The largest width of a head in cuDNN's kernel, forward and backward on all GPUs that have it."""


def attend(
    query: Float[Array, "batch length heads width"],
    key: Float[Array, "batch seen key_heads width"],
    value: Float[Array, "batch seen key_heads width"],
    mask: Bool[Array, "batch length seen"],
    scale: float,
    cap: float | None = None,
) -> Float[Array, "batch length heads width"]:
    """Returns for each query the mean of the values that it may see, weighted by softmax, in the dtype of `query`.

    Args:
      query: queries; each group of heads / key_heads heads in order shares one key head.
      key: keys.
      value: values.
      mask: whether a query may see a key; a query that may see nothing gets some finite vector.
      scale: factor on the products of queries and keys.
      cap: soft cap c of the logits, c tanh(x / c).
    """
    plain = functools.partial(_plain, scale=scale, cap=cap)
    if cap is None and _cudnn_covers(query, key):
        flash = functools.partial(_flash, scale=scale)
        # Chosen when it is compiled: on a machine with a GPU there are meshes of CPU devices too.
        return jax.lax.platform_dependent(query, key, value, mask, cuda=flash, default=plain)
    return plain(query, key, value, mask)


def _plain(query: Array, key: Array, value: Array, mask: Array, *, scale: float, cap: float | None) -> Array:
    batch, length, heads, width = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, width)
    logits = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=wide_dtype(query.dtype)) * scale
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    # The floor is finite because a row that may see nothing (padding) must stay finite.
    probs = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -1e9), axis=-1).astype(value.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", probs, value).reshape(batch, length, heads, width)


def _flash(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    *,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask[:, None], scale=scale, implementation=implementation
    )


def _cudnn_covers(query: Array, key: Array) -> bool:
    """Returns whether cuDNN's flash kernel computes this: on an NVIDIA GPU (Ampere or later), in half precision.

    The kernel reads a mask as a bias, whose gradient it has for even lengths alone.
    """
    width, half = query.shape[-1], query.dtype in (jnp.bfloat16, jnp.float16)
    if not half or width % 8 or width > MOST_FLASH_WIDTH or query.shape[1] % 2 or key.shape[1] % 2:
        return False
    device = jax.devices()[0]
    cuda = "cuda" in str(getattr(device.client, "platform_version", ""))
    return cuda and float(getattr(device, "compute_capability", 0)) >= 8.0
