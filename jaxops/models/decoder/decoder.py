"""The decoder: hidden states and logits of packed texts, and a cache of keys and values for sampling.

Layers are scanned over parameters stacked [layers, ...]. What differs between layers (windows, wavelengths) is made
once for each kind of layer, and each layer picks its kind's. Tested in tests/models/test_decoder.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jaxops.core.failures import UserError
from jaxops.core.random import dropout
from jaxops.core.sharding import Rule, constrain
from jaxops.core.sums import wide_dtype
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.block import LAYER_RULES, DecoderBlock, Norm
from jaxops.models.decoder.rope import turns
from jaxops.models.functional import Functional, Params

PAD_ROWS = 128
"""The vocabulary is padded to a multiple of this number of rows, so that any mesh divides it."""
MASKED = -1e9
"""The logit of a row of the vocabulary that is padding."""

Cache = dict[str, Array]
"""Keys and values of every layer, {"key", "value"}: [layers, batch, room, key_heads, width]."""


class _Kinds(NamedTuple):
    """Facts of the distinct kinds of layers, [kinds, ...], and the kind of each layer."""

    turned: Float[Array, "kinds two batch length half"] | None
    mask: Bool[Array, "kinds batch length seen"]
    kind: tuple[int, ...]

    def of(self, kind: Int[Array, ""] | int) -> tuple[Array | None, Array]:
        """Returns the rotation and the mask of a kind of layers."""
        if len(self.mask) == 1:
            return None if self.turned is None else self.turned[0], self.mask[0]
        return None if self.turned is None else self.turned[kind], self.mask[kind]


_Layer = tuple[Params, Int[Array, ""] | int, Int[Array, ""] | int]
"""The parameters of one layer, its kind and its number."""


class _Ends(nnx.Module):
    """The parameters before and after the layers."""

    def __init__(self, a: Architecture, rows: int, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(rows, a.dim, embedding_init=normal, rngs=rngs)
        if a.positions == "learned":
            self.position = nnx.Embed(a.length, a.dim, embedding_init=normal, rngs=rngs)
        self.norm = Norm(a, a.dim, rngs=rngs)
        if not a.tied:
            self.head = nnx.Linear(a.dim, rows, use_bias=False, kernel_init=normal, rngs=rngs)


class Decoder:
    """A decoder of this architecture; parameters are plain dicts and every method is pure.

    Tokens are [batch, length]. `segment` numbers the texts that are packed into a row from 1, and is 0 at padding:
    attention is causal and stays within one segment. `position` counts within the segment, from 0. Padding may stand
    anywhere; no id marks it.

    Attributes:
      config: the architecture.
      real_vocab: number of token ids.
      rows: number of rows of the vocabulary, with its padding.
      soft_cap: soft cap of the logits over the vocabulary, or None.
      rules: sharding rules of the parameters.
      shapes: shapes and dtypes of the parameters.
      padding: parameters that are larger than they look, each with an explanation.

    Raises:
      UserError: the architecture has no vocabulary, or its values do not go together.
    """

    def __init__(self, config: Architecture):
        if config.vocab is None:
            raise UserError("model.vocab: expected the number of token ids")
        if bad := config.all_problems():
            raise UserError("\n".join(f"model.{path}: {message}" for path, message in bad))
        self.config, self.real_vocab, self.soft_cap = config, config.vocab, config.final_cap
        self.rows = -(-config.vocab // PAD_ROWS) * PAD_ROWS
        self._ends = Functional.of(_Ends, config, self.rows)
        self._block = Functional.of(DecoderBlock, config)
        self._norm = Functional(lambda rngs: Norm(config, config.dim, rngs=rngs))
        self.rules: list[Rule] = [
            (r"^embed/embedding$", ("tensor", "fsdp")),
            (r"^position/embedding$", (None, "fsdp")),
            (r"^head/kernel$", ("fsdp", "tensor")),
            *LAYER_RULES,
            (r"(bias|scale)$", ()),
        ]
        self.shapes = jax.eval_shape(self.init, jax.random.key(0))
        extra = f"{self.rows - config.vocab} of {self.rows} rows are padding"
        padded = ("embed/embedding",) if config.tied else ("embed/embedding", "head/kernel")
        self.padding = dict.fromkeys(padded, extra) if self.rows > config.vocab else {}

    def init(self, key: Key[Array, ""]) -> Params:
        """Draws fresh parameters: normal(0.02), what is added to the stream smaller by sqrt(2 layers), biases zero."""
        ends, layers = jax.random.split(key)
        each = jax.random.split(layers, self.config.layers)
        return {**self._ends.init(ends), "layers": jax.vmap(self._block.init)(each)}

    def unstacked(self, params: Params) -> Params:
        """Returns the parameters with one dict for each layer, which every method takes too; not for training.

        A scan copies each layer's weights out of the stack before it reads them, and reading them is what decoding one
        token at a time consists of. A loop over separate weights does without: on CPU, SmolLM2-135M decodes one text
        about twice as fast, for some ten seconds more of compilation.
        """
        one = lambda layer: jax.tree.map(lambda x: x[layer], params["layers"])
        return {**params, "layers": tuple(map(one, range(self.config.layers)))}

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "batch length"],
        segment: Int[Array, "batch length"],
        position: Int[Array, "batch length"],
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch length dim"]:
        """Returns the hidden state after each token, after the final norm; at padding it means nothing.

        With learned positions, a position beyond them makes its row NaN.

        Args:
          params: the parameters.
          tokens: token ids.
          segment: the text of each token, from 1; 0 is padding.
          position: the position of each token in its text, from 0.
          keys: a key for each row, from `example_keys`, for dropout; None turns it off.
        """
        kinds = self._kinds(position, _packed(segment), position[:, :, None] - position[:, None, :])
        x = self._embedded(params, tokens, position)
        x = dropout(x, self.config.dropout, keys, 2)

        def layer(x: Array, each: _Layer) -> tuple[Array, None]:
            held, kind, index = each
            own = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            return self._block.bind(held)(x, *kinds.of(kind), own)[0], None

        x, _ = _over_layers(_remat(layer, self.config.remat), x, params["layers"], kinds)
        return self._norm.bind(params["norm"])(x)

    def head(self, params: Params) -> Float[Array, "dim rows"]:
        """Returns the kernel over the vocabulary, gathered over fsdp; with tied embeddings it is their transpose."""
        if self.config.tied:
            return constrain(params["embed"]["embedding"], ("vocab", "embed")).T
        return constrain(params["head"]["kernel"], ("embed", "vocab"))

    def logits(self, params: Params, hidden: Float[Array, "*rows dim"]) -> Float[Array, "*rows vocab"]:
        """Returns the logits over the vocabulary, soft-capped; its padding rows have `MASKED`.

        They are float32, or float64 where the hidden states are.
        """
        # The product itself gives float32: rounded logits would tie.
        wide = wide_dtype(hidden.dtype)
        scores = jnp.einsum("...d,dv->...v", hidden, self.head(params), preferred_element_type=wide)
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        real = (jnp.arange(self.rows) < self.real_vocab).reshape((1,) * (scores.ndim - 1) + (-1,))
        return jnp.where(real, scores, jnp.asarray(MASKED, scores.dtype))

    def empty_cache(self, batch: int, room: int, dtype: Any = jnp.float32) -> Cache:
        """Returns a cache for `batch` texts of up to `room` tokens."""
        a = self.config
        shape = (a.layers, batch, room, a.key_heads, a.width)
        return {"key": _cached(jnp.zeros(shape, dtype)), "value": _cached(jnp.zeros(shape, dtype))}

    def prefill(
        self, params: Params, tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"], room: int
    ) -> tuple[Cache, Float[Array, "batch vocab"]]:
        """Reads texts into a new cache, and returns it with the logits after each text's last token.

        Args:
          params: the parameters.
          tokens: token ids, each text from the left, padding after it.
          lengths: number of tokens of each text, at least 1.
          room: number of tokens that the cache has room for, at least `length`.

        Raises:
          UserError: there is less room than tokens, or more than the learned positions.
        """
        length = tokens.shape[1]
        if room < length:
            raise UserError(f"a cache with room for {room} tokens cannot take texts of {length}")
        self._require_positions(room)
        position = jnp.broadcast_to(jnp.arange(length, dtype=tokens.dtype), tokens.shape)
        segment = (position < lengths[:, None]).astype(jnp.int32)
        kinds = self._kinds(position, _packed(segment), position[:, :, None] - position[:, None, :])
        x = self._embedded(params, tokens, position)

        def layer(x: Array, each: _Layer) -> tuple[Array, tuple[Array, Array]]:
            held, kind, _ = each
            return self._block.bind(held)(x, *kinds.of(kind), None)

        x, (key, value) = _over_layers(layer, x, params["layers"], kinds)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
        after = ((0, 0), (0, 0), (0, room - length), (0, 0), (0, 0))
        cache = {"key": _cached(jnp.pad(key, after)), "value": _cached(jnp.pad(value, after))}
        return cache, self.logits(params, self._norm.bind(params["norm"])(last))[:, 0]

    def decode(
        self, params: Params, cache: Cache, token: Int[Array, " batch"], place: Int[Array, " batch"]
    ) -> tuple[Cache, Float[Array, "batch vocab"]]:
        """Reads one more token of each text, and returns the cache with it and the logits after it.

        A text whose place is not in the cache has NaN: its token was not kept.

        Args:
          params: the parameters.
          cache: keys and values of the tokens before; donate it.
          token: the next token of each text.
          place: its position in the text, from 0 and below the cache's room.
        """
        batch, room = cache["key"].shape[1:3]
        self._require_positions(room)
        distance = place[:, None, None] - jnp.arange(room, dtype=place.dtype)[None, None]
        kinds = self._kinds(place[:, None], distance >= 0, distance)
        x = self._embedded(params, token[:, None], place[:, None])
        rows = jnp.arange(batch)

        def layer(carry: tuple[Array, Array, Array], each: _Layer) -> tuple[Any, None]:
            x, key, value = carry
            held, kind, index = each
            block = self._block.bind(held)
            turned, mask = kinds.of(kind)
            q, k, v = block.project(x, turned)
            key = key.at[index, rows, place].set(k[:, 0].astype(key.dtype))
            value = value.at[index, rows, place].set(v[:, 0].astype(value.dtype))
            attended = block.attend(q, key[index].astype(q.dtype), value[index].astype(q.dtype), mask)
            return (block.finish(x, attended, None), key, value), None

        carry = (x, cache["key"], cache["value"])
        (x, key, value), _ = _over_layers(layer, carry, params["layers"], kinds)
        cache = {"key": _cached(key), "value": _cached(value)}
        logits = self.logits(params, self._norm.bind(params["norm"])(x))[:, 0]
        return cache, jnp.where(((place >= 0) & (place < room))[:, None], logits, jnp.nan)

    def _embedded(
        self, params: Params, tokens: Int[Array, "batch length"], position: Int[Array, "batch length"]
    ) -> Float[Array, "batch length dim"]:
        # Constrained before the look-up, so that under fsdp the matrices are gathered and not whole batches.
        x = constrain(params["embed"]["embedding"], ("vocab", "embed"))[tokens]
        if self.config.embed_scale:
            x = x * jnp.asarray(self.config.dim**0.5, x.dtype)
        if self.config.positions == "learned":
            table = constrain(params["position"]["embedding"], (None, "embed"))
            # A position beyond those that were learned makes the row NaN: a plain look-up would silently take the last.
            x = x + table.at[position].get(mode="fill", fill_value=jnp.nan)
        return constrain(x, ("batch", "length", "embed"))

    def _kinds(
        self,
        position: Int[Array, "batch length"],
        seen: Bool[Array, "batch length seen"],
        distance: Int[Array, "batch length seen"],
    ) -> _Kinds:
        """Returns rotations and masks of the distinct kinds of layers; `distance` is of query to key, in tokens."""
        of_layers = self.config.layer_kinds
        distinct = tuple(dict.fromkeys(of_layers))
        window = self.config.window or 0
        masks = [seen & (distance < window) if kind == "window" else seen for kind in distinct]
        turned = None
        if self.config.positions == "rope":
            turned = jnp.stack([turns(self.config, kind, position) for kind in distinct])
        return _Kinds(turned, jnp.stack(masks), tuple(distinct.index(kind) for kind in of_layers))

    def _require_positions(self, length: int) -> None:
        """Refuses a cache with room for more positions than were learned."""
        if self.config.positions == "learned" and length > self.config.length:
            raise UserError(f"room for {length} tokens: the model has learned {self.config.length} positions")


def build_decoder(architecture: Architecture, vocab: int | None = None) -> Decoder:
    """Builds the decoder of an architecture; where its vocabulary is null, it is the tokenizer's `vocab`.

    Raises:
      UserError: neither has a vocabulary, the architecture's is smaller, or its values do not go together.
    """
    rows = architecture.vocab if architecture.vocab is not None else vocab
    if rows is None:
        raise UserError("model.vocab: expected the number of token ids, since there is no tokenizer that knows it")
    if vocab is not None and vocab > rows:
        raise UserError(f"model.vocab: {rows}, but the tokenizer has {vocab} ids, and the model reads them all")
    return Decoder(dataclasses.replace(architecture, vocab=rows))


def _packed(segment: Int[Array, "batch length"]) -> Bool[Array, "batch length length"]:
    """Returns which tokens a token may see: itself and earlier ones of its own text."""
    causal = jnp.tril(jnp.ones((segment.shape[1],) * 2, bool))[None]
    return causal & (segment[:, :, None] == segment[:, None, :]) & (segment > 0)[:, None, :]


def _over_layers(layer: Any, carry: Any, layers: Any, kinds: _Kinds) -> tuple[Any, Any]:
    """Runs `layer(carry, (parameters, kind, number))` over all layers: a scan, or a loop where they are unstacked."""
    if isinstance(layers, Mapping):
        kind = jnp.asarray(kinds.kind, jnp.int32)
        return jax.lax.scan(layer, carry, (layers, kind, jnp.arange(len(kinds.kind))))
    outs = []
    for index, held in enumerate(layers):
        carry, out = layer(carry, (held, kinds.kind[index], index))
        outs.append(out)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *outs)


def _cached(x: Array) -> Array:
    return constrain(x, (None, "batch", None, "heads", None))


def _remat(layer: Any, policy: str) -> Any:
    """Wraps the layer so that the backward pass recomputes all of it (`full`) or all but its matmuls (`dots`)."""
    if policy == "none":
        return layer
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    # In a scan nothing merges the two computations, so that the barrier against it would only cost.
    return jax.checkpoint(layer, policy=keep, prevent_cse=False)
