"""`jaxops audit`: whether an objective, a model and a step do on a mesh what they would do on one device."""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxops.core.failures import EXIT_FAILED, EXIT_OK, UserError

COMMANDS = ("audit",)
MOST_DEVICES = 4096


def add_arguments(made: Any) -> None:
    """Adds the arguments of the command to its parser."""
    text = "stand-ins for data and weights that are not here: what runs is left out"
    made.add_argument("--stand-ins", action="store_true", help=text)


def audit(args: argparse.Namespace) -> int:
    """Runs `jaxops audit CONFIG [a.b=VALUE ...]`; exit status 1 where a check failed.

    Raises:
      UserError: the config is wrong, or its data or weights are not here.
    """
    import jax

    from jaxops.audit.audit import MOST_DEVICES as AT_HAND
    from jaxops.audit.audit import audit as audited
    from jaxops.audit.audit import devices_needed
    from jaxops.cli.printing import console, print_json, say
    from jaxops.core.mesh import use_cpu_devices
    from jaxops.run.build import load_config

    loaded = load_config(args.config, args.overrides)
    most = args.cpu_devices or AT_HAND
    needed = devices_needed(loaded.config.mesh, most)
    if needed > MOST_DEVICES:
        raise UserError(f"mesh: {needed} devices; at most {MOST_DEVICES} virtual ones stand in for them")
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # in a process that has used jax its devices stay as they are
        use_cpu_devices(max(needed, most))
    with _opened(loaded, args.stand_ins) as task:
        told = lambda what: say(console(stderr=True), f"checking {what} ...")
        report = audited(task, runs=not args.stand_ins, most=most, say=told)
    if args.json:
        print_json(report)
    else:
        print("\n".join(report.lines()))
    return EXIT_FAILED if report.failed else EXIT_OK


@contextlib.contextmanager
def _opened(loaded: Any, stand_ins: bool) -> Iterator[Any]:
    """Yields the task of a config, over stand-ins in a scratch folder where they are asked for.

    Raises:
      UserError: something cannot be opened.
    """
    from jaxops.plan.plan import outlined_task
    from jaxops.run.build import build_task

    if stand_ins:
        with tempfile.TemporaryDirectory(prefix="jaxops-audit-") as folder:
            yield outlined_task(loaded, Path(folder))
        return
    try:
        task = build_task(loaded)
    except UserError as error:
        raise UserError(f"{error}\n(--stand-ins audits what needs neither data nor weights)") from error
    yield task
