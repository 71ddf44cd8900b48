"""Alarms of a run: what a family's rules find in its metrics, each said once, and what then becomes of the run.

What was said lies in every checkpoint, so that a resumed run says what one that never stopped would say. Tested in
tests/core/test_alarms.py and, with real runs, in tests/run/test_alarmed_runs.py.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

OnAlarm = Literal["warn", "pause", "stop"]
Memory = Mapping[str, Any]
"""What rules remember from one call to the next, as plain JSON values; empty before the first."""
PAUSED = "paused"
"""The state of a run that an alarm has paused."""


@dataclasses.dataclass(frozen=True)
class Alarm:
    """One metric beyond one bound.

    Attributes:
      rule: the setting that asks for it, with its value: `watch.kl_above=20`. Another bound makes it another rule.
      step: the last step of what was measured.
      metric: the name of the metric, as in `metrics.jsonl`.
      value: its value.
      bound: the bound that it is beyond.
      text: a sentence for a person.
    """

    rule: str
    step: int
    metric: str
    value: float
    bound: float
    text: str


class AlarmRules(Protocol):
    """The rules of one task; the same metrics in the same order always give the same alarms.

    Metrics of the clock (`train/examples_per_s`) differ between processes and are no matter of a rule that pauses or
    stops: all processes must find the same.
    """

    @property
    def on_alarm(self) -> OnAlarm:
        """The consequence of an alarm: the run goes on, is left to be resumed, or ends as after early stopping."""
        ...

    @property
    def rules(self) -> Collection[str]:
        """All rules in force, as `Alarm.rule` names them."""
        ...

    def seen(self, memory: Memory, step: int, values: Mapping[str, float]) -> tuple[Memory, list[Alarm]]:
        """Returns the memory after the metrics of one step (`train/...` of a window or `valid/...`), and alarms."""
        ...


class Alarms:
    """The alarms that a run has raised, each rule's once.

    `history` is what a checkpoint stores: the rules' memory, and what was raised with the action that was taken.
    """

    def __init__(self, rules: AlarmRules | None) -> None:
        self._rules = rules
        self.restore(None)

    def restore(self, history: Mapping[str, Any] | None) -> None:
        """Takes up the history of a checkpoint; None begins anew."""
        held = history or {}
        self.history: dict[str, Any] = {
            "memory": dict(held.get("memory", {})),
            "raised": [dict(one) for one in held.get("raised", ())],
        }

    @property
    def on(self) -> bool:
        """Whether the task has rules."""
        return self._rules is not None

    @property
    def raised(self) -> list[dict[str, Any]]:
        """All alarms so far, oldest first."""
        return list(self.history["raised"])

    def see(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
        """Shows the rules the metrics of one step and returns the alarms that were not raised before."""
        if self._rules is None:
            return []
        memory, found = self._rules.seen(self.history["memory"], step, values)
        said = {one["rule"] for one in self.history["raised"]}
        new = [alarm for alarm in found if alarm.rule not in said]
        more = [{**dataclasses.asdict(alarm), "action": self._rules.on_alarm} for alarm in new]
        self.history = {"memory": dict(memory), "raised": [*self.history["raised"], *more]}
        return new

    @property
    def pauses(self) -> bool:
        """Whether a new alarm pauses the run."""
        return self._rules is not None and self._rules.on_alarm == "pause"

    def stop_reason(self) -> str | None:
        """Returns the sentence of the alarm that ends the run, None where none does."""
        return stop_reason_of(self._rules, self.history["raised"])


def stop_reason_of(rules: AlarmRules | None, raised: Any) -> str | None:
    """Returns the sentence of the first alarm that was raised to stop the run and is still in force; else None.

    Where the config says since that alarms do not stop the run, or gives that rule another bound, the run goes on.

    Args:
      rules: the rules of the task now.
      raised: `Alarms.raised`, maybe of a summary that was read from a file.
    """
    if rules is None or rules.on_alarm != "stop" or not isinstance(raised, Sequence):
        return None
    stops = (one for one in raised if isinstance(one, Mapping) and one.get("action") == "stop")
    return next((str(one.get("text", "")) for one in stops if one.get("rule") in rules.rules), None)
