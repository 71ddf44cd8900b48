"""Each alarm is raised at its bound and not before it, from a history of windows and evaluations alone."""

import dataclasses
import json
import math

import pytest

from jaxops.core.alarms import Alarms
from jaxops.families.policy.config import PolicyConfig
from jaxops.rl.watch import FIRST_STEPS, PolicyAlarms, Watching

PLAIN = {"train/kl": 1.0, "train/entropy": 2.0, "train/length": 40.0, "train/ratio0": 1e-5}
WATCHING = Watching().in_dtype("float32")


def said(history, watching=WATCHING, prompts=100):
    """The (rule, step) of each alarm over a history of (step, values), with a checkpoint after every entry."""
    rules, found, alarms = PolicyAlarms(watching, prompts), [], None
    for step, values in history:
        held = alarms and json.loads(json.dumps(alarms.history))
        alarms = Alarms(rules)
        alarms.restore(held)
        found += [(alarm.rule, alarm.step) for alarm in alarms.see(step, values)]
    assert {rule for rule, _ in found} <= rules.rules
    return found


def windows(*changes, every=5):
    return [(every * (at + 1), {**PLAIN, **change}) for at, change in enumerate(({}, {}, *changes))]


@pytest.mark.parametrize(
    "metric, within, beyond, rule",
    [
        ("kl", 20.0, 20.1, "watch.kl_above=20"),
        ("entropy", 0.21, 0.19, "watch.entropy_below=0.1"),
        ("length", 12.1, 11.9, "watch.length_below=0.3"),
        ("length", 119.0, 121.0, "watch.length_above=3"),
        ("ratio0", 0.05, 0.06, "watch.ratio0_above=0.05"),
    ],
)
def test_a_window_beyond_a_bound_is_an_alarm(metric, within, beyond, rule):
    name = f"train/{metric}"
    assert said(windows({name: within}, {name: math.nan})) == []
    assert said(windows({name: within}, {name: beyond}, {name: 2 * beyond})) == [(rule, 20)]
    off = dataclasses.replace(WATCHING, **{rule.split(".")[1].split("=")[0]: None})
    assert said(windows({name: beyond}), off) == []


def test_the_beginning_is_the_mean_of_the_first_steps_however_often_they_are_logged():
    lengths = [*range(10, 30, 2), 4, 4]  # of the steps, one after the other: 19 in the first ten
    each = [(at + 1, {**PLAIN, "train/length": float(x)}) for at, x in enumerate(lengths)]
    pairs = [(at + 2, {**PLAIN, "train/length": sum(lengths[at : at + 2]) / 2}) for at in range(0, len(lengths), 2)]
    assert len(lengths) > FIRST_STEPS and said(each) == [("watch.length_below=0.3", 11)]
    assert said(pairs) == [("watch.length_below=0.3", 12)]
    long = [(50, PLAIN), (100, {**PLAIN, "train/length": 11.0})]  # a first window is a beginning, how long it may be
    assert said(long) == [("watch.length_below=0.3", 100)]


def test_a_mismatch_is_seen_in_the_first_window():
    assert said([(1, {**PLAIN, "train/ratio0": 0.2})]) == [("watch.ratio0_above=0.05", 1)]
    half = Watching().in_dtype("bfloat16")
    assert half.ratio0_above == 0.5 and said([(1, {**PLAIN, "train/ratio0": 0.2})], half) == []
    assert dataclasses.replace(half, ratio0_above=0.1).in_dtype("float32").ratio0_above == 0.1


def judged(*pairs):
    return [
        (10 * (at + 1), {"valid/win_rate": rate, "valid/reward": reward}) for at, (rate, reward) in enumerate(pairs)
    ]


def test_a_judge_that_falls_while_the_reward_rises_is_an_alarm():
    rule = "watch.judge_falls=true"
    assert said(judged((0.5, 0), (0.7, 1), (0.5, 2), (0.4, 3), (0.3, 4))) == [(rule, 40)]
    assert said(judged((0.5, 0), (0.7, 1), (0.5, 2), (0.65, 3), (0.5, 4))) == []  # never twice in a row
    assert said(judged((0.5, 0), (0.7, 1), (0.61, 2), (0.61, 3), (0.61, 4))) == []  # no more than chance of 100 prompts
    assert said(judged((0.5, 0), (0.7, 1), (0.61, 2), (0.61, 3)), prompts=400) == [(rule, 40)]
    assert said(judged((0.5, 0), (0.7, 1), (0.4, 0.9), (0.3, 0.8))) == []  # the reward falls too: no flaw of it is used
    assert said(judged((0.7, 0), (0.4, 1), (0.4, 2)), dataclasses.replace(WATCHING, judge_falls=False)) == []
    twice = [*judged((0.7, 0), (0.4, 1)), (20, {"valid/win_rate": 0.4, "valid/reward": 1.0})]
    assert said(twice) == []  # one evaluation, recorded twice
    assert said([(10, {"valid/reward": 1.0}), (20, {"valid/win_rate": math.nan, "valid/reward": 2.0})]) == []


def test_a_resumed_run_may_be_watched_otherwise():
    assert "watch" in PolicyConfig.may_change_on_resume
