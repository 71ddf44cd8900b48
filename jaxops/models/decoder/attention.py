"""Scaled dot-product attention with grouped queries: cuDNN's kernel where it covers the case, else plain products."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxops.core.sums import wide_dtype

BLOCKS, SHORTEST_BLOCK = 4, 32
"""The number of blocks that queries are divided into where no key after a query is seen, and the least queries in one.

Keys after a block are left out, which is 3/8 of all pairs with four blocks. More blocks would leave out little more and
take longer to compile.
"""
MOST_FLASH_WIDTH = 128
"""The largest width of a head in cuDNN's kernel, forward and backward on all GPUs that have it."""


def attend(
    query: Float[Array, "batch length heads width"],
    key: Float[Array, "batch seen key_heads width"],
    value: Float[Array, "batch seen key_heads width"],
    mask: Bool[Array, "batch length seen"],
    scale: float,
    cap: float | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "batch length heads width"]:
    """Returns for each query the mean of the values that it may see, weighted by softmax, in the dtype of `query`.

    No array of [length, seen] outlives a causal call of some length: the backward pass computes the weights again.

    Args:
      query: queries; each group of heads / key_heads heads in order shares one key head.
      key: keys.
      value: values.
      mask: whether a query may see a key; a query that may see nothing gets some finite vector.
      scale: factor on the products of queries and keys.
      cap: soft cap c of the logits, c tanh(x / c).
      causal: whether the mask lets no query see a key that stands after it, so that such pairs are not computed.
    """
    plain = functools.partial(_plain, scale=scale, cap=cap)
    if causal and query.shape[1] >= BLOCKS * SHORTEST_BLOCK:
        plain = functools.partial(_in_blocks, plain)
    if cap is None and _cudnn_covers(query, key):
        flash = functools.partial(_flash, scale=scale)
        # Chosen when it is compiled: on a machine with a GPU there are meshes of CPU devices too.
        return jax.lax.platform_dependent(query, key, value, mask, cuda=flash, default=plain)
    return plain(query, key, value, mask)


def _in_blocks(
    plain: Callable[[Array, Array, Array, Array], Array], query: Array, key: Array, value: Array, mask: Array
) -> Array:
    """Attends a block of queries at a time to the keys up to the last of them."""
    size = -(-query.shape[1] // BLOCKS)
    # Weights of all layers would be most of the memory of a step. In a scan nothing merges the two computations.
    one = jax.checkpoint(plain, prevent_cse=False)
    parts = [
        one(query[:, at : at + size], key[:, : at + size], value[:, : at + size], mask[:, at : at + size, : at + size])
        for at in range(0, query.shape[1], size)
    ]
    return jnp.concatenate(parts, axis=1)


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
