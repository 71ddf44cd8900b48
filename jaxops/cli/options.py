"""Flags of a command that a family adds: read against a frozen dataclass by the config machinery."""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxops.config.load import from_dict
from jaxops.core.failures import UserError


def read_options(schema: type, given: Sequence[str], command: str) -> Any:
    """An instance of `schema` from `--top 100 --index exact` or `--top=100`.

    Raises:
      UserError: a flag without a value, or that the schema does not have, or a value that does not fit.
    """
    return from_dict(schema, {}, list(_overrides(given, command)), source=command).config


def _overrides(given: Sequence[str], command: str) -> Iterator[str]:
    """`top=100` of each `--top 100`."""
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
