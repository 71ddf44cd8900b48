"""The compiled programs of sampling: filling slots with prompts, and decoding a segment of tokens in all slots.

A slot holds one text and its keys and values. All shapes are static, so that each program is compiled once (filling:
once for each length of prompts). The slots are donated from call to call. What a slot samples depends on its own text
and its own key, never on other slots. Tested in tests/rl/test_sample.py.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from jaxops.core.mesh import batch_axes, serialise_dispatch
from jaxops.core.random import sampling_keys
from jaxops.core.sharding import Axes, logical_axes, logical_spec, on_whole_arrays
from jaxops.core.turn import Program
from jaxops.rl.distribution import Drawn, draw
from jaxops.rl.options import SampleOptions

Cache = Any
"""A tree of arrays."""
CACHE_AXES = (None, "batch", None, "heads")
"""Logical names of the first dimensions of a cache whose model says nothing: [layers, batch, room, heads, width]."""


class Generating(Protocol):
    """A model that can be sampled from. The leaves of its cache are [anything, batch, ...].

    Padding rows of the vocabulary, if there are any, have logits of -1e9. A model may have more: `rules` shard its
    parameters, `cache_axes` are logical names of the first dimensions of its cache, and `prepare(params)` returns the
    parameters in the form that sampling reads.
    """

    def empty_cache(self, batch: int, room: int, dtype: Any) -> Cache:
        """Returns a cache for `batch` texts of up to `room` tokens."""
        ...

    def prefill(
        self, params: Any, tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"], room: int
    ) -> tuple[Cache, Float[Array, "batch vocab"]]:
        """Reads texts into a new cache, and returns it with the logits after each text's last token.

        Args:
          params: the parameters.
          tokens: token ids, each text from the left, padding after it.
          lengths: the number of tokens of each text.
          room: the number of tokens that the cache has room for.
        """
        ...

    def decode(
        self, params: Any, cache: Cache, token: Int[Array, " batch"], place: Int[Array, " batch"]
    ) -> tuple[Cache, Float[Array, "batch vocab"]]:
        """Reads one more token of each text, and returns the cache with it and the logits after it.

        Args:
          params: the parameters.
          cache: keys and values of the tokens before.
          token: the next token of each text.
          place: its position in the text.
        """
        ...


class Slots(NamedTuple):
    """The state of all slots on the devices.

    Attributes:
      cache: keys and values.
      token: the token that was sampled last, which the cache does not have yet.
      place: the position of `token` in its text.
      sampled: the number of tokens that were sampled.
      limit: the number of tokens at which the text ends.
      done: whether the text has ended, or there is none.
      keys: the key of each completion.
    """

    cache: Cache
    token: Int[Array, " slots"]
    place: Int[Array, " slots"]
    sampled: Int[Array, " slots"]
    limit: Int[Array, " slots"]
    done: Bool[Array, " slots"]
    keys: Key[Array, " slots"]


class Sampling(NamedTuple):
    """The outcome of one call of the sampling program.

    Attributes:
      drawn: tokens and log-probabilities of each slot in order, [slots, segment].
      made: the number of tokens in each slot.
      ended: true in slots whose text ended with an end token.
      done: true in all slots whose text has ended, or that have none.
    """

    drawn: Drawn
    made: Int[Array, " slots"]
    ended: Bool[Array, " slots"]
    done: Bool[Array, " slots"]


class Filling(NamedTuple):
    """Prompts on their way into slots, from the host.

    Attributes:
      tokens: token ids of the prompts that are read, padded at their ends.
      lengths: number of tokens of each.
      source: for each slot the row of the prompt that it gets; -1 leaves the slot as it is.
      limit: for each slot the number of tokens that are sampled at most.
      names: for each slot the id of the prompt, copy, redraw and turn.
      seed: the seed of the run.
      step: the step of the loop.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    source: np.ndarray
    limit: np.ndarray
    names: np.ndarray
    seed: np.uint32
    step: np.int32


class Programs:
    """The programs for one model, mesh and set of shapes.

    Args:
      model: the model.
      mesh: the mesh of the parameters and the cache.
      slots: number of texts at a time.
      room: number of tokens that the cache of a text has room for.
      segment: number of tokens that `decode` samples at most.
      options: the distribution of tokens.
      ends: ids that end a text.
      dtype: the dtype of the cache.
      logical: mesh axes of logical names, over the defaults.
      name: begins the names of the programs.
    """

    def __init__(
        self,
        model: Generating,
        mesh: Mesh,
        slots: int,
        room: int,
        segment: int,
        options: SampleOptions,
        ends: tuple[int, ...],
        dtype: Any,
        logical: Mapping[str, Axes],
        name: str = "sample",
    ) -> None:
        self._model, self._mesh, self._room, self._segment = model, mesh, room, segment
        self._options, self._ends, self._logical = options, ends, logical
        with self._on_mesh():
            cache = jax.eval_shape(lambda: model.empty_cache(slots, room, dtype))
            named = getattr(model, "cache_axes", CACHE_AXES)
            names = lambda x: [*named, *[None] * x.ndim][: x.ndim]
            specs = jax.tree.map(lambda x: logical_spec(x.shape, names(x), mesh), cache)
            row = logical_spec((slots,), ["batch"], mesh)
        lies: Any = Slots(specs, *[row] * 6)  # type: ignore[arg-type]

        def empty() -> Slots:
            zero = lambda: jnp.zeros(slots, jnp.int32)
            keys = jax.random.split(jax.random.key(0), slots)
            cache = model.empty_cache(slots, room, dtype)
            return Slots(cache, zero(), zero(), zero(), zero(), jnp.ones(slots, bool), keys)

        self._slots, self._name = slots, name
        self._empty = jax.jit(on_whole_arrays(f"{name}_empty", empty, lies, logical))
        self._fill = jax.jit(on_whole_arrays(f"{name}_fill", self._filled, (lies, P()), logical), donate_argnums=1)
        self._decode = jax.jit(on_whole_arrays(f"{name}_decode", self._decoded, (lies, P()), logical), donate_argnums=1)

    def empty(self) -> Slots:
        """Returns slots without texts."""
        return self._called(self._empty)

    def fill(self, params: Any, slots: Slots, filling: Filling) -> tuple[Slots, Sampling]:
        """Reads prompts into slots and samples the first token of each; donates `slots`."""
        found: tuple[Slots, Sampling] = self._called(self._fill, params, slots, filling)
        return found

    def decode(self, params: Any, slots: Slots, halt: np.ndarray) -> tuple[Slots, Sampling]:
        """Samples up to `segment` tokens in every slot whose text has not ended; donates `slots`.

        Args:
          params: the parameters.
          slots: the slots.
          halt: true in slots whose text the host has ended.
        """
        found: tuple[Slots, Sampling] = self._called(self._decode, params, slots, halt)
        return found

    def programs(self, params: Any, reading: int, length: int, prompts: int) -> list[Program]:
        """Returns the programs that sample for so many prompts if every completion is as long as it may be.

        Args:
          params: the parameters, abstract or not.
          reading: number of prompts that are read at a time.
          length: number of tokens that prompts are padded to.
          prompts: number of prompts.
        """
        with self._on_mesh():
            slots = jax.eval_shape(self._empty)
        row, rows = np.zeros(self._slots, np.int32), np.ones(reading, np.int32)
        names = np.zeros((self._slots, 4), np.uint32)
        filling = Filling(np.zeros((reading, length), np.int32), rows, row, row, names, np.uint32(0), np.int32(0))
        rounds = -(-prompts // self._slots) * self._options.max_tokens
        beside = {"weights of sampling": params, "KV cache": slots.cache}
        halt = np.zeros(self._slots, bool)
        return [
            Program(f"{self._name}_fill", self._fill, (params, slots, filling), -(-prompts // reading), beside),
            Program(f"{self._name}_decode", self._decode, (params, slots, halt), rounds, beside),
        ]

    def _called(self, program: Callable[..., Any], *given: Any) -> Any:
        with self._on_mesh():
            found = program(*given)
        return jax.block_until_ready(found) if serialise_dispatch(self._mesh) else found

    @contextlib.contextmanager
    def _on_mesh(self) -> Iterator[None]:
        with jax.set_mesh(self._mesh), logical_axes(self._logical):
            yield

    def _filled(self, params: Any, slots: Slots, given: Any) -> tuple[Slots, Sampling]:
        part, logits = self._model.prefill(params, given.tokens, given.lengths, self._room)
        taken, row = given.source >= 0, jnp.maximum(given.source, 0)

        def insert(old: Array, new: Array) -> Array:
            # A choice over all slots, and no scatter: XLA gathers the operand of a scatter along a sharded dimension.
            mine = taken.reshape(1, -1, *[1] * (old.ndim - 2))
            return jnp.where(mine, jnp.take(new, row, axis=1).astype(old.dtype), old)

        choose = lambda new, old: jnp.where(taken, new, old)
        example, copy, redraw, turn = given.names.T
        keys = choose(sampling_keys(given.seed, given.step, example, copy, redraw, turn), slots.keys)
        drawn = draw(jnp.take(logits, row, axis=0), self._options, _at(keys, jnp.zeros_like(row)))
        limit = choose(given.limit, slots.limit)
        ended = taken & self._is_end(drawn.token)
        found = Slots(
            cache=jax.tree.map(insert, slots.cache, part),
            token=choose(drawn.token, slots.token),
            place=choose(jnp.take(given.lengths, row), slots.place),
            sampled=choose(jnp.ones_like(row), slots.sampled),
            limit=limit,
            done=choose(ended | (limit <= 1), slots.done),
            keys=keys,
        )
        column = Drawn(*(x[:, None] for x in drawn))
        return found, Sampling(column, made=taken.astype(jnp.int32), ended=ended, done=found.done)

    def _decoded(self, params: Any, slots: Slots, halt: Bool[Array, " slots"]) -> tuple[Slots, Sampling]:
        slots = slots._replace(done=slots.done | halt)
        size = slots.token.shape[0]
        blank = lambda dtype: jnp.zeros((size, self._segment), dtype)
        first = Sampling(
            Drawn(blank(jnp.int32), blank(jnp.float32), blank(jnp.float32)),
            made=jnp.zeros(size, jnp.int32),
            ended=jnp.zeros(size, bool),
            done=slots.done,
        )

        def go_on(carry: tuple[Array, Slots, Sampling]) -> Array:
            at, slots, _ = carry
            return (at < self._segment) & ~jnp.all(slots.done)

        def one(carry: tuple[Array, Slots, Sampling]) -> tuple[Array, Slots, Sampling]:
            at, slots, found = carry
            cache, logits = self._model.decode(params, slots.cache, slots.token, slots.place)
            drawn = draw(logits, self._options, _at(slots.keys, slots.sampled))
            live = ~slots.done
            count = slots.sampled + live.astype(jnp.int32)
            ended = live & self._is_end(drawn.token)
            moved = Slots(
                cache=cache,
                token=jnp.where(live, drawn.token, slots.token),
                place=slots.place + live.astype(jnp.int32),
                sampled=count,
                limit=slots.limit,
                done=slots.done | ended | (count >= slots.limit),
                keys=slots.keys,
            )
            return at + 1, moved, _recorded(found, at, drawn, live, ended, moved.done)

        _, slots, found = jax.lax.while_loop(go_on, one, (jnp.int32(0), slots, first))
        return slots, found

    def _is_end(self, token: Int[Array, " slots"]) -> Bool[Array, " slots"]:
        if not self._ends:
            return jnp.zeros(token.shape, bool)
        return jnp.any(token[:, None] == jnp.asarray(self._ends, jnp.int32)[None], axis=1)


def _recorded(found: Sampling, at: Array, drawn: Drawn, live: Array, ended: Array, done: Array) -> Sampling:
    """Writes down a token of each slot that was live; these are always its next."""
    write = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, jnp.where(live, new, jnp.zeros_like(new)), at, 1)
    return Sampling(
        jax.tree.map(write, found.drawn, drawn),
        made=found.made + live.astype(jnp.int32),
        ended=found.ended | ended,
        done=done,
    )


def _at(keys: Key[Array, " slots"], position: Int[Array, " slots"]) -> Key[Array, " slots"]:
    """Returns the keys of the tokens at these positions of their completions."""
    return jax.vmap(jax.random.fold_in)(keys, position)


def rows_divided(mesh: Mesh, least: int) -> int:
    """Returns the smallest number of rows, `least` or more, that the batch axes of the mesh divide."""
    ways = int(np.prod([mesh.shape[axis] for axis in batch_axes(mesh)], dtype=int))
    return -(-least // ways) * ways
