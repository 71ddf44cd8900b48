"""Whether what a user's factory returned can be called as the loop calls it: said before anything is compiled."""

import inspect
from typing import Any

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
