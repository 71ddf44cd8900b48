"""A model beside a frozen copy of itself: what preference optimisation holds its policy against.

The policy keeps its paths and the copy lies below `reference/`, so the policy is loaded, sampled and exported as if it
were alone. Under adapters no copy is needed: there the base is the reference (models/lora.py). Tested in
tests/models/test_reference.py.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jaxops.core.sharding import Rule, rules_below

Params = dict[str, Any]
Result = TypeVar("Result")

REFERENCE = "reference"
"""The name of the copy among the parameters."""


class WithReference:
    """A model that has `init`, `shapes`, `rules` and `padding`, with a frozen copy; it has these too, of both.

    Attributes:
      shapes: shapes and dtypes of all parameters.
      rules: sharding rules; the copy lies as the model does.
      padding: that of both.
      frozen: path patterns that freeze the copy.
      dtypes: (path pattern, dtype) of the copy. In the dtype of the computation its numbers are those of the policy.
      copies: the copy begins as the policy does (`Task.copies`).

    Example:
      both = WithReference(decoder, "bfloat16")
      objective = both.on(next_token(decoder))  # reads the policy alone
    """

    frozen: tuple[str, ...] = (rf"^{REFERENCE}/",)
    copies: Mapping[str, str] = {f"{REFERENCE}/": ""}

    def __init__(self, model: Any, dtype: str = "float32"):
        self.model = model
        self.dtypes: tuple[tuple[str, str], ...] = ((rf"^{REFERENCE}/", dtype),)
        self.rules: list[Rule] = [*rules_below(REFERENCE, model.rules), *model.rules]
        self.padding = {**model.padding, **{f"{REFERENCE}/{path}": text for path, text in model.padding.items()}}
        self.shapes: PyTree = jax.eval_shape(self.init, jax.random.key(0))

    def init(self, key: Key[Array, ""]) -> Params:
        """Draws a fresh policy as the model does, and copies it."""
        params = self.model.init(key)
        return params | {REFERENCE: jax.tree.map(jnp.copy, params)}

    def base(self, params: Params) -> Params:
        """Returns the parameters of the reference."""
        return params[REFERENCE]

    def policy(self, params: Params) -> Params:
        """Returns the parameters of the policy alone."""
        return {name: value for name, value in params.items() if name != REFERENCE}

    def on(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """Returns a function of the policy's parameters (an objective, a method) as one of both."""
        return lambda params, *args, **options: function(self.policy(params), *args, **options)
