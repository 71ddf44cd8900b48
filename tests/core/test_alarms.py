"""Alarms are raised once for each rule, survive a checkpoint, and stop a run only where its config still says so."""

import dataclasses
import json

import pytest

from jaxops.core.alarms import Alarm, Alarms, stop_reason_of


@dataclasses.dataclass(frozen=True)
class Above:
    """Counts what it saw, and finds whatever is above a bound."""

    bound: float = 1.0
    on_alarm: str = "stop"

    @property
    def rules(self):
        return {f"x_above={self.bound:g}"}

    def seen(self, memory, step, values):
        x = values.get("x", 0.0)
        found = [Alarm(*self.rules, step, "x", x, self.bound, f"x is {x:g}")] if x > self.bound else []
        return {"count": memory.get("count", 0) + 1}, found


def test_each_rule_is_raised_once_also_over_a_checkpoint():
    alarms = Alarms(Above(on_alarm="warn"))
    assert alarms.see(1, {"x": 0.5}) == []
    (first,) = alarms.see(2, {"x": 2.0})
    assert (first.step, first.value, first.text) == (2, 2.0, "x is 2")
    again = Alarms(Above(on_alarm="warn"))
    again.restore(json.loads(json.dumps(alarms.history)))
    assert again.see(3, {"x": 3.0}) == alarms.see(3, {"x": 3.0}) == []
    assert again.history == alarms.history and again.history["memory"] == {"count": 3}
    higher = Alarms(Above(2.5, "warn"))
    higher.restore(alarms.history)
    assert [one.rule for one in higher.see(4, {"x": 3.0})] == ["x_above=2.5"]  # another bound is another rule
    assert [one["rule"] for one in higher.raised] == ["x_above=1", "x_above=2.5"]


def test_what_stopped_a_run_holds_until_the_config_says_otherwise():
    alarms = Alarms(Above())
    assert alarms.stop_reason() is None
    alarms.see(5, {"x": 2.0})
    assert alarms.stop_reason() == "x is 2"
    assert stop_reason_of(Above(), alarms.raised) == "x is 2"
    for rules in (None, Above(on_alarm="warn"), Above(on_alarm="pause"), Above(3.0)):
        assert stop_reason_of(rules, alarms.raised) is None
    warned = Alarms(Above(on_alarm="warn"))
    warned.see(5, {"x": 2.0})
    assert stop_reason_of(Above(), warned.raised) is None  # it was said, and the run went on


@pytest.mark.parametrize("odd", [None, "text", 3, [None], [{}], [{"action": "stop"}], [{"action": "stop", "rule": 1}]])
def test_an_odd_summary_stops_nothing(odd):
    assert stop_reason_of(Above(), odd) is None


def test_without_rules_nothing_is_seen():
    alarms = Alarms(None)
    assert not alarms.on and not alarms.pauses and alarms.see(1, {"x": 9.0}) == [] and alarms.raised == []
