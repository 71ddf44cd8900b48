"""References `${env:NAME}` and `${env:NAME:default}` in any string, replaced after the files are merged."""

import os
import re

from jaxops.config.errors import Problem
from jaxops.config.node import BROKEN, Node, join_path
from jaxops.config.yaml_text import scalar_of
from jaxops.core.failures import UserError, nearest

_REFERENCE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::([^{}]*))?\}")


def expand_text(text: str) -> str:
    """Replaces every reference in `text`.

    Raises:
      UserError: a variable is not set and has no default, or a reference is misspelt.
    """

    def value_of(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        if name in os.environ:
            return os.environ[name]
        if default is None:
            hint = nearest(name, os.environ)
            raise UserError(f"the environment variable {name} is not set{hint} (a default: ${{env:{name}:default}})")
        return default

    if "${env" in _REFERENCE.sub("", text):
        raise UserError(f"{text!r} is not a reference: write ${{env:NAME}} or ${{env:NAME:default}}")
    return _REFERENCE.sub(value_of, text)


def expand_variables(node: Node, path: str, problems: list[Problem]) -> Node:
    """Returns the same tree with every reference replaced; a failure is added to `problems` and leaves BROKEN.

    An unquoted scalar is parsed again afterwards (`steps: ${env:STEPS}` is a number); a quoted one stays text.
    """
    if isinstance(node.value, dict):
        entries = {key: expand_variables(entry, join_path(path, key), problems) for key, entry in node.value.items()}
        return Node(entries, node.origin, implied=node.implied)
    if isinstance(node.value, list):
        return Node(
            [expand_variables(entry, join_path(path, i), problems) for i, entry in enumerate(node.value)], node.origin
        )
    if not isinstance(node.value, str) or "${env" not in node.value:
        return node
    try:
        text = expand_text(node.value)
    except UserError as error:
        problems.append(Problem(path, node.origin, node.value, str(error)))
        return Node(BROKEN, node.origin)
    return Node(text, node.origin) if node.text is None else Node(scalar_of(text), node.origin, text)
