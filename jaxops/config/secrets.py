"""`${secret:NAME}`: a value that is read from the environment when code of one's own is called, and written nowhere.

What is written, shown and compared is the reference. `${env:NAME}` is for all that a run folder may hold.
Tested in tests/config/test_config_secrets.py.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxops.core.failures import UserError, nearest
from jaxops.core.secret_text import remember_secret

_ALONE = re.compile(r"\$\{secret:([A-Za-z_][A-Za-z0-9_]*)\}")
_PART = re.compile(
    r"secret|passw|passphrase|credential|apikey|api_?key|access_?key|private_?key|(^|_)(token|key|pat|auth|pwd|pass)$"
    r"|(^|_)token_",
    re.IGNORECASE,
)
_NO_CREDENTIALS = frozenset({"PWD", "OLDPWD"})


@dataclasses.dataclass(frozen=True)
class Secret:
    """A reference to a secret, by the name of an environment variable."""

    name: str

    def __str__(self) -> str:
        return f"${{secret:{self.name}}}"

    __repr__ = __str__

    def reveal(self) -> str:
        """The value.

        Raises:
          UserError: the variable is not set.
        """
        if self.name not in os.environ:
            raise UserError(
                f"the secret {self.name} is not set: export it as an environment variable"
                f"{nearest(self.name, (name for name in os.environ if looks_like_credential(name)))}"
            )
        value = os.environ[self.name]
        remember_secret(value, str(self))
        return value


def secret_of(text: str) -> Secret | None:
    """Returns the secret that a string refers to; None where it refers to none.

    Raises:
      UserError: a reference that is misspelt, or that is only a part of the string.
    """
    if "${secret" not in text:
        return None
    found = _ALONE.fullmatch(text)
    if found is None:
        raise UserError("a secret stands alone, as ${secret:NAME}: it has no default and is no part of other text")
    return Secret(found[1])


def looks_like_credential(name: str) -> bool:
    """Returns true if a variable of this name is likely to hold a credential: HF_TOKEN, DB_PASSWORD, API_KEY."""
    return name.upper() not in _NO_CREDENTIALS and _PART.search(name) is not None


def revealed(value: Any) -> Any:
    """Returns nested plain values with the value of each secret in place of its reference.

    Raises:
      UserError: one is not set.
    """
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, Mapping):
        return {key: revealed(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(revealed(entry) for entry in value)
    return value


def secrets_in(value: Any) -> Iterator[str]:
    """Returns the names of all secrets in nested values, of a config before or after it is resolved."""
    if isinstance(value, Secret):
        yield value.name
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from secrets_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from secrets_in(entry)
    elif isinstance(value, str) and (found := _ALONE.fullmatch(value)):
        yield found[1]
