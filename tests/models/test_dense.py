"""`Dense` is `nnx.Linear` to the bit, but for where its kernel lies when it is multiplied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxops.core.fence import unconstrained_kernels
from jaxops.core.mesh import make_mesh
from jaxops.core.sharding import named_leaves, place
from jaxops.models.dense import Dense
from jaxops.models.functional import Functional

pytestmark = pytest.mark.latest

init = nnx.initializers.glorot_normal()


def two_of(make):
    """A layer and another, so that the order of draws matters."""

    class Two(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = make(rngs), make(rngs)

        def __call__(self, x):
            return self.second(self.first(x))

    return Functional(Two)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_draws_and_products_are_those_of_linear(bias, dtype):
    ours = two_of(lambda rngs: Dense(6, 6, ("embed", "mlp"), bias=bias, kernel_init=init, rngs=rngs))
    theirs = two_of(lambda rngs: nnx.Linear(6, 6, use_bias=bias, kernel_init=init, rngs=rngs))
    params, wanted = (model.init(jax.random.key(3)) for model in (ours, theirs))
    assert [path for path, _ in named_leaves(params)] == [path for path, _ in named_leaves(wanted)]
    for (path, x), (_, y) in zip(named_leaves(params), named_leaves(wanted), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)
    params = jax.tree.map(lambda x: (x + 0.1).astype(dtype), params)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)), dtype)
    np.testing.assert_array_equal(*(jax.jit(lambda p, m=m: m.bind(p)(x))(params) for m in (ours, theirs)))


def test_its_kernel_passes_the_fence_and_linears_does_not():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    x = jax.ShapeDtypeStruct((4, 6), jnp.float32)
    for model, named in (
        (two_of(lambda rngs: Dense(6, 6, ("embed", "mlp"), kernel_init=init, rngs=rngs)), []),
        (two_of(lambda rngs: nnx.Linear(6, 6, rngs=rngs)), ["first/kernel", "second/kernel"]),
    ):
        placed = place(model.shapes, [("kernel", ("fsdp", "tensor"))], mesh)
        assert placed[1].spec == P("fsdp", "tensor")
        apply = lambda params, x, model=model: model.bind(params)(x)
        found = unconstrained_kernels(apply, model.shapes, x, mesh=mesh, placed=placed)
        assert [one.path for one in found] == named
