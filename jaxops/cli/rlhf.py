"""`jaxops rlhf`: the loop of judgements, reward models and policies."""

import argparse
import subprocess
import sys
import time
from typing import Any

from jaxops.core.failures import EXIT_INTERRUPTED, EXIT_OK, EXIT_WAITING

COMMANDS = ("rlhf",)
POLL_SECONDS = 30.0
"""The time between two looks for the answers of people."""


def add_arguments(made: Any) -> None:
    """Adds the arguments of the command to its parser."""
    made.add_argument("--wait", action="store_true", help="wait for the answers of people, holding no chips meanwhile")


def rlhf(args: argparse.Namespace) -> int:
    """Runs `jaxops rlhf CONFIG [a.b=VALUE ...] [--wait]`."""
    if args.wait:
        return _waiting(args)
    from jaxops.cli.printing import console, print_json, say
    from jaxops.config.load import load
    from jaxops.flow.rlhf.config import RlhfConfig
    from jaxops.flow.rlhf.judges import TooFewVotes
    from jaxops.flow.rlhf.loop import RlhfLoop, Stopped
    from jaxops.flow.rlhf.page import write_loop_page

    told = lambda line: say(console(stderr=True), line)
    loop = RlhfLoop(load(RlhfConfig, args.config, args.overrides), told)
    try:
        rounds = loop.run()
    except TooFewVotes as few:
        told(
            f'{few}. The pairs are {loop.waiting_for}; answer them (lines of {{"id", "choice": a, b or tie}}), then'
            " give the same command again, or --wait"
        )
        return EXIT_WAITING
    except Stopped:
        return EXIT_INTERRUPTED
    page = write_loop_page(loop.folder, rounds)
    if args.json:
        print_json({"dir": str(loop.folder), "rounds": rounds})
    else:
        print(f"{len(rounds)} round(s) -> {page}")
    return EXIT_OK


def _waiting(args: argparse.Namespace) -> int:
    """Runs the loop in a process of its own, again and again, until people have answered; this one holds no chips."""
    command = [sys.executable, "-m", "jaxops", "rlhf", args.config, *args.overrides]
    command += ["--json"] if args.json else []
    command += ["--cpu-devices", str(args.cpu_devices)] if args.cpu_devices is not None else []
    while (status := subprocess.run(command, check=False).returncode) == EXIT_WAITING:
        time.sleep(POLL_SECONDS)
    return status
