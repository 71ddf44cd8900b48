"""The table of backends, by name; the seam is described at the top of this folder."""

import importlib

from jaxops.core.failures import UserError, nearest
from jaxops.launch.backends.protocol import Backend

MODULES = {
    "local": "jaxops.launch.backends.local",
    "ssh": "jaxops.launch.backends.ssh",
    "mig": "jaxops.launch.backends.mig",
    "queued-resources": "jaxops.launch.backends.queued_resources",
    "slurm": "jaxops.launch.backends.slurm",
    "gke": "jaxops.launch.backends.gke",
    "sky": "jaxops.launch.backends.sky",
    "ray": "jaxops.launch.backends.ray",
}
"""The module of each backend; a further one is one more line."""


def find_backend(name: str) -> Backend:
    """Returns the backend of a name.

    Raises:
      UserError: there is none; the message names the nearest.
    """
    if name not in MODULES:
        raise UserError(f"--backend {name}: no such backend{nearest(name, MODULES)} (known: {', '.join(MODULES)})")
    found: Backend = importlib.import_module(MODULES[name]).BACKEND
    return found
