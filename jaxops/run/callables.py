"""Callables from a user's factory, held against how the run calls them before anything is compiled."""

import inspect
from collections.abc import Callable
from typing import Any

from jaxops.config.bypath import ByPath
from jaxops.core.accumulate import Objective
from jaxops.core.failures import UserError


def require_callable(what: str, fn: Any, *arguments: str) -> None:
    """Holds `fn` against a call with these positional arguments; `what` begins the message.

    Raises:
      UserError: it is not callable, or not like that.
    """
    shown = f"({', '.join(arguments)})"
    if not callable(fn):
        raise UserError(f"{what}: expected a function {shown}, got {type(fn).__name__}")
    try:
        signature = inspect.signature(fn)
    except (ValueError, TypeError):  # some builtins have none to look at
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise UserError(f"{what}: it is called as {shown}, but it takes {signature}: {error}") from None


def objective_from(config: Any, given: Callable[..., Any] | None, model: Any, *about: Any) -> Objective:
    """The objective for a model: of the factory given in Python, else of the config, which builds itself.

    Args:
      config: an objective's config or a `ByPath`.
      given: a factory, called with the model alone.
      model: the model to train.
      about: further arguments of the config's own `build`.

    Raises:
      UserError: a user's factory returned nothing that can be called like an objective.
    """
    if given is None and not isinstance(config, ByPath):
        return config.build(model, *about)
    made = given(model) if given is not None else config.call(model)
    name = "objective" if given is not None else f"objective {config.fn}"
    require_callable(f"{name}: what the factory returned", made, "params", "batch", "key")
    return made
