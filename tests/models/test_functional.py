"""Modules made pure."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxops.core.mesh import make_mesh
from jaxops.models.functional import Functional


class _Line(nnx.Module):
    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.line = nnx.Linear(inputs, outputs, rngs=rngs)


class _Counting(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.seen = nnx.BatchStat(jax.numpy.zeros(()))


def test_equal_arguments_share_one_value_and_others_do_not():
    assert Functional.of(_Line, 3, 4) is Functional.of(_Line, 3, 4)
    assert Functional.of(_Line, 3, 4).shapes["line"]["kernel"].shape == (3, 4)
    assert Functional.of(_Line, 4, 3).shapes["line"]["kernel"].shape == (4, 3)


def test_one_value_serves_several_meshes_and_tracings():
    pure, key = Functional.of(_Line, 8, 8), jax.random.key(3)
    plain = np.asarray(pure.init(key)["line"]["kernel"])
    for axes in ({"data": 8}, {"fsdp": 2}):
        devices = jax.devices()[: axes.get("data", 2)]
        with jax.set_mesh(make_mesh(**axes, devices=devices)):
            np.testing.assert_array_equal(jax.jit(pure.init)(key)["line"]["kernel"], plain)


def test_state_that_is_no_parameter_is_refused():
    with pytest.raises(TypeError, match="not a parameter"):
        Functional.of(_Counting)
