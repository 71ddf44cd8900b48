"""Paths that begin with `~`, which a shell does not expand inside `a.b=~/x`, nor in a YAML file."""

import os

from jaxops.core.failures import UserError


def expand_home(path: str | os.PathLike[str], where: str = "") -> str:
    """Returns the path with the home folder in the place of a leading `~` or `~name`; other paths and URLs as they are.

    Messages begin with `where`, such as the field of the config.

    Raises:
      UserError: there is no home folder of that name.
    """
    text = os.fspath(path)
    found = os.path.expanduser(text)
    if text.startswith("~") and found == text:
        user = text.partition("/")[0]
        told = f"{where}: {text}" if where else text
        raise UserError(f"{told}: there is no home folder {user}; if a folder is really called so, write ./{text}")
    return found
