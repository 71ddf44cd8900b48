"""A tiny decoder with a spread-out distribution, its prompts, and what full forwards say about its texts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxops.core.sharding import map_named
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import Decoder
from jaxops.objectives.token_logprobs import token_logprobs
from jaxops.rl.sampled import Prompt

VOCAB = 60


@functools.cache
def tiny(vocab=VOCAB, seed=0):
    """(decoder, parameters) whose distributions are far from flat and depend on the whole text."""
    decoder = Decoder(Architecture(vocab=vocab, dim=32, layers=2, heads=4, kv_heads=2, hidden=64, length=128))
    larger = lambda path, x: x * (12 if x.ndim > 1 and not path.endswith("scale") else 1)
    return decoder, map_named(larger, decoder.init(jax.random.key(seed)))


def prompts(count, shortest=1, longest=30, vocab=VOCAB, seed=0):
    """Prompts of several buckets, with examples numbered from 100."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(shortest, longest + 1, count)
    return [Prompt(rng.integers(0, vocab, size).tolist(), 100 + at) for at, size in enumerate(sizes)]


@functools.cache
def _forward():
    decoder, _ = tiny()

    def scores(params, tokens, targets, segment):
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden = decoder.hidden(params, tokens, segment, position)
        found = token_logprobs(hidden, decoder.head(params), targets, real_vocab=decoder.real_vocab)
        return found.logprobs, decoder.logits(params, hidden)

    return jax.jit(scores)


def full(params, prompt, completion, width=128):
    """(logprobs [completion], logits [completion, vocab]) of a completion by one full forward of the whole text."""
    text = np.concatenate([np.asarray(prompt.ids, np.int32), completion])
    tokens, targets, segment = (np.zeros((1, width), np.int32) for _ in range(3))
    tokens[0, : len(text)], targets[0, : len(text) - 1], segment[0, : len(text)] = text, text[1:], 1
    logprobs, logits = _forward()(params, tokens, targets, segment)
    which = slice(len(prompt.ids) - 1, len(text) - 1)
    return np.asarray(logprobs)[0, which], np.asarray(logits)[0, which, :VOCAB]
