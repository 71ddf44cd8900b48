"""Tiny random models that `transformers` made and computed (tests/fixtures/decoder/make.py), opened by jaxops."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxops.core.weights import load_weights, targets_of, with_arrays
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.decoder.pretrained import open_pretrained

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "decoder"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


@functools.cache
def opened(name):
    """(decoder, parameters in float32, tokens [3, 16], logits [3, 16, vocab] of transformers)."""
    found = open_pretrained(FOLDER / name)
    decoder = Decoder(found.architecture)
    arrays, plan = load_weights(targets_of(decoder.shapes), [found.source])
    assert plan.left == () and plan.skipped == {}
    recorded = np.load(FOLDER / name / "logits.npz")
    params = jax.tree.map(jnp.asarray, with_arrays(decoder.shapes, arrays))
    return decoder, params, recorded["tokens"], recorded["logits"]


@functools.cache
def full(name, **changes):
    """A jitted function of (params, tokens, segment, position) to logits."""
    decoder = opened(name)[0]
    return jax.jit(lambda params, *where: decoder.logits(params, decoder.hidden(params, *where)))
