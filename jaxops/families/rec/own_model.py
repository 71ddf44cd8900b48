"""A user's own model: it is checked before anything is compiled, and optional parts that it lacks are added."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxops.core.failures import UserError
from jaxops.run.callables import require_callable


def require_parts(
    model: Any,
    what: str,
    methods: Mapping[str, tuple[str, ...]],
    *,
    numbers: Sequence[str] = (),
    n_items: int | None = None,
) -> Any:
    """Checks that a user's model has `init(key)`, these methods and these positive whole numbers, and returns it.

    `rules` (empty: parameters are replicated), `shapes` and `padding` are added where they are missing. A model of
    items also gets `n_items`, `logits` (products of states and item vectors) and `apply`.

    Args:
      model: the value that the factory returned.
      what: names the expected kind of model in the error message.
      methods: the names of methods, with the arguments of their calls.
      numbers: the names of attributes that are positive whole numbers.
      n_items: the size of the catalogue, for a model of items.

    Raises:
      UserError: a part is missing, or is not what it should be.
    """
    name = f"model: what the factory returned ({type(model).__name__})"
    needed = {"init": ("key",), **methods}
    missing = [part for part in (*needed, *numbers) if not hasattr(model, part)]
    if missing:
        wanted = [f"{method}({', '.join(arguments)})" for method, arguments in needed.items()] + list(numbers)
        raise UserError(f"{name} has no {', '.join(missing)}; {what} has {', '.join(wanted)}")
    for method, arguments in needed.items():
        require_callable(f"{name}: {method}", getattr(model, method), *arguments)
    for number in numbers:
        value = getattr(model, number)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}: {number}: expected a positive whole number, got {value!r}")
    for part, value in (("rules", []), ("padding", {}), ("on_tables", False)):
        _complete(model, name, part, value)
    if not hasattr(model, "shapes"):
        _complete(model, name, "shapes", jax.eval_shape(model.init, jax.random.key(0)))
    if n_items is not None:
        _complete(model, name, "n_items", n_items)
        _complete(model, name, "logits", lambda params, hidden: item_logits(model, params, hidden))
        encoded = lambda params, batch, key: model.logits(params, model.encode(params, batch, key))
        _complete(model, name, "apply", encoded)
    return model


def item_logits(model: Any, params: Any, hidden: Float[Array, "... dim"]) -> Float[Array, "... rows"]:
    """Returns the products of states with all item vectors, float32, and -1e9 for rows that are not items."""
    vectors = model.item_vectors(params)
    scores = jnp.einsum("...d,vd->...v", hidden, vectors, preferred_element_type=jnp.float32)
    row = jnp.arange(vectors.shape[0])
    real = (row > 0) & (row <= model.n_items)
    return jnp.where(real.reshape((1,) * (scores.ndim - 1) + (-1,)), scores, jnp.float32(-1e9))


def _complete(model: Any, name: str, part: str, value: Any) -> None:
    if hasattr(model, part):
        return
    try:
        setattr(model, part, value)
    except (AttributeError, TypeError):
        fields = inspect.getdoc(type(model)) or type(model).__name__
        raise UserError(f"{name} has no {part}, and takes no further attributes ({fields.splitlines()[0]})") from None
