"""`jaxops plan`: whether a config fits an accelerator that is not here, how fast it can be, and what it compiles to."""

import argparse
from typing import Any

from jaxops.core.failures import EXIT_OK, EXIT_USAGE, UserError

COMMANDS = ("plan",)


def add_arguments(made: Any) -> None:
    """Adds the arguments of the command to its parser."""
    made.add_argument("--on", required=True, metavar="TYPE", help="v5e-64, v5p-128, 2xv6e-256, tpu7x-64, cpu-8, ...")
    made.add_argument("--no-compile", action="store_true", help="only predict, in seconds")
    made.add_argument("--programs", metavar="NAME,...", help="compile these programs of a step alone")
    made.add_argument("--price", type=float, metavar="P", help="what a chip costs an hour: the cost of the run")


def plan(args: argparse.Namespace) -> int:
    """Runs `jaxops plan CONFIG [a.b=VALUE ...] --on TYPE`; exit status 2 where the run does not fit.

    Raises:
      UserError: there is no such accelerator, or the config does not go with it.
    """
    from jaxops.launch.accelerators import find_accelerator

    accelerator = find_accelerator(args.on)
    if args.price is not None and not 0 <= args.price < 1e9:
        raise UserError(f"--price: expected what a chip costs an hour, got {args.price:g}")
    from jaxops.plan.devices import prepare

    prepare(accelerator)
    from jaxops.cli.printing import console, print_json, say
    from jaxops.plan.plan import plan as planned
    from jaxops.plan.report import lines, values
    from jaxops.run.build import load_config

    found = planned(
        load_config(args.config, args.overrides),
        accelerator,
        compiling=not args.no_compile,
        only=[name.strip() for name in args.programs.split(",")] if args.programs else (),
        say=lambda line: say(console(stderr=True), line),
    )
    if args.json:
        print_json(values(found, args.price))
    else:
        print("\n".join(lines(found, args.price)))
    return EXIT_OK if found.problem is None else EXIT_USAGE
