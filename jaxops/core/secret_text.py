"""Text that is safe to show: without secrets, and without what a terminal would obey.

The values of secrets that this process has read are remembered here, and passwords in URLs are told by their form.
Tested in tests/config/test_config_secrets.py and tests/report/test_hostile_folders.py.
"""

import re

_PASSWORD = re.compile(r"(?<=://)[^\s/@'\"]*@")
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b."
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]",
    re.DOTALL,
)
"""Sequences whole where they can be told, and characters that turn the direction of what follows."""
_SHORTEST = 4
"""A secret of fewer letters is left alone: its like is found in every sentence."""

_known: dict[str, str] = {}


def remember_secret(value: str, shown: str) -> None:
    """Remembers a secret, so that `without_secrets` replaces `value` by `shown` from now on."""
    if len(value) >= _SHORTEST:
        _known[value] = shown


def without_secrets(text: str) -> str:
    """Replaces every remembered secret by its reference, and removes user and password from URLs."""
    for value in sorted(_known, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, _known[value])
    return without_passwords(text)


def without_passwords(text: str) -> str:
    """Replaces what stands before the @ of a URL by `***`."""
    return _PASSWORD.sub("***@", text)


def has_password(text: str) -> bool:
    """Returns true if a URL in the text carries a user or a password."""
    return _PASSWORD.search(text) is not None


def printable(text: str) -> str:
    """Removes escape sequences and control characters, which a terminal would obey, except tab and line feed."""
    return _CONTROL.sub("", text)
