"""Errors of a configuration: every problem is reported at once, with its path, its value and what would be right."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxops.config.node import Node, plain_node
from jaxops.core.failures import UserError, nearest
from jaxops.core.secret_text import without_secrets


@dataclasses.dataclass(frozen=True)
class Problem:
    """One error in a configuration.

    Attributes:
      path: dotted path; "" for a whole file or the command line.
      origin: "file.yaml:12", "override 'a.b=3'" or "default".
      value: the value found there, as plain values.
      message: what is wrong with it and what would be right.
    """

    path: str
    origin: str
    value: Any
    message: str

    def __str__(self) -> str:
        if not self.path:
            return without_secrets(f"{self.origin}: {self.message}")
        where = f"{self.path} [{self.origin}]" if self.origin else self.path
        return without_secrets(f"{where}: {self.message}")


class ConfigError(UserError):
    """All errors of a configuration, one line for each (also as data, in `problems`)."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        lines = [str(problem) for problem in self.problems]
        if len(lines) > 1:
            lines = [f"{len(lines)} problems in the configuration:", *(f"  {line}" for line in lines)]
        super().__init__("\n".join(lines))


class Refused(Exception):
    """A single value does not fit: it has the wrong type if `of_type`, else it breaks a limit."""

    def __init__(self, message: str, *, of_type: bool = False):
        self.of_type = of_type
        super().__init__(message)


def show(value: Any, width: int = 60) -> str:
    """Writes a value as YAML would, in one short line."""
    text = _flow(plain_node(value) if isinstance(value, Node) else value)
    return text if len(text) <= width else text[: width - 3] + "..."


def _flow(value: Any, nested: bool = False) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(entry, True)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(entry, True) for entry in value) + "]"
    return str(value) if nested and isinstance(value, str) else repr(value)


def one_of(options: Sequence[str]) -> str:
    """Joins options as `a, b or c`."""
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def unknown(what: str, name: str, known: Iterable[str], elsewhere: Sequence[str] = ()) -> str:
    """Returns `unknown key; did you mean 'lr'? (known: lr, clip)`; `what` is its first words.

    Args:
      what: the complaint.
      name: the unknown name.
      known: the names that are allowed.
      elsewhere: paths where such a key exists, for when no known name is near.
    """
    names = list(known)
    hint = nearest(name, names)
    if not hint and elsewhere:
        hint = f"; it belongs at {one_of([repr(path) for path in elsewhere[:3]])}"
    return f"{what}{hint} (known: {', '.join(names) or 'none'})"


_LIMITS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "finite_number": "must be finite",
    "string_too_short": "needs {min_length} or more characters",
    "string_too_long": "takes {max_length} characters at most",
    "too_short": "needs {min_length} or more of them",
    "too_long": "takes {max_length} of them at most",
    "string_pattern_mismatch": "must match the pattern {pattern!r}",
}


def wording(details: Mapping[str, Any], expected: str, value: Any) -> Refused:
    """Puts pydantic's error details (one entry of `ValidationError.errors()`) into our words."""
    kind, context = details["type"], details.get("ctx", {})
    value = plain_node(value) if isinstance(value, Node) else value
    if kind in _LIMITS:
        limits = {name: _short(limit) for name, limit in context.items()}
        return Refused(f"{_LIMITS[kind].format(**limits)}, got {show(value)}")
    if kind in ("value_error", "assertion_error"):
        return Refused(f"{context['error']}, got {show(value)}")
    return Refused(f"expected {expected}, got {show(value)}{_hint(expected, value)}", of_type=True)


def _short(limit: Any) -> Any:
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit


def _hint(expected: str, value: Any) -> str:
    if expected == "a string" and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if expected in ("an integer", "a number") and isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return ""
        return "; write it without quotes"
    return ""
