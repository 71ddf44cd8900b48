"""The estimate of temporaries: what loops stack up, and three times the largest other array, of examples alone."""

import jax
import jax.numpy as jnp

from jaxops.plan.estimate import Shards, temporaries

ROWS, SHARDS, LAYERS, DIM = 32, 4, 3, 7


def test_stacked_states_of_a_backward_pass_and_the_largest_array():
    def loss(kernels, x):
        def layer(x, kernel):
            return jax.checkpoint(lambda x: jnp.tanh(x @ kernel))(x), None

        return jnp.sum(jax.lax.scan(layer, x, kernels)[0])

    kernels, x = jnp.zeros((LAYERS, DIM, DIM)), jnp.zeros((ROWS, DIM))
    traced = jax.make_jaxpr(jax.grad(loss))(kernels, x)
    shards = Shards({(LAYERS, DIM, DIM): 1, (DIM, DIM): 1}, frozenset({ROWS}), SHARDS)
    one = ROWS * DIM * 4 // SHARDS
    assert temporaries(traced, shards) == LAYERS * one + 3 * one


def test_parameters_and_what_is_fused_are_left_out():
    def program(kernel, x):
        return x.astype(jnp.bfloat16) + jnp.zeros((ROWS, 1), jnp.bfloat16), kernel * 2

    traced = jax.make_jaxpr(program)(jnp.zeros((64, 64)), jnp.zeros((ROWS, DIM)))
    shards = Shards({(64, 64): 1}, frozenset({ROWS}), 1)
    assert temporaries(traced, shards) == 3 * ROWS * DIM * 2  # the sum alone
