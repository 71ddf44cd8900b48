"""The decoder with its layers apart computes what transformers computes, from its cache at every position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_fixtures import NAMES, full, opened

from jaxops.core.failures import UserError
from jaxops.core.mesh import make_mesh
from jaxops.core.sharding import parameter_shardings
from jaxops.models.decoder.unrolled import Unrolled

LENGTH = 16


@pytest.mark.parametrize("name", NAMES)
def test_cached_decoding_is_the_full_forward_at_every_position(name):
    decoder, params, tokens, _ = opened(name)
    model, tokens = Unrolled(decoder), jnp.asarray(tokens)
    prepared = model.prepare(params)
    where = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    expected = full(name)(params, tokens, *where)
    lengths, rows = jnp.asarray([3, 1, 6]), jnp.arange(3)
    start = jnp.where(jnp.arange(6)[None] < lengths[:, None], tokens[:, :6], 7)  # padding is some real token
    cache, logits = jax.jit(model.prefill, static_argnums=3)(prepared, start, lengths, LENGTH)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, model.empty_cache(3, LENGTH))
    step = jax.jit(model.decode, donate_argnums=1)
    for moved in range(10):
        place = lengths + moved
        np.testing.assert_allclose(logits, expected[rows, place - 1], rtol=0, atol=1e-5)
        cache, logits = step(prepared, cache, tokens[rows, place], place)
    np.testing.assert_allclose(logits, expected[rows, lengths + 9], rtol=0, atol=1e-5)


def test_kernels_are_sharded_as_in_the_decoder():
    decoder, params, _, _ = opened("llama3")
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    model = Unrolled(decoder)
    stacked = parameter_shardings(params, decoder.rules, mesh)
    apart = parameter_shardings(model.prepare(params), model.rules, mesh)
    for layer in apart["layers"]:
        same = jax.tree.map(lambda one, both: tuple(one.spec) == tuple(both.spec)[1:], layer, stacked["layers"])
        assert all(jax.tree.leaves(same))


def test_more_positions_than_were_learned_are_refused():
    decoder, params, _, _ = opened("gpt2")
    model, tokens = Unrolled(decoder), jnp.zeros((1, 4), jnp.int32)
    prepared, one = model.prepare(params), jnp.ones(1, jnp.int32)
    with pytest.raises(UserError, match="40 tokens: the model has learned 32 positions"):
        model.prefill(prepared, tokens, one, 40)
    with pytest.raises(UserError, match="room for 2 tokens cannot take texts of 4"):
        model.prefill(prepared, tokens, one, 2)
