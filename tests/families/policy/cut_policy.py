"""`jaxops` in a process that gets a signal at a chosen moment of an iteration: CUT is `moment:count:signal`.

The count-th time that the moment comes, the process signals itself. A kill is met there and then; a SIGTERM is what a
preempted machine gets: the run goes on to where it may stop, saves and ends with 75.
"""

import os
import signal
import sys
import types
from typing import Any

sys.modules["jaxops.report.page"] = types.SimpleNamespace(write_report=lambda run: None)  # type: ignore[assignment]

from jaxops.core.step import TrainStep  # noqa: E402
from jaxops.rl.rewards.host import HostRewards  # noqa: E402
from jaxops.rl.slots import Programs  # noqa: E402
from jaxops.rl.step import PolicyStep  # noqa: E402

MOMENTS: dict[str, tuple[Any, str, bool]] = {
    "sampling": (Programs, "decode", False),
    "between_two_answers": (HostRewards, "_add", False),
    "after_the_journal": (HostRewards, "score", True),
    "mid_epoch": (TrainStep, "__call__", False),
    "after_update": (PolicyStep, "_updated", True),
}
"""By name: the method that marks the moment, and whether the moment is after it."""


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
    from jaxops.cli.main import script

    sys.argv[0] = "jaxops"
    script()
