"""Alarms of policy optimisation: signs in the metrics that a policy is leaving the ground on which its reward is true.

A policy that finds the flaws of its reward moves far from the reference, repeats itself, writes far more or far less
than it did, or is paid ever more for answers that an independent judge likes ever less (Gao et al. 2023 measure it).
`observed` is a pure function from what it remembers and the metrics of one step. Tested in tests/rl/test_watch.py.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxops.core.alarms import Alarm, Memory, OnAlarm

FIRST_STEPS = 10
"""The steps whose mean is the beginning that lengths and entropies are compared with; at least the first window."""
EVALUATIONS = 2
"""The evaluations in a row in which the judge must have fallen: one may be chance."""
MISMATCH = {"float32": 0.05, "bfloat16": 0.5}
"""By the dtype of the computation, nats between the log-probabilities of sampling and of training that are a fault."""

Bound = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Below = Annotated[float, Field(gt=0, lt=1)]
Above = Annotated[float, Field(gt=1, allow_inf_nan=False)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watching:
    """The bounds of a run's metrics, and what becomes of it beyond them; null takes a bound away.

    An alarm is looked for in every window of `run.log_every` steps and in every evaluation. Each is raised once.

    Attributes:
      kl_above: bound of the KL to the reference, in nats a completion.
      entropy_below: bound of the entropy, as a factor of its mean in the first steps.
      length_below: the same for the length of completions that become short.
      length_above: the same for the length of completions that become long.
      ratio0_above: bound of the difference between the log-probabilities of sampling and of training before an update;
        `auto` is 0.05 in float32 and 0.5 in bfloat16.
      judge_falls: whether it is an alarm that the judge's win rate falls while the reward rises.
      on_alarm: `warn` says it and goes on, `pause` saves and exits with status 75, so that a person can look and run
        the same command to go on, `stop` ends the run as early stopping does.
    """

    kl_above: Bound | None = 20.0
    entropy_below: Below | None = 0.1
    length_below: Below | None = 0.3
    length_above: Above | None = 3.0
    ratio0_above: Bound | Literal["auto"] | None = "auto"
    judge_falls: bool = True
    on_alarm: OnAlarm = "warn"

    def in_dtype(self, compute: str) -> "Watching":
        """Returns the same with the bound of a difference that rounding in this dtype stays below, where it is auto."""
        return dataclasses.replace(self, ratio0_above=MISMATCH[compute]) if self.ratio0_above == "auto" else self


@dataclasses.dataclass(frozen=True)
class PolicyAlarms:
    """The rules of a run, as `core.alarms.AlarmRules`.

    Attributes:
      watching: the bounds, none of them `auto`.
      prompts: the number of held-out prompts, which decides what fall of a win rate is more than chance.
    """

    watching: Watching
    prompts: int

    @property
    def on_alarm(self) -> OnAlarm:
        """The consequence of an alarm for the run."""
        return self.watching.on_alarm

    @property
    def rules(self) -> frozenset[str]:
        """All rules in force."""
        names = (field.name for field in dataclasses.fields(self.watching) if field.name != "on_alarm")
        return frozenset(_rule(name, getattr(self.watching, name)) for name in names)

    def seen(self, memory: Memory, step: int, values: Mapping[str, float]) -> tuple[Memory, list[Alarm]]:
        """Returns the memory after the metrics of a step, and all that is beyond its bound in them."""
        return observed(self.watching, self.prompts, memory, step, values)


def observed(
    watching: Watching, prompts: int, memory: Memory, step: int, values: Mapping[str, float]
) -> tuple[Memory, list[Alarm]]:
    """Returns what is to be remembered after the metrics of one step, and all alarms in them.

    A metric that is missing or no number raises none.

    Args:
      watching: the bounds.
      prompts: the number of held-out prompts.
      memory: what the last call returned; empty at first.
      step: the last step of the window, or the step of the evaluation.
      values: `train/...` of a window, or `valid/...` of an evaluation.
    """
    known = {name: float(value) for name, value in values.items() if math.isfinite(value)}
    if "train/length" in known:
        memory = _remembered(memory, step, known)
        return memory, list(_of_window(watching, memory, step, known))
    if watching.judge_falls and {"valid/win_rate", "valid/reward"} <= known.keys():
        return _judged(memory, step, known["valid/win_rate"], known["valid/reward"], prompts)
    return memory, []


def _remembered(memory: Memory, step: int, known: Mapping[str, float]) -> Memory:
    """Adds a window of the first steps to the sums that their means are made of, each step counted once."""
    before, first = int(memory.get("step", 0)), memory.get("first", {})
    if first and step > FIRST_STEPS:
        return {**memory, "step": step}
    sums, steps = dict(first), step - before
    for name in ("length", "entropy"):
        if (value := known.get(f"train/{name}")) is not None:
            total, count = first.get(name, (0.0, 0))
            sums[name] = [total + steps * value, count + steps]
    return {**memory, "step": step, "first": sums}


def _of_window(watching: Watching, memory: Memory, step: int, known: Mapping[str, float]) -> Iterator[Alarm]:
    kl, apart = known.get("train/kl", math.nan), known.get("train/ratio0", math.nan)
    if (bound := watching.kl_above) is not None and kl > bound:
        text = (
            f"the policy is {kl:.4g} nats a completion from its reference, more than {bound:g}: so far from it a reward"
            " may no longer mean what it did; read some samples"
        )
        yield Alarm(_rule("kl_above", bound), step, "train/kl", kl, bound, text)
    most = watching.ratio0_above
    if isinstance(most, int | float) and apart > most:
        text = (
            f"sampling and training differ by {apart:.4g} nats in the log-probability of a token, more than {most:g}:"
            " they disagree about the model, so ratios do not begin at 1"
        )
        yield Alarm(_rule("ratio0_above", most), step, "train/ratio0", apart, most, text)
    kinds = (
        ("entropy_below", "entropy", watching.entropy_below, "the policy nearly always writes the same"),
        ("length_below", "length", watching.length_below, "completions have become short"),
        ("length_above", "length", watching.length_above, "completions have become long"),
    )
    for name, metric, factor, means in kinds:
        total, steps = memory["first"].get(metric, (0.0, 0))
        value = known.get(f"train/{metric}", math.nan)
        if factor is None or not steps:
            continue
        bound = factor * total / steps
        if value < bound if factor < 1 else value > bound:
            text = f"{means}: their {metric} is {value:.4g}, and was {total / steps:.4g} in the first steps"
            yield Alarm(_rule(name, factor), step, f"train/{metric}", value, bound, text)


def _judged(memory: Memory, step: int, rate: float, reward: float, prompts: int) -> tuple[Memory, list[Alarm]]:
    """Counts the evaluations in a row whose win rate is below the best by more than chance, at a higher reward.

    Chance is two standard errors of a rate of one half, which is the most that a rate of as many prompts has.
    """
    held: Mapping[str, Any] = memory.get("judge") or {"best": -math.inf, "at": 0}
    if step <= held["at"]:
        return memory, []
    if rate >= held["best"]:
        return {**memory, "judge": {"best": rate, "reward": reward, "of": step, "below": 0, "at": step}}, []
    bound = held["best"] - 1 / math.sqrt(prompts)
    below = held["below"] + 1 if rate < bound and reward > held["reward"] else 0
    memory = {**memory, "judge": {**held, "below": below, "at": step}}
    if below < EVALUATIONS:
        return memory, []
    text = (
        f"the reward has risen from {held['reward']:.4g} to {reward:.4g} since step {held['of']}, but the judge's win"
        f" rate has fallen from {held['best']:.3f} to {rate:.3f}: the policy is learning to please the reward alone"
    )
    return memory, [Alarm(_rule("judge_falls", True), step, "valid/win_rate", rate, bound, text)]


def _rule(name: str, value: float | bool | str | None) -> str:
    if isinstance(value, bool):
        return f"watch.{name}={str(value).lower()}"
    return f"watch.{name}={value:g}" if isinstance(value, int | float) else f"watch.{name}={value or 'null'}"
