"""`jaxops` in a process that gets a signal at a chosen moment of an iteration: CUT is `moment:count:signal`.

The count-th time that the moment comes, the process signals itself. A kill is met there and then; a SIGTERM is what a
preempted machine gets: the run goes on to where it may stop, saves and ends with 75.

With the environment of `kill_points.armed` it kills itself at any change of its files, or any call of a method of
`METHODS_OF`, or writes down all of those.
"""

import functools
import importlib
import os
import signal
import sys
import types
from typing import Any

if __name__ == "__main__":  # tests read what is named here, and want their reports
    sys.modules["jaxops.report.page"] = types.SimpleNamespace(write_report=lambda run: None)  # type: ignore[assignment]

import kill_points

from jaxops.core.step import TrainStep
from jaxops.rl.rewards.host import HostRewards
from jaxops.rl.slots import Programs
from jaxops.rl.step import PolicyStep

MOMENTS: dict[str, tuple[Any, str, bool]] = {
    "sampling": (Programs, "decode", False),
    "between_two_answers": (HostRewards, "_add", False),
    "after_the_journal": (HostRewards, "score", True),
    "mid_epoch": (TrainStep, "__call__", False),
    "after_update": (PolicyStep, "_updated", True),
}
"""By name: the method that marks the moment, and whether the moment is after it."""


METHODS_OF = (
    *("core.answers", "core.checkpoint", "core.journal", "core.metrics_file", "core.step", "core.turn", "core.writers"),
    *("rl.collect", "rl.rewards.calls", "rl.rewards.host", "rl.rewards.scoring", "rl.sample", "rl.slots", "rl.step"),
    *("families.policy.evaluation", "run.saving", "run.validation"),
)
"""The modules whose methods are moments: what an iteration, an evaluation and a save go through."""
CALL = "call"


def count_calls(counter: kill_points.Counter) -> None:
    """Counts the calls of methods too, each right before it runs, in whatever thread."""
    for name in METHODS_OF:
        module = importlib.import_module(f"jaxops.{name}")
        for holder in [one for one in vars(module).values() if isinstance(one, type)]:
            for attribute, method in list(vars(holder).items()):
                if isinstance(method, types.FunctionType) and method.__module__ == module.__name__:
                    setattr(holder, attribute, _counted(counter, method))


def _counted(counter: kill_points.Counter, method: Any) -> Any:
    @functools.wraps(method)
    def counted(*given: Any, **named: Any) -> Any:
        counter.met(CALL, [f"{counter.under}{method.__qualname__}"])
        return method(*given, **named)

    return counted


def arm(moment: str, count: str, number: str) -> None:
    holder, name, after = MOMENTS[moment]
    method, calls = getattr(holder, name), 0

    def marked(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        due = calls == int(count)
        if due and not after:
            os.kill(os.getpid(), getattr(signal, number))
        found = method(*given, **named)
        if due and after:
            os.kill(os.getpid(), getattr(signal, number))
        return found

    setattr(holder, name, marked)


if __name__ == "__main__":
    if "CUT" in os.environ:
        arm(*os.environ["CUT"].split(":"))
    if kill_points.UNDER in os.environ:
        counter = kill_points.arm()
        counter.count_lines()
        count_calls(counter)
    from jaxops.cli.main import script

    sys.argv[0] = "jaxops"
    script()
