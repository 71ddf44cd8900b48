"""References `${env:NAME}` and `${env:NAME:default}` in any string, replaced after the files are merged."""

import functools
import os
import re

from jaxops.config.errors import Problem
from jaxops.config.node import BROKEN, Node, join_path
from jaxops.config.secrets import looks_like_credential, secret_of
from jaxops.config.yaml_text import scalar_of
from jaxops.core.failures import UserError, nearest
from jaxops.core.secret_text import has_password

_REFERENCE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::([^{}]*))?\}")


def expand_text(text: str) -> str:
    """Replaces every reference in `text`.

    Raises:
      UserError: a variable that is not set and has no default, that holds a credential, or a misspelt reference.
    """

    def value_of(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        if looks_like_credential(name):
            raise UserError(
                f"{name} is called like a credential, and what ${{env:...}} reads is written into the run folder: write"
                f" ${{secret:{name}}}, which is not (or rename the variable if it is none)"
            )
        if name in os.environ:
            if has_password(os.environ[name]):
                raise UserError(
                    f"{name} holds a URL with a password, and what ${{env:...}} reads is written into the run folder:"
                    f" write ${{secret:{name}}}, which is not"
                )
            return os.environ[name]
        if default is None:
            hint = nearest(name, os.environ)
            raise UserError(f"the environment variable {name} is not set{hint} (a default: ${{env:{name}:default}})")
        return default

    if "${env" in _REFERENCE.sub("", text):
        raise UserError(f"{text!r} is not a reference: write ${{env:NAME}} or ${{env:NAME:default}}")
    return _REFERENCE.sub(value_of, text)


def expand_variables(node: Node, path: str, problems: list[Problem], *, resolved: bool = False) -> Node:
    """Returns the tree with every reference replaced; one that cannot be is added to `problems` and left BROKEN.

    An unquoted scalar is read again afterwards (`steps: ${env:STEPS}` is a number), a quoted one stays text. A
    reference to a secret becomes a `Secret`, whose value is asked for here and kept nowhere.

    Args:
      node: the tree.
      path: its dotted path.
      problems: gets what is wrong.
      resolved: the tree was resolved when it was written: nothing in it is read from the environment again.
    """
    below = functools.partial(expand_variables, problems=problems, resolved=resolved)
    if isinstance(node.value, dict):
        entries = {key: below(entry, join_path(path, key)) for key, entry in node.value.items()}
        return Node(entries, node.origin, implied=node.implied)
    if isinstance(node.value, list):
        return Node([below(entry, join_path(path, i)) for i, entry in enumerate(node.value)], node.origin)
    if not isinstance(node.value, str):
        return node
    if not resolved and has_password(node.value):
        message = "a URL with a password would be written into the run folder: write ${secret:NAME}, which is not"
        problems.append(Problem(path, node.origin, None, message))
        return Node(BROKEN, node.origin)
    if "${" not in node.value:
        return node
    try:
        secret = secret_of(node.value)
        if secret is not None:
            if not resolved:
                secret.reveal()  # one that is not set is told at once
            return Node(secret, node.origin)
        if resolved or "${env" not in node.value:
            return node
        text = expand_text(node.value)
    except UserError as error:
        problems.append(Problem(path, node.origin, node.value, str(error)))
        return Node(BROKEN, node.origin)
    return Node(text, node.origin) if node.text is None else Node(scalar_of(text), node.origin, text)
