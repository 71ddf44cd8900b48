"""Command lines that several rendered launches share."""

import shlex

from jaxops.launch.record import Spec


def train_line(spec: Spec, python: str) -> str:
    """Returns the training as a line for a shell; `python` is quoted already, where it must be."""
    return f"env PYTHONPATH=. {python} -m jaxops {shlex.join(spec.argv)}"
