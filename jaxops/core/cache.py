"""The folders of jaxops on a machine: the cache (data sets, compiled programs) and the user's state."""

import os
from pathlib import Path

from jaxops.core.home import expand_home


def cache_root() -> Path:
    """Returns JAXOPS_CACHE, else jaxops in XDG_CACHE_HOME, else ~/.cache/jaxops, without creating it."""
    own = os.environ.get("JAXOPS_CACHE")
    if own:
        return Path(expand_home(own, "JAXOPS_CACHE"))
    return Path(expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "jaxops"


def state_root() -> Path:
    """JAXOPS_STATE, else jaxops in XDG_STATE_HOME, else ~/.local/state/jaxops; nothing is created.

    What lies there is of this user alone, such as which runs are their own, and is not to be thrown away as a cache is.
    """
    own = os.environ.get("JAXOPS_STATE")
    if own:
        return Path(expand_home(own, "JAXOPS_STATE"))
    return Path(expand_home(os.environ.get("XDG_STATE_HOME") or "~/.local/state")) / "jaxops"
