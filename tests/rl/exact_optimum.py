"""A task small enough to know its optimum: 2 prompts, 3 words and an end, 3 tokens; every completion is enumerated.

The policy that maximises E[r] - beta KL(pi || reference) is pi* = reference * exp(r / beta) / Z, and its value is
J* = beta log Z. What a run reached is its KL(pi || pi*), and its gain over the reference as a share of J*'s.
"""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxops.core.fresh_state import init_state
from jaxops.core.mesh import make_mesh
from jaxops.core.sharding import map_named
from jaxops.core.state import join
from jaxops.core.step import build_step
from jaxops.core.turn import Turn
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.decoder.unrolled import Unrolled
from jaxops.models.policy import PolicyModel
from jaxops.rl.collect import Collector, Scored
from jaxops.rl.options import SampleOptions
from jaxops.rl.ptx import PTX, PtxRows, ptx_extra, with_ptx
from jaxops.rl.sample import Sampler
from jaxops.rl.step import PolicyStep, UpdateParts, policy_extras

END, WORDS, TOKENS = 0, 4, 3
PROMPTS = ((1, 2), (3, 1, 2))
"""No prompt is one word over and over: attention sees how often a word comes only beside another one."""
WIDTH = 8


def completions() -> list[tuple[int, ...]]:
    """Returns every completion: those that end, and those that are cut at `TOKENS`."""
    words = range(1, WORDS)
    ended = [(*body, END) for size in range(TOKENS) for body in itertools.product(words, repeat=size)]
    return ended + list(itertools.product(words, repeat=TOKENS))


ALL = completions()


def rewards(seed: int = 0) -> np.ndarray:
    """Returns the reward of each prompt and completion."""
    return np.random.default_rng(seed).normal(size=(len(PROMPTS), len(ALL)))


class Transformer(Decoder):
    """A small decoder that tells its states apart from the start, and is far enough from uniform for a KL to matter."""

    def spread(self, params):
        larger = lambda path, x: x * (3 if x.ndim > 1 and not path.endswith("scale") else 1)
        found = map_named(larger, params)
        return {**found, "head": {"kernel": params["head"]["kernel"] * 2}} if "head" in params else found


def transformer(layers: int) -> Transformer:
    """Returns the decoder of the task."""
    return Transformer(Architecture(vocab=WORDS, dim=32, layers=layers, heads=4, hidden=64, length=16, tied=False))


class PrefixTable(Decoder):
    """A policy without a network: a table of logits by the whole text so far, which fits whatever is asked of it.

    It stands where any other decoder does, in training and in sampling. The hidden state is the row of logits, the head
    begins as the identity, and the number of a text is that of its words as digits.
    """

    room = max(map(len, PROMPTS)) + TOKENS

    def __init__(self):
        self.rules, self.padding, self.soft_cap, self.real_vocab = [("", ())], {}, None, WORDS
        self.config = SimpleNamespace(dim=WORDS)

    def init(self, key):
        table = 0.4 * jax.random.normal(key, ((WORDS + 1) ** self.room, WORDS))
        return {"table": table, "head": {"kernel": jnp.eye(WORDS)}}

    def spread(self, params):
        return params

    def digits(self, token, place):
        """Returns what a word at a place adds to the number of its text; places beyond the room are padding."""
        power = (WORDS + 1) ** jnp.minimum(place, self.room - 1)
        return jnp.where(place < self.room, (token + 1) * power, 0)

    def hidden(self, params, tokens, segment, position, keys=None):
        number = jnp.cumsum(jnp.where(segment > 0, self.digits(tokens, position), 0), axis=1)
        return params["table"][number]

    def head(self, params):
        return jnp.asarray(params["head"]["kernel"])

    def empty_cache(self, batch, room, dtype):
        return jnp.zeros((1, batch), jnp.int32)

    def prefill(self, params, tokens, lengths, room):
        place = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        number = jnp.sum(jnp.where(place < lengths[:, None], self.digits(tokens, place), 0), axis=1)
        return number[None], params["table"][number] @ params["head"]["kernel"]

    def decode(self, params, cache, token, place):
        number = cache[0] + self.digits(token, place)
        return number[None], params["table"][number] @ params["head"]["kernel"]


@dataclasses.dataclass
class Reached:
    """What a run reached: KL(pi || pi*), the share of the possible gain, and the largest ratio0 of its steps."""

    kl: float
    gain: float
    ratio0: float
    metrics: dict[str, float]


class Problem:
    """The task with a policy, ready to run.

    Args:
      algorithm: the algorithm.
      seed: of parameters, sampling and order.
      value: the kind of values.
      batch: number of completions of a step.
      temperature: of sampling.
      lr: learning rate.
      layers: of the transformer; 0 takes a table of logits instead.
      mesh: the mesh; one device by default.
      tx: the optimizer, in the place of Adam with a learning rate that falls to zero.
      text: a source of rows of text, which updates learn from with the weight `coef`.
      coef: see `text`.
    """

    def __init__(
        self,
        algorithm,
        *,
        seed=0,
        value=None,
        batch=256,
        temperature=1.0,
        lr=3e-3,
        mesh=None,
        rewards_seed=0,
        steps=120,
        clip=1.0,
        layers=2,
        tx=None,
        text=None,
        coef=0.5,
    ):
        self.algorithm, self.temperature, self.table = algorithm, temperature, rewards(rewards_seed)
        self.mesh = make_mesh(data=1, devices=jax.devices()[:1]) if mesh is None else mesh
        self.steps = steps
        decoder = transformer(layers) if layers else PrefixTable()
        kind = value if algorithm.has_values else None
        self.model = PolicyModel(decoder, value=kind, reference=True)
        group = batch // len(PROMPTS)
        self.algorithm = dataclasses.replace(algorithm, group=group) if hasattr(algorithm, "group") else algorithm
        tx = tx or optax.adam(
            optax.linear_schedule(lr, 0.0, steps * algorithm.epochs * algorithm.minibatches), eps=1e-5
        )
        extras = policy_extras(algorithm)
        objective = algorithm.objective(self.model, temperature, TOKENS)
        if text is not None:
            objective, extras = with_ptx(objective, self.model, coef), extras | {PTX: ptx_extra()}
            text = PtxRows(text, batch // algorithm.minibatches, algorithm.epochs * group, self.mesh)
        update = build_step(
            objective,
            tx,
            self.mesh,
            seed=seed,
            rules=self.model.rules,
            extras=extras,
            advance_step=False,
            reads=(),
            clip=clip,
        )
        sampler = Sampler(
            Unrolled(decoder) if layers else decoder,
            self.mesh,
            slots=batch,
            room=WIDTH + TOKENS,
            segment=TOKENS,
            options=SampleOptions(max_tokens=TOKENS, temperature=temperature),
            ends=(END,),
        )
        collector = Collector(
            self.model, sampler, self.score, width=WIDTH, completions=batch, seed=seed, mesh=self.mesh
        )
        parts = UpdateParts(update, self.mesh, lambda: None)
        self.step = PolicyStep(parts, self.model, self.algorithm, collector, text=text)

        def init(key):
            return {name: decoder.spread(part) for name, part in self.model.init(key).items()}

        self.state = init_state(
            init,
            jax.random.key(seed),
            tx,
            self.mesh,
            self.model.rules,
            frozen=self.model.frozen,
            extras=extras,
            dtypes=self.model.dtypes,
        )

    def score(self, completed, journal, poll) -> Scored:
        """Looks each completion up in the table of rewards."""
        del journal, poll
        found = [
            self.table[prompt.example, ALL.index(tuple(completed.sampled.completion(row).tolist()))]
            for row, prompt in enumerate(completed.prompts)
        ]
        return Scored(np.array(found, np.float32), np.ones(len(found), bool), {})

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Returns all prompts."""
        del cursor, size
        tokens = np.zeros((len(PROMPTS), WIDTH), np.int32)
        for row, prompt in enumerate(PROMPTS):
            tokens[row, : len(prompt)] = prompt
        length = np.array([len(prompt) for prompt in PROMPTS], np.int32)
        return {"id": np.arange(len(PROMPTS), dtype=np.int32), "tokens": tokens, "length": length}

    def run(self, steps: int | None = None) -> Reached:
        """Runs the steps and measures what they reached."""
        reference = self.probabilities(join(self.state.params, self.state.frozen), "reference")
        ratio0, metrics = 0.0, {}
        with jax.set_mesh(self.mesh):
            for _ in range(steps or self.steps):
                turn = Turn(self.batch, lambda: False, 0, len(PROMPTS))
                self.state, sums = self.step(self.state, self.batch(0, 2), None, turn)
                ratio0 = max(ratio0, float(sums["ratio0"].value()))
                metrics = {name: entry.value() for name, entry in sums.items()}
        policy = self.probabilities(join(self.state.params, self.state.frozen), "policy")
        return Reached(*self.measured(policy, reference), ratio0, metrics)

    def measured(self, policy: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
        """Returns the mean KL(pi || pi*) over prompts, and the gain."""
        beta = self.algorithm.kl.coef
        weights = reference * np.exp(self.table / beta)
        best = beta * np.log(weights.sum(axis=1))
        optimum = weights / weights.sum(axis=1, keepdims=True)
        value = lambda pi: (pi * self.table).sum(axis=1) - beta * (pi * np.log(pi / reference)).sum(axis=1)
        kl = (policy * np.log(policy / optimum)).sum(axis=1).mean()
        start = value(reference)
        return float(kl), float((value(policy) - start).sum() / (best - start).sum())

    def probabilities(self, params: Any, part: str) -> np.ndarray:
        """Returns the exact probability of every completion after every prompt, [prompts, completions], float64."""
        rows = [(prompt, whole) for prompt in PROMPTS for whole in ALL]
        tokens = np.zeros((len(rows), WIDTH + TOKENS), np.int32)
        completion, mask = np.zeros((len(rows), TOKENS), np.int32), np.zeros((len(rows), TOKENS), np.float64)
        length = np.array([len(prompt) for prompt, _ in rows], np.int32)
        for row, (prompt, whole) in enumerate(rows):
            tokens[row, : len(prompt)] = prompt
            tokens[row, len(prompt) : len(prompt) + len(whole)] = whole
            completion[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        batch = {"tokens": tokens, "length": length, "end": length + mask.sum(axis=1).astype(np.int32)}
        batch = {**{name: jnp.asarray(x) for name, x in batch.items()}, "completion": jnp.asarray(completion)}
        held = jax.tree.map(jnp.asarray, jax.device_get(params))
        if part == "reference":
            found = self.model.reference_logprobs(held, batch, self.temperature)
        else:
            found = self.model.scores(held, batch, self.temperature, self.model.hidden(held, batch)).logprobs
        logprobs = (np.asarray(found, np.float64) * mask).sum(axis=1)
        return np.exp(logprobs).reshape(len(PROMPTS), len(ALL))
