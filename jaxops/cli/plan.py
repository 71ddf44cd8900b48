"""`jaxops plan`: whether a config fits an accelerator that is not here, how fast it can be, and what it compiles to."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxops.core.failures import EXIT_OK, EXIT_USAGE, UserError

COMMANDS = ("plan",)


def add_arguments(made: Any) -> None:
    """Adds the arguments of the command to its parser."""
    made.add_argument("--on", required=True, metavar="TYPE", help="v5e-64, v5p-128, 2xv6e-256, tpu7x-64, cpu-8, ...")
    made.add_argument("--no-compile", action="store_true", help="only predict, in seconds")
    made.add_argument("--programs", metavar="NAME,...", help="compile these programs of a step alone")
    made.add_argument("--compare", nargs="+", metavar="LAYOUT", help="rank layouts like mesh.fsdp=64,tensor=4")
    text = "compile the update in several sizes for the largest microbatch that fits"
    made.add_argument("--largest-microbatch", action="store_true", help=text)
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
    if args.largest_microbatch and (args.no_compile or args.compare):
        raise UserError("--largest-microbatch compiles one layout: leave out --no-compile and --compare")
    from jaxops.plan.devices import prepare

    prepare(accelerator)
    from jaxops.cli.printing import console, print_json, say
    from jaxops.plan.plan import Plan
    from jaxops.plan.plan import plan as planned
    from jaxops.plan.report import layout_lines, lines, microbatch_line, values
    from jaxops.plan.search import compare, largest_microbatch, read_layout
    from jaxops.run.build import load_config

    only = [name.strip() for name in args.programs.split(",")] if args.programs else []

    def planned_with(overrides: Sequence[str], only: Sequence[str] = only) -> Plan:
        return planned(
            load_config(args.config, [*args.overrides, *overrides]),
            accelerator,
            compiling=not args.no_compile,
            only=only,
            say=lambda line: say(console(stderr=True), " ".join([line, *overrides])),
        )

    if args.compare:
        layouts = compare(planned_with, [read_layout(text) for text in args.compare])
        if args.json:
            told = [
                {
                    "overrides": list(one.overrides),
                    "problem": one.problem,
                    "plan": None if one.plan is None else values(one.plan, args.price),
                }
                for one in layouts
            ]
            print_json({"layouts": told})
        else:
            print("\n".join(layout_lines(layouts)))
        return EXIT_OK if layouts[0].problem is None else EXIT_USAGE
    found = planned_with(())
    largest = None
    if args.largest_microbatch:
        name = found.update.name
        largest = largest_microbatch(lambda overrides: planned_with(overrides, [name]), found.microbatch_sizes)
    if args.json:
        more = {} if largest is None else {"largest_microbatch": dataclasses.asdict(largest)}
        print_json(values(found, args.price) | more)
    else:
        print("\n".join([*lines(found, args.price), *([] if largest is None else [microbatch_line(largest)])]))
    return EXIT_OK if found.problem is None else EXIT_USAGE
