"""The one cache folder of jaxops on a machine, for data sets and compiled programs."""

import os
from pathlib import Path


def cache_root() -> Path:
    """Returns JAXOPS_CACHE, else jaxops in XDG_CACHE_HOME, else ~/.cache/jaxops, without creating it."""
    own = os.environ.get("JAXOPS_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxops"
