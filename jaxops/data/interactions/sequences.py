"""Reads the one-line-a-user format, `user item item ...` in time order, that many data sets come in.

There are no times: the order of a line is the order, so only a leave-one-out split is possible.
"""

import os

import numpy as np
import pyarrow as pa

from jaxops.core.failures import UserError, nearest
from jaxops.data.interactions.interactions import Interactions, from_events
from jaxops.data.interactions.read import Events


def read_sequences(path: str | os.PathLike[str]) -> Interactions:
    """Reads a text file with one user a line, tokens apart by white space; blank lines are skipped.

    Ids are integers if every one is (users and items each on their own), else strings.

    Raises:
      UserError: no such file, no text, a line without items, a user with two lines: with the line numbers.
    """
    name = os.path.expanduser(os.fspath(path))
    users: list[str] = []
    numbers: list[int] = []
    lengths: list[int] = []
    items: list[str] = []
    try:
        with open(name, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                tokens = line.split()
                if len(tokens) == 1:
                    raise UserError(f"{name}:{number}: user {tokens[0]!r} has no items; expected `user item item ...`")
                if tokens:
                    users.append(tokens[0])
                    numbers.append(number)
                    lengths.append(len(tokens) - 1)
                    items += tokens[1:]
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not a text file in UTF-8 ({error})") from error
    except OSError as error:
        folder = os.path.dirname(name) or "."
        there = os.listdir(folder) if os.path.isdir(folder) else []
        clue = nearest(os.path.basename(name), there)
        raise UserError(f"cannot read sequences from {name}: {error.strerror}{clue}") from error
    if not users:
        raise UserError(f"{name}: no sequences in it, expected lines of `user item item ...`")
    _refuse_twice(name, users, numbers)
    repeated = np.repeat(np.arange(len(users)), lengths)
    events = Events(
        pa.array(users).take(pa.array(repeated)), pa.array(items), None, None, 0, name, np.array(numbers)[repeated]
    )
    return from_events([events], text=True, shown=name)


def _refuse_twice(name: str, users: list[str], numbers: list[int]) -> None:
    first: dict[str, int] = {}
    for user, number in zip(users, numbers, strict=True):
        if first.setdefault(user, number) != number:
            raise UserError(f"{name}:{number}: user {user!r} has line {first[user]} already; there is one a user")
