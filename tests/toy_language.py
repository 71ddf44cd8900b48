"""A language model that compiles at once (an embedding, one dense layer, a head, tied or not), and ragged texts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from toys import regression_task

from jaxops.core.random import dropout
from jaxops.core.sharding import constrain


@dataclasses.dataclass(frozen=True)
class ToyLanguage:
    """tanh((token + token before it, within its segment) @ kernel), whose vocabulary is padded to 128 rows."""

    real_vocab: int = 100
    dim: int = 16
    tied: bool = True
    soft_cap: float | None = None
    drop: float = 0.25
    scale: float = 0.5

    rules = [
        (r"embedding$", ("tensor", "fsdp")),
        (r"head/kernel$", ("fsdp", "tensor")),
        (r"dense/kernel$", ("fsdp", "tensor")),
        (r"bias$", ()),
    ]
    padding: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def rows(self):
        return -(-self.real_vocab // 128) * 128

    @property
    def shapes(self):
        return jax.eval_shape(self.init, jax.random.key(0))

    def init(self, key):
        draw = lambda at, *shape: self.scale * jax.random.normal(jax.random.fold_in(key, at), shape)
        params = {
            "embedding": draw(0, self.rows, self.dim),
            "dense": {"kernel": draw(1, self.dim, self.dim), "bias": draw(2, self.dim)},
        }
        return params if self.tied else params | {"head": {"kernel": draw(3, self.dim, self.rows)}}

    def hidden(self, params, tokens, segment, position, key=None):
        x = constrain(params["embedding"], ("vocab", "embed"))[tokens]
        before = (position > 0) & (segment > 0)
        x = x + jnp.where(before[..., None], jnp.roll(x, 1, axis=1), jnp.zeros((), x.dtype))
        x = dropout(x, self.drop, key, site=0)
        x = x @ constrain(params["dense"]["kernel"], ("embed", "mlp")) + params["dense"]["bias"][None, None]
        return constrain(jnp.tanh(x), ("batch", "length", "embed"))

    def head(self, params):
        kernel = params["embedding"].T if self.tied else params["head"]["kernel"]
        return constrain(kernel, ("embed", "vocab"))


@dataclasses.dataclass(frozen=True)
class Texts:
    """Packed rows of two segments and padding; targets of prompts and padding are not trained, nor whole examples."""

    real_vocab: int = 100
    length: int = 12
    examples: int = 10**6

    def batch(self, cursor, size):
        rng = np.random.default_rng(cursor)
        first = rng.integers(2, self.length // 2, size)[:, None]
        last = rng.integers(self.length // 2 + 2, self.length + 1, size)[:, None]
        place = np.arange(self.length)[None]
        segment = np.where(place < first, 1, np.where(place < last, 2, 0)).astype(np.int32)
        tokens = np.where(segment > 0, rng.integers(0, self.real_vocab, (size, self.length)), 0).astype(np.int32)
        mask = rng.choice([0, 0.5, 1, 2], (size, self.length)) * (segment > 0)
        mask[1::4] = 0  # every fourth example: one whole microbatch of four
        weight = np.ones(size, np.float32)
        weight[-size // 8 :] = 0
        return {
            "id": np.arange(cursor, cursor + size, dtype=np.int32),
            "tokens": tokens,
            "targets": np.where(mask > 0, rng.integers(0, self.real_vocab, tokens.shape), -100).astype(np.int32),
            "mask": mask.astype(np.float32),
            "segment": segment,
            "position": np.where(segment == 2, place - first, np.where(segment == 1, place, 0)).astype(np.int32),
            "weight": weight,
        }


def language_task(objective, model=None, source=None, **changes):
    """The toy with `objective(model)` as a task, without a config."""
    model = model or ToyLanguage()
    source = source or Texts(model.real_vocab)
    return regression_task(objective(model), source, model=model, rules=model.rules, **changes)


def numpy_scores(hidden, head, targets, real_vocab, soft_cap=None, temperature=1.0):
    """Logprobs, entropies, log-sums, mean logprobs and best tokens from full logits, float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)[:, :real_vocab]
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    logits = logits / temperature
    most = logits.max(-1, keepdims=True)
    lse = (most + np.log(np.exp(logits - most).sum(-1, keepdims=True)))[..., 0]
    every = logits - lse[..., None]
    inside = (targets >= 0) & (targets < real_vocab)
    picked = np.take_along_axis(every, np.where(inside, targets, 0)[..., None], -1)[..., 0]
    return np.where(inside, picked, np.nan), -(np.exp(every) * every).sum(-1), lse, every.mean(-1), logits.argmax(-1)


@dataclasses.dataclass(frozen=True)
class ToyReward(ToyLanguage):
    """The toy with a score that is read at the last token of each row."""

    tied: bool = True

    def init(self, key):
        params = super().init(key)
        return params | {"score": {"kernel": self.scale * jax.random.normal(jax.random.fold_in(key, 9), (self.dim,))}}

    def score(self, params, tokens, segment, position, key=None):
        hidden = self.hidden(params, tokens, segment, position, key)
        after = jnp.pad(segment[:, 1:], ((0, 0), (0, 1)))
        last = ((segment > 0) & (after == 0)).astype(hidden.dtype)
        return jnp.einsum("btd,bt,d->b", hidden, last, constrain(params["score"]["kernel"], ("embed",)))


@dataclasses.dataclass(frozen=True)
class ToyHeads(ToyReward):
    """The toy with several heads: each has the toy's score times its number."""

    ensemble: int = 1

    def scores(self, params, tokens, segment, position, keys=None):
        score = self.score(params, tokens, segment, position, keys)
        return score[:, None] * (1 + jnp.arange(self.ensemble, dtype=score.dtype))[None]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """k texts an example, of their own lengths after a prompt; with labels, margins, references, and the best of k."""

    real_vocab: int = 100
    length: int = 12
    k: int = 2
    examples: int = 10**6

    def batch(self, cursor, size):
        rng = np.random.default_rng(cursor)
        ends = rng.integers(5, self.length + 1, (size, self.k, 1))
        place = np.broadcast_to(np.arange(self.length), (size, self.k, self.length))
        segment = (place < ends).astype(np.int32)
        mask = segment * (place >= 3).astype(np.float32)
        draw = lambda: rng.integers(0, self.real_vocab, segment.shape)
        weight = rng.choice([0.5, 1, 2], size).astype(np.float32)
        weight[1::4] = 0
        return {
            "id": np.arange(cursor, cursor + size, dtype=np.int32),
            "tokens": np.where(segment > 0, draw(), 0).astype(np.int32),
            "targets": np.where(mask > 0, draw(), -100).astype(np.int32),
            "mask": mask.astype(np.float32),
            "segment": segment,
            "position": (place * segment).astype(np.int32),
            "weight": weight,
            "label": rng.choice([0, 0.3, 0.5, 0.9, 1], size).astype(np.float32),
            "margin": rng.random(size).astype(np.float32),
            "reference": (-3.0 * rng.gamma(4, 1, (size, 2))).astype(np.float32),
            "best": rng.integers(0, self.k, size).astype(np.int32),
        }
