"""The decoder for sampling: every layer has parameters and a cache of its own, so that no step copies them.

In a scan over stacked layers each step copies the layer's weights and keys out of the stack; where one token is read at
a time that costs more than the products. Keys and values lie head by head, as one query reads them.
Tested in tests/models/test_unrolled.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxops.core.failures import UserError
from jaxops.core.sharding import Rule, constrain
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.functional import Params

Caches = dict[str, tuple[Array, ...]]
"""Keys and values of each layer, {"key", "value"}: [1, batch, key_heads, room, width]."""


class Unrolled:
    """A decoder with its layers apart; it computes what the decoder computes, to rounding.

    Args:
      decoder: the decoder.

    Attributes:
      real_vocab: number of token ids.
      rules: sharding rules of the parameters that `prepare` returns.
      cache_axes: logical names of the first dimensions of the cache.

    Example:
      model = Unrolled(decoder)
      cache, logits = model.prefill(model.prepare(params), tokens, lengths, room=256)
    """

    cache_axes: tuple[str | None, ...] = (None, "batch", "heads")

    def __init__(self, decoder: Decoder):
        self._decoder, self.real_vocab = decoder, decoder.real_vocab
        self.rules: list[Rule] = [
            (pattern, axes[1:] if pattern.startswith("^layers/") else axes) for pattern, axes in decoder.rules
        ]

    def prepare(self, params: Params) -> Params:
        """Returns the decoder's parameters with a dict for each layer, in a tuple, in place of stacked layers."""
        layer = lambda at: jax.tree.map(lambda x: x[at], params["layers"])
        return {**params, "layers": tuple(map(layer, range(self._decoder.config.layers)))}

    def empty_cache(self, batch: int, room: int, dtype: Any = jnp.float32) -> Caches:
        """Returns a cache for `batch` texts of up to `room` tokens."""
        a = self._decoder.config
        shape = (1, batch, a.key_heads, room, a.width)
        return {name: tuple(_cached(jnp.zeros(shape, dtype)) for _ in range(a.layers)) for name in ("key", "value")}

    def prefill(
        self, params: Params, tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"], room: int
    ) -> tuple[Caches, Float[Array, "batch vocab"]]:
        """Reads texts into a new cache, and returns it with the logits after each text's last token.

        Args:
          params: the parameters, from `prepare`.
          tokens: token ids, each text from the left, padding after it.
          lengths: number of tokens of each text, at least 1.
          room: number of tokens that the cache has room for, at least `length`.

        Raises:
          UserError: there is less room than tokens, or more than the learned positions.
        """
        decoder, length = self._decoder, tokens.shape[1]
        if room < length:
            raise UserError(f"a cache with room for {room} tokens cannot take texts of {length}")
        decoder._require_positions(room)
        position = jnp.broadcast_to(jnp.arange(length, dtype=tokens.dtype), tokens.shape)
        distance = position[:, :, None] - position[:, None, :]
        # Padding follows the text, so that no token of the text sees it; what padding sees is never read.
        kinds = decoder._kinds(position, distance >= 0, distance)
        x = decoder._embedded(params, tokens, position)
        found: dict[str, list[Array]] = {"key": [], "value": []}
        for at, held in enumerate(params["layers"]):
            x, (key, value) = decoder._block.bind(held)(x, *kinds.of(kinds.kind[at]), None)
            for name, new in (("key", key), ("value", value)):
                by_head = jnp.swapaxes(new, 1, 2)[None]
                after = ((0, 0), (0, 0), (0, 0), (0, room - length), (0, 0))
                found[name].append(_cached(jnp.pad(by_head, after)))
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
        logits = decoder.logits(params, decoder._norm.bind(params["norm"])(last))[:, 0]
        return {name: tuple(each) for name, each in found.items()}, logits

    def decode(
        self, params: Params, cache: Caches, token: Int[Array, " batch"], place: Int[Array, " batch"]
    ) -> tuple[Caches, Float[Array, "batch vocab"]]:
        """Reads one more token of each text, and returns the cache with it and the logits after it.

        Args:
          params: the parameters, from `prepare`.
          cache: keys and values of the tokens before; donate it.
          token: the next token of each text.
          place: its position in the text, below the cache's room.
        """
        decoder, a = self._decoder, self._decoder.config
        room = cache["key"][0].shape[3]
        decoder._require_positions(room)
        distance = place[:, None, None] - jnp.arange(room, dtype=place.dtype)[None, None]
        kinds = decoder._kinds(place[:, None], distance >= 0, distance)
        x = decoder._embedded(params, token[:, None], place[:, None])
        found: dict[str, list[Array]] = {"key": [], "value": []}
        for at, held in enumerate(params["layers"]):
            block = decoder._block.bind(held)
            turned, mask = kinds.of(kinds.kind[at])
            q, k, v = block.project(x, turned)
            key, value = _written(cache["key"][at], k, place), _written(cache["value"][at], v, place)
            attended = _attend_one(q[:, 0], key[0], value[0], mask[:, 0], a.scale, a.attention_cap)
            x = block.finish(x, attended[:, None], None)
            found["key"].append(key)
            found["value"].append(value)
        logits = decoder.logits(params, decoder._norm.bind(params["norm"])(x))[:, 0]
        return {name: tuple(each) for name, each in found.items()}, logits


def _cached(x: Array) -> Array:
    return constrain(x, (None, "batch", "heads", None, None))


def _written(cache: Array, new: Float[Array, "batch 1 key_heads width"], place: Int[Array, " batch"]) -> Array:
    """Writes the keys of one token of each text; row by row, which is local where the batch is sharded."""
    write = jax.vmap(lambda rows, one, at: rows.at[:, at].set(one.astype(rows.dtype)))
    return _cached(write(cache[0], new[:, 0], place)[None])


def _attend_one(
    query: Float[Array, "batch heads width"],
    key: Float[Array, "batch key_heads room width"],
    value: Float[Array, "batch key_heads room width"],
    seen: Bool[Array, "batch room"],
    scale: float,
    cap: float | None,
) -> Float[Array, "batch heads width"]:
    """Returns for one query of each text the mean of the values that it sees, weighted by softmax, as `attend` does.

    These are products of a matrix and a vector, bound by reading the cache. XLA fuses sums of products into one pass;
    for a `dot` on a CPU it would copy the cache first, and multiply slowly.
    """
    batch, heads, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, 1, width).astype(jnp.float32)
    logits = jnp.sum(grouped * key[:, :, None].astype(jnp.float32), axis=-1) * scale
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    probs = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -1e9), axis=-1)
    found = jnp.sum(probs[..., None] * value[:, :, None].astype(jnp.float32), axis=3)
    return found.reshape(batch, heads, width).astype(query.dtype)
