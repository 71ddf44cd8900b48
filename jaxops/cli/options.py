"""The flags that a family adds to a command: the config loader reads them into a frozen dataclass."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxops.config.load import from_dict
from jaxops.core.failures import UserError


def read_options(schema: type, given: Sequence[str], command: str, values: Mapping[str, Any] | None = None) -> Any:
    """Reads flags such as `--top 100 --index exact` or `--top=100` into an instance of `schema`.

    Args:
      schema: a frozen dataclass.
      given: the flags.
      command: the command, for messages.
      values: fields that the command itself has read.

    Raises:
      UserError: a flag has no value, the schema lacks a flag, or a value does not fit.
    """
    return from_dict(schema, dict(values or {}), list(overrides_of(given, command)), source=command).config


def overrides_of(given: Sequence[str], command: str) -> Iterator[str]:
    """Yields `top=100` for each `--top 100`."""
    words = iter(given)
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"{command}: unexpected {word!r}; options are given as --NAME VALUE")
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise UserError(f"{command}: --{name} needs a value")
        yield f"{name.replace('-', '_')}={value}"
