"""What to type instead, where a config was given to a command that is not for it."""

import argparse
import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxops.core.failures import UserError

if TYPE_CHECKING:
    from jaxops.config.errors import Problem

SECTIONS_OF_SWEEPS = ("runs", "search")
"""The sections that a sweep's file has, and no run."""
LOOP = "rlhf"
"""The `task:` of a loop, and the command that runs it."""


@contextlib.contextmanager
def right_command_told(args: argparse.Namespace) -> Iterator[None]:
    """Adds to the errors of a config the command that is for it.

    A config may be a sweep, a loop or a run where the command is for another of the three, and an override that has
    several values is a sweep.

    Raises:
      UserError: in place of such errors.
    """
    try:
        yield
    except UserError as error:
        from jaxops.config.errors import ConfigError  # `jaxops --help` does without it

        if not isinstance(error, ConfigError) or not getattr(args, "config", None):
            raise
        command, what = _right_command(args, error.problems)
        if not command or command == args.command:
            raise
        told = error
        if LOOP in (command, args.command):  # the sections of one are all unknown to the other
            told = ConfigError([one for one in error.problems if one.path in ("task", *SECTIONS_OF_SWEEPS)])
        typed = shlex.join(["jaxops", command, args.config, *args.overrides])
        raise UserError(f"{told}\n{what}: {typed}") from None


def _right_command(args: argparse.Namespace, problems: "Sequence[Problem]") -> tuple[str, str]:
    """Returns the command that a config is for, and why; both are empty where nothing shows it."""
    from jaxops.sweep.sources import has_several_values

    wrong = {problem.origin for problem in problems}
    if any(f"override '{one}'" in wrong and has_several_values(one) for one in args.overrides):
        return "sweep", "Several values are a sweep"
    if any(problem.path in SECTIONS_OF_SWEEPS for problem in problems):
        return "sweep", "This file is a sweep"
    task = next((problem.value for problem in problems if problem.path == "task"), None)
    if task == LOOP:
        return LOOP, "This file is a loop"
    if args.command == LOOP and isinstance(task, str | Mapping):
        return "train", "This file is a run"
    return "", ""
