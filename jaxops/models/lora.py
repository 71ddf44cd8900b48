"""Low-rank adapters: the kernels of a model stay as they are, and the product of two thin matrices is added to each.

Adapters live beside the base, as `params["lora"]`, so the base keeps its paths: it is loaded, frozen, shared and used
as the reference as if there were none. `Lora.adapted` gives the parameters that the model itself reads. There each
kernel is base + alpha / rank * a @ b. A stacked kernel of a `Dense` layer is not merged for that: the layer adds
(x @ a) @ b to x @ kernel. In bfloat16 a sum of base and product would lose every change below half a unit in the last
place of the base, which is all of them at the start. Tested in tests/models/test_lora.py.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree
from pydantic import Field

from jaxops.core.failures import UserError
from jaxops.core.sharding import Rule, constrain, map_named, named_leaves

Params = dict[str, Any]
Result = TypeVar("Result")

LORA = "lora"
"""The name of the adapters among the parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on some kernels (Hu et al. 2021).

    Attributes:
      rank: width of the adapters.
      alpha: adapters are scaled by alpha / rank; null is twice the rank.
      match: regular expression that is searched in the paths of kernels.
    """

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] | None = None
    match: str = "attention|mlp"

    @property
    def scale(self) -> float:
        """The factor of the product of the two adapters."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A kernel with its adapters, in place of the kernel among parameters; loops over layers slice all three alike."""

    kernel: Float[Array, "*layers inputs outputs"]
    a: Float[Array, "*layers inputs rank"]
    b: Float[Array, "*layers rank outputs"]
    scale: float = dataclasses.field(metadata={"static": True})

    def merged(self) -> Float[Array, "*layers inputs outputs"]:
        """Returns kernel + scale * a @ b, added in float32, in the dtype of the kernel."""
        whole = (None,) * self.kernel.ndim  # adapters may lie over fsdp: see core/fence.py
        a, b = constrain(self.a, whole), constrain(self.b, whole)
        added = jnp.einsum("...ir,...ro->...io", a, b, preferred_element_type=jnp.float32)
        return (self.kernel.astype(jnp.float32) + self.scale * added).astype(self.kernel.dtype)


def adapted_kernels(params: PyTree) -> dict[str, Adapted]:
    """Returns the kernels that have adapters, by path."""
    is_adapted = lambda x: isinstance(x, Adapted)
    found = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_adapted)[0]
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in found if is_adapted(leaf)}


def merge_adapted(params: PyTree) -> PyTree:
    """Returns parameters with each `Adapted` kernel merged; others stay as they are."""
    adapted = lambda x: isinstance(x, Adapted)
    return jax.tree.map(lambda x: x.merged() if adapted(x) else x, params, is_leaf=adapted)


class Lora:
    """Adapters for a model that has `init`, `shapes`, `rules` and `padding`; it has these too, of base and adapters.

    Attributes:
      shapes: shapes and dtypes of all parameters.
      rules: sharding rules; adapters lie over fsdp.
      padding: the base's.
      frozen: path patterns that freeze the base.
      dtypes: (path pattern, dtype) that keep adapters in float32 over a base of another dtype.

    Raises:
      UserError: the pattern is not a regular expression or matches no kernel, or the rank is too large for one.

    Example:
      lora = Lora(model, LoraConfig(rank=8, match="query|value"))
      objective = lora.on(next_token(model))
      state = jaxops.init_state(lora.init, jax.random.key(0), tx, mesh, lora.rules, frozen=lora.frozen)
    """

    frozen: tuple[str, ...] = (rf"^(?!{LORA}/)",)
    dtypes: tuple[tuple[str, str], ...] = ((rf"^{LORA}/", "float32"),)

    def __init__(self, model: Any, config: LoraConfig):
        self.model, self.config, self.padding = model, config, model.padding
        self._kernels = _matched(model.shapes, config)
        beside = [
            (rf"^{LORA}/{re.escape(path)}/{name}$", (None,) * (len(shape) - 2) + axes)
            for path, shape in self._kernels.items()
            for name, axes in (("a", ("fsdp", None)), ("b", (None, "fsdp")))
        ]
        self.rules: list[Rule] = [*beside, *model.rules]
        self.shapes: PyTree = jax.eval_shape(self.init, jax.random.key(0))

    def init(self, key: Key[Array, ""]) -> Params:
        """Draws a fresh base as the model does, and `fresh` adapters, with which the model is the base exactly."""
        return self.model.init(key) | {LORA: self.fresh(jax.random.fold_in(key, 1))}

    def fresh(self, key: Key[Array, ""]) -> Params:
        """Draws new adapters: a is uniform within 1 / sqrt(inputs) of zero, b is zero."""
        out: Params = {}
        for at, (path, (*layers, inputs, outputs)) in enumerate(self._kernels.items()):
            bound, rank = 1 / math.sqrt(inputs), self.config.rank
            a = jax.random.uniform(
                jax.random.fold_in(key, at), (*layers, inputs, rank), jnp.float32, minval=-bound, maxval=bound
            )
            _put(out, path, {"a": a, "b": jnp.zeros((*layers, rank, outputs), jnp.float32)})
        return out

    def base(self, params: Params) -> Params:
        """Returns the parameters of the base alone, which are those of the reference."""
        return {name: value for name, value in params.items() if name != LORA}

    def policy(self, params: Params) -> Params:
        """Returns the parameters of the adapted model, for its own methods."""
        return self.adapted(params)

    def adapted(self, params: Params) -> Params:
        """Returns the parameters for the model's own methods: stacked kernels as `Adapted`, all others merged."""

        def one(path: str, leaf: Array) -> Array | Adapted:
            if path not in self._kernels:
                return leaf
            beside = _get(params[LORA], path)
            both = Adapted(leaf, beside["a"], beside["b"], self.config.scale)
            return both if leaf.ndim > 2 else both.merged()

        return map_named(one, self.base(params))

    def merge(self, params: Params) -> Params:
        """Returns the parameters of the model with the adapters merged for good: for export, serving and sampling."""
        return merge_adapted(self.adapted(params))

    def on(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """Returns a function of the model's parameters (an objective, a method) as one of base and adapters.

        Example:
          objective = lora.on(next_token(model))  # objective(params, batch, key), with params from lora.init
        """
        return lambda params, *args, **options: function(self.adapted(params), *args, **options)


@runtime_checkable
class Beside(Protocol):
    """The protocol of what holds further parameters beside those of a model: adapters, or a reference."""

    frozen: tuple[str, ...]
    dtypes: tuple[tuple[str, str], ...]

    def on(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """Returns a function of the model's parameters as one of all parameters."""
        ...


def on_model(model: Any, function: Callable[..., Result]) -> Callable[..., Result]:
    """Returns a function of a model's parameters as one of what is trained, which may hold more (`Beside`)."""
    return model.on(function) if isinstance(model, Beside) else function


def _matched(shapes: PyTree, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Returns the kernels that get adapters, with their shapes."""
    try:
        pattern = re.compile(config.match)
    except re.error as error:
        raise UserError(f"lora.match: {config.match!r} is not a regular expression: {error}") from error
    kernels = {path: tuple(x.shape) for path, x in named_leaves(shapes) if path.split("/")[-1] == "kernel"}
    found = {path: shape for path, shape in kernels.items() if pattern.search(path) and len(shape) >= 2}
    if not found:
        raise UserError(f"lora.match: {config.match!r} matches no kernel (there are: {', '.join(kernels) or 'none'})")
    for path, shape in found.items():
        if config.rank >= min(shape[-2:]):
            raise UserError(f"lora.rank: {config.rank} is not below the sides of {path}, {shape[-2]} x {shape[-1]}")
    return found


def _put(tree: Params, path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _get(tree: Mapping[str, Any], path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree
