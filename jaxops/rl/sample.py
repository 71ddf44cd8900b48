"""Sampling from a language model with a cache of keys and values.

Prompts wait in a queue for one of a fixed number of slots. Prompts are read in buckets of lengths, and all slots decode
together, a segment of tokens at a time. Between segments the host looks for stops, and refills slots that are free.

The noise of a token is a function of (seed, step, example, copy, redraw, turn, position) and nothing else. So on one
mesh with the same slots, room and buckets, the tokens are bitwise the same in any order of prompts and beside any
neighbours. Other shapes or another mesh round differently: there the tokens are the same up to the first near-tie.
Tested in tests/rl/test_sample.py and tests/rl/test_sample_meshes.py.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxops.core.failures import RunFailed, UserError
from jaxops.core.interrupt import Interrupted
from jaxops.core.sharding import Axes, Rule, parameter_shardings
from jaxops.core.state import Params
from jaxops.core.turn import Program
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.rl.options import MOST_SLOTS, SampleOptions
from jaxops.rl.sampled import Growing, Prompt, Sampled
from jaxops.rl.slots import Filling, Generating, Programs, Slots, rows_divided
from jaxops.rl.stops import StopScan, special_stops

SHORTEST_BUCKET = 16
Watch = Callable[[int, str], None]
"""Is called with the number of a prompt and the text that its completion has got since the last call."""


class Sampler:
    """Samples completions of prompts; each of its programs is compiled once, at first use.

    Args:
      model: any model with `prefill`, `decode` and `empty_cache`; a decoder is fastest as `Unrolled(decoder)`.
      mesh: the mesh of the parameters and the cache.
      slots: number of texts that are decoded at a time; rounded up to what the batch axes of the mesh divide.
      room: largest number of tokens of prompt and completion together.
      segment: number of tokens between two looks of the host.
      options: the distribution of tokens, and what ends a text.
      tokenizer: for texts and stops; its `stops` are end tokens.
      ends: end tokens, in place of the tokenizer's.
      dtype: dtype of the parameters and the cache.
      rules: sharding rules of the parameters; None takes those of the model, if it has any, without fsdp.
      reading: number of prompts that are read at a time; None is a quarter of the slots.
      logical: mesh axes of the logical names in the model, over the defaults.
      name: begins the names of the compiled programs, as profiles and messages show them.

    Raises:
      UserError: an option is out of its range, or there are stops and no tokenizer.

    Example:
      sampler = Sampler(model, mesh, slots=32, room=512, options=SampleOptions(max_tokens=64, temperature=0.7))
      sampled = sampler(sampler.handoff(params), [Prompt(tokenizer.encode("Once"), example=0)], seed=0)
    """

    def __init__(
        self,
        model: Generating,
        mesh: Mesh,
        *,
        slots: int = 32,
        room: int = 1024,
        segment: int = 16,
        options: SampleOptions = SampleOptions(),
        tokenizer: Tokenizer | None = None,
        ends: Sequence[int] | None = None,
        dtype: Any = jnp.float32,
        rules: Sequence[Rule] | None = None,
        reading: int | None = None,
        logical: Mapping[str, Axes] | None = None,
        name: str = "sample",
    ) -> None:
        options.require_valid()
        for what, value in (("slots", slots), ("room", room - 1), ("segment", segment), ("reading", reading or 1)):
            if value < 1:
                raise UserError(f"sampling: {what} is too small: {value + (what == 'room')}")
        if slots > MOST_SLOTS:
            raise UserError(f"sampling: slots is too large: {slots:,}; {MOST_SLOTS:,} at most")
        segment = min(segment, room)  # no text is longer, and buffers are as wide as a segment
        if options.stop and tokenizer is None:
            raise UserError("sampling: stops are texts, so they need the tokenizer")
        self.mesh, self.room, self.options, self.tokenizer = mesh, room, options, tokenizer
        self.slots, self._dtype = rows_divided(mesh, slots), jnp.dtype(dtype)
        self._reading = rows_divided(mesh, reading or -(-self.slots // 4))
        self._eos = tuple(ends if ends is not None else () if tokenizer is None else tokenizer.stops)
        more, self._stops = special_stops(tokenizer, options.stop) if tokenizer is not None else ((), ())
        self._prepare: Callable[[Params], Params] = getattr(model, "prepare", lambda params: params)
        self._rules = list(getattr(model, "rules", ()) if rules is None else rules)
        if rules is None:  # weights stay where they are used: no token waits for them to be gathered
            self._rules = [(pattern, tuple(_without_fsdp(axes) for axes in each)) for pattern, each in self._rules]
        self._programs = Programs(
            model,
            mesh,
            self.slots,
            room,
            segment,
            options,
            tuple(dict.fromkeys([*self._eos, *more])),
            self._dtype,
            logical or {},
            name,
        )

    def handoff(self, params: Params) -> Params:
        """Casts parameters, wherever they lie, to the sampler's dtype and gives them form and place for sampling.

        A leaf that is there already is not copied, so parameters that are donated afterwards must be handed off again.
        """
        params = self._prepare(params)
        # One leaf after another: a second copy of the whole model never exists.
        return jax.tree.map(
            lambda x, where: jax.device_put(_cast(x, self._dtype), where), params, self._shardings(params)
        )

    def abstract(self, params: Params) -> Params:
        """Returns shapes, dtypes and shardings of what `handoff` makes of parameters, which may be abstract."""
        dtype = lambda x: self._dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        found = jax.eval_shape(self._prepare, params)
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, dtype(x), sharding=where), found, self._shardings(found)
        )

    def _shardings(self, params: Params) -> Any:
        """Returns where the prepared parameters lie."""
        if self._rules:
            return parameter_shardings(params, self._rules, self.mesh)
        return jax.tree.map(lambda _: NamedSharding(self.mesh, P()), params)

    def programs(self, params: Params, prompts: int, length: int) -> list[Program]:
        """Returns the compiled programs of a call, for FLOPs and warm-up: as if no completion ended early.

        Args:
          params: the parameters, from `handoff`, or abstract arrays like them.
          prompts: number of prompts.
          length: number of tokens of the longest.
        """
        return self._programs.programs(params, self._reading, self.bucket(length), prompts)

    def bucket(self, tokens: int) -> int:
        """Returns the length that prompts of so many tokens are padded to, whatever stands beside them."""
        return min(max(SHORTEST_BUCKET, 1 << (tokens - 1).bit_length()), self.room)

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        step: int = 0,
        poll: Callable[[], bool] = lambda: False,
        watch: Watch | None = None,
    ) -> Sampled:
        """Samples a completion of every prompt.

        Args:
          params: the parameters, from `handoff`.
          prompts: the prompts.
          seed: the seed of the noise.
          step: the step of the loop, which changes the noise too.
          poll: is called before every segment; true raises `Interrupted`.
          watch: gets the text of completions as they grow; needs the tokenizer.

        Raises:
          UserError: a prompt is empty, has an unknown token, or leaves no room for a token; a number of the noise is
            none of 32 bits.
          Interrupted: `poll` returned true.
          RunFailed: the model's logits are not finite.
        """
        if watch is not None and self.tokenizer is None:
            raise UserError("sampling: watching texts needs the tokenizer")
        if not 0 <= seed < 2**32 or not 0 <= step < 2**31:
            raise UserError(f"sampling: seed {seed} and step {step} must be whole numbers of 32 bits")
        limits = [self._limit(number, prompt) for number, prompt in enumerate(prompts)]
        if len({prompt.name for prompt in prompts}) < len(prompts):
            raise ValueError("sampling: two prompts have one name, and would get the same noise; number their copies")
        return _Run(self, self._programs, params, prompts, limits, seed, step).sample(poll, watch)

    def _limit(self, number: int, prompt: Prompt) -> int:
        """Returns the number of tokens that are sampled at most for a prompt."""
        length = len(prompt.ids)
        if not length:
            raise UserError(f"prompt {number}: it has no token, and a model needs one to begin with")
        largest = self.tokenizer.vocab if self.tokenizer is not None else 2**31
        if not 0 <= min(prompt.ids) <= max(prompt.ids) < largest:
            raise UserError(f"prompt {number}: it has token ids that the model does not know")
        if not all(0 <= part < 2**32 for part in prompt.name):
            raise UserError(f"prompt {number}: example, copy, redraw and turn must be whole numbers of 32 bits")
        if length >= self.room:
            raise UserError(
                f"prompt {number}: its {length:,} tokens leave no room for an answer among {self.room:,} tokens"
            )
        wanted = self.options.max_tokens if prompt.limit is None else min(prompt.limit, self.options.max_tokens)
        if wanted < 1:
            raise UserError(f"prompt {number}: expected a limit of 1 token or more, got {wanted}")
        return min(wanted, self.room - length)

    def scan(self) -> StopScan:
        """Returns a fresh scan of a completion for the stops that are texts."""
        assert self.tokenizer is not None
        return StopScan(self.tokenizer, self._stops)

    @property
    def scans(self) -> bool:
        """Whether stops must be looked for in the text."""
        return bool(self._stops)

    @property
    def reading(self) -> int:
        """The number of prompts that are read at a time."""
        return self._reading

    def is_eos(self, token: int) -> bool:
        """Returns whether a token is an end token, and not a control token that was given as a stop."""
        return token in self._eos


class _Run:
    """One call of a sampler."""

    def __init__(
        self,
        sampler: Sampler,
        programs: Programs,
        params: Params,
        prompts: Sequence[Prompt],
        limits: Sequence[int],
        seed: int,
        step: int,
    ) -> None:
        self._sampler, self._programs, self._params = sampler, programs, params
        self._prompts, self._limits, self._seed, self._step = prompts, limits, np.uint32(seed), np.int32(step)
        self._queue = collections.deque(range(len(prompts)))
        self._row_of: list[int | None] = [None] * sampler.slots
        self._found = Growing(len(prompts), min(sampler.options.max_tokens, sampler.room - 1))
        self._scans: dict[int, StopScan] = {}
        self._texts: list[str] = [""] * len(prompts)
        self._live = self._decoded = 0

    def sample(self, poll: Callable[[], bool], watch: Watch | None) -> Sampled:
        """Empties the queue."""
        slots = self._programs.empty()
        while True:
            slots = self._refilled(slots, watch)
            free = np.array([row is None for row in self._row_of])
            if free.all() and not self._queue:
                break
            if poll():
                raise Interrupted
            if free.all():  # the first tokens ended all texts
                continue
            slots, sampled = self._programs.decode(self._params, slots, free)
            got = jax.device_get(sampled)
            self._live += int(got.made.sum())
            self._decoded += int(got.made.max()) * len(free)
            self._take(got, watch)
        texts = None if self._sampler.tokenizer is None else self._texts
        return self._found.whole(texts, self._live / self._decoded if self._decoded else 1.0)

    def _refilled(self, slots: Slots, watch: Watch | None) -> Slots:
        """Fills free slots with the next prompts of the queue; those of one bucket are read together."""
        free = [slot for slot, row in enumerate(self._row_of) if row is None]
        waiting: dict[int, list[tuple[int, int]]] = {}
        for slot in free[: len(self._queue)]:
            row = self._queue.popleft()
            self._row_of[slot] = row
            waiting.setdefault(self._sampler.bucket(len(self._prompts[row].ids)), []).append((slot, row))
        for length, pairs in waiting.items():
            while pairs:
                filling, pairs = self._filling(length, pairs)
                slots, got = self._programs.fill(self._params, slots, filling)
                self._take(jax.device_get(got), watch)
        return slots

    def _filling(self, length: int, pairs: list[tuple[int, int]]) -> tuple[Filling, list[tuple[int, int]]]:
        """Returns as many prompts as are read at a time, equal ones once, and the (slot, row) that are left."""
        reading, slots = self._sampler.reading, self._sampler.slots
        tokens, lengths = np.zeros((reading, length), np.int32), np.ones(reading, np.int32)
        source, limit = np.full(slots, -1, np.int32), np.ones(slots, np.int32)
        names, read, left = np.zeros((slots, 4), np.uint32), dict[tuple[int, ...], int](), []
        for slot, row in pairs:
            prompt = self._prompts[row]
            ids = tuple(map(int, prompt.ids))
            if ids not in read and len(read) == reading:
                left.append((slot, row))
                continue
            if ids not in read:
                at = read[ids] = len(read)
                tokens[at, : len(ids)], lengths[at] = ids, len(ids)
            source[slot], limit[slot], names[slot] = read[ids], self._limits[row], prompt.name
        return Filling(tokens, lengths, source, limit, names, self._seed, self._step), left

    def _take(self, got: Any, watch: Watch | None) -> None:
        """Takes what a call sampled (a `Sampling` on the host), and frees the slots of texts that have ended."""
        for slot, row in enumerate(self._row_of):
            made = int(got.made[slot])
            if row is None or not made:
                continue
            tokens, logprobs, plain = (x[slot, :made] for x in got.drawn)
            self._require_finite(row, plain, logprobs)
            kept = self._kept(row, tokens, watch)
            self._found.add(row, tokens[:kept], logprobs[:kept], plain[:kept])
            stopped = self._scans[row].stop is not None if row in self._scans else False
            if stopped or got.done[slot]:
                self._finish(row, stopped, bool(got.ended[slot]), watch)
                self._found.dropped[row] = made - kept
                self._row_of[slot] = None

    def _kept(self, row: int, tokens: np.ndarray, watch: Watch | None) -> int:
        """Returns how many of the new tokens belong to the completion: those up to the end of a stop."""
        if watch is None and not self._sampler.scans:
            return len(tokens)
        if row not in self._scans:
            self._scans[row] = self._sampler.scan()
        scan = self._scans[row]
        kept = next((count for count, token in enumerate(tokens, 1) if scan.push(int(token))), len(tokens))
        if watch is not None and (new := scan.shown()):
            watch(row, new)
        return kept

    def _finish(self, row: int, stopped: bool, ended: bool, watch: Watch | None) -> None:
        """Writes down why a completion ended, and its text."""
        found, tokenizer = self._found, self._sampler.tokenizer
        tokens: list[int] = found.tokens[row, : found.lengths[row]].tolist()
        if stopped:
            found.stopped[row] = "stop"
        elif ended:
            found.stopped[row] = "eos" if self._sampler.is_eos(tokens[-1]) else "stop"
        if tokenizer is None:
            return
        scan = self._scans.pop(row, None)
        if scan is None:
            self._texts[row] = tokenizer.decode(tokens, skip_special=True)
            return
        scan.finish()
        if scan.stop is not None:  # broken bytes at the very end can complete a stop
            found.stopped[row] = "stop"
        self._texts[row] = scan.text
        if watch is not None and (new := scan.shown(ended=True)):
            watch(row, new)

    def _require_finite(self, row: int, plain: np.ndarray, logprobs: np.ndarray) -> None:
        """Refuses a completion whose probabilities, the model's or those that were drawn from, are no numbers.

        Raises:
          RunFailed: they are none.
        """
        if not np.isfinite(plain).all():
            raise RunFailed(
                f"sampling: the model's logits are not finite for prompt {row} (example {self._prompts[row].example}),"
                f" {int(self._found.lengths[row])} tokens after it; are the weights?"
            )
        if not np.isfinite(logprobs).all():
            raise RunFailed(
                f"sampling: the distribution that temperature, top_k, top_p and min_p leave is not finite for prompt "
                f"{row} (example {self._prompts[row].example}); the model's own is"
            )


def _without_fsdp(axes: Axes) -> Axes:
    """Leaves fsdp out of the mesh axes of one dimension."""
    kept = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis != "fsdp")
    return kept if len(kept) > 1 else kept[0] if kept else None


def _cast(x: Any, dtype: Any) -> Any:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != dtype else x
