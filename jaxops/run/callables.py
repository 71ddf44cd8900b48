"""Checks of the callables that a user's factory returns, before anything is compiled."""

import inspect
from collections.abc import Callable
from typing import Any

from jaxops.config.bypath import ByPath
from jaxops.core.accumulate import Objective
from jaxops.core.failures import UserError


def require_callable(what: str, fn: Any, *arguments: str) -> None:
    """Checks that `fn` can be called with these positional arguments; `what` begins the error message.

    Raises:
      UserError: it is not callable, or its signature does not take these arguments.
    """
    shown = f"({', '.join(arguments)})"
    if not callable(fn):
        raise UserError(f"{what}: expected a function {shown}, got {type(fn).__name__}")
    try:
        signature = inspect.signature(fn)
    except (ValueError, TypeError):  # some builtins have no signature to check
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise UserError(f"{what}: it is called as {shown}, but it takes {signature}: {error}") from None


def objective_from(config: Any, given: Callable[..., Any] | None, model: Any, *about: Any) -> Objective:
    """Builds the objective for a model, with the factory given in Python if there is one, else from the config.

    Args:
      config: an objective's config, which has a `build` method, or a `ByPath`.
      given: a factory, called with the model alone.
      model: the model to train.
      about: further arguments of the config's `build`.

    Raises:
      UserError: a user's factory returned nothing that can be called like an objective.
    """
    if given is None and not isinstance(config, ByPath):
        return config.build(model, *about)
    made = given(model) if given is not None else config.call(model)
    name = "objective" if given is not None else f"objective {config.fn}"
    require_callable(f"{name}: what the factory returned", made, "params", "batch", "key")
    return made
