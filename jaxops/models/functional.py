"""NNX defines the modules and stays out of signatures: parameters are nested dicts, merged inside the trace.

(`nnx.jit` costs about 4.5 times the host dispatch of `jax.jit` around split and merge.)
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, PyTree

from jaxops.models.dense import Dense
from jaxops.models.lora import adapted_kernels, merge_adapted

Params = dict[str, Any]


class Functional:
    """A module class made pure: `init(key)` returns parameters and `bind(params)` the module for one traced call.

    Raises:
      TypeError: the module holds state other than parameters (running statistics, RNG), which would be lost.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self._build = build
        shapes = nnx.eval_shape(lambda: build(nnx.Rngs(params=0)))
        parts: Any = nnx.split(shapes, nnx.Param, ...)
        self._graphdef, params, rest = parts
        if jax.tree.leaves(rest):
            raise TypeError(f"module keeps state that is not a parameter: {nnx.to_pure_dict(rest)}")
        self.shapes: PyTree = nnx.to_pure_dict(params)
        # A run traces `init` several times (shapes, abstract state, state); building the module is the dear part of it.
        self._traced = jax.jit(self._fresh, inline=True)

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, module: Callable[..., nnx.Module], *args: Hashable) -> "Functional":
        """Returns `module(*args, rngs)` made pure, the same value for the same arguments.

        Building a module is a third of a second for a decoder, and one run asks for the same one several times: when it
        trains, evaluates, is loaded and is served.
        """
        return cls(lambda rngs: module(*args, rngs))

    def init(self, key: Array) -> Params:
        """Draws fresh parameters, as nested dicts."""
        return self._traced(key) if isinstance(key, jax.core.Tracer) else self._fresh(key)

    def _fresh(self, key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(params=key)), nnx.Param))

    def bind(self, params: Params) -> Any:
        """Returns the module with these parameters, for use inside one traced function; do not keep it.

        A `Dense` layer whose kernel has low-rank adapters (models/lora.py) gets them beside it; any other kernel is
        merged with its adapters here, inside a scan one layer at a time.
        """
        if not (adapted := adapted_kernels(params)):
            return nnx.merge(self._graphdef, params)
        module = nnx.merge(self._graphdef, merge_adapted(params))  # XLA removes what is merged and not read
        for path, kernel in adapted.items():
            layer = functools.reduce(_child, path.split("/")[:-1], module)
            if isinstance(layer, Dense):
                layer.kernel.set_value(kernel.kernel)
                # Past NNX, which refuses arrays that are no variables: this module is used once and never split.
                object.__setattr__(layer, "adapter", kernel)
        return module


def _child(module: Any, name: str) -> Any:
    """Returns a part of a module; parts of a list have numbers."""
    return module[int(name)] if name.isdigit() else getattr(module, name)
