"""The rewards of a policy as a config names them, each with a name, a weight and a bound of its own.

rewards:
  - {fn: "mypkg.rewards:exact_answer", timeout: 5s, workers: 8, on_error: drop}
  - {run: runs/rm-helpful, weight: 0.3, clip: 5}
  - {kind: missing_eos, penalty: 1.0}
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxops.config.types import ByPath, Duration, Factory

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=100)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
OnError = Literal["drop", "zero", "stop"]
Reduce = Literal["mean", "min", "mean_minus_std"]

CALLED = Factory(leading=2, note="a function fn(prompts, completions, **columns) -> list[float | None]", open=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionReward:
    """A function of one's own, sync or async, that judges each completion by itself.

    It is called as `fn(prompts, completions, **columns)` with lists of one length, and returns a list of that length:
    a finite number, or None, which drops the sample. A function without `**columns` gets the columns that it names.
    With `metrics` it returns `(list, {name: list})`: further numbers, which are logged and not learnt from.

    Attributes:
      fn: its import path, or `{fn: path, keyword: value}`, whose keywords are handed on with every call.
      name: its name in metrics and messages; by default the function's own.
      weight: its weight in the sum.
      clip: bounds the answer to [-clip, clip] before it is weighted; null leaves it.
      timeout: the longest that one call may last.
      workers: the number of calls that run at a time, each with some of the samples.
      on_error: what becomes of a sample that the function cannot judge, because it raises, hangs, or returns something
        else than a finite number: `drop` the sample, score it as `zero`, or `stop` the run.
      metrics: the names of further metrics that it returns, each logged as `reward/NAME/METRIC`; None as a value leaves
        the completion out of the mean.
    """

    fn: Annotated[ByPath, CALLED]
    name: Name | None = None
    weight: Number = 1.0
    clip: Positive | None = None
    timeout: Duration = Duration(300.0)
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    on_error: OnError = "stop"
    metrics: tuple[Name, ...] = ()

    @property
    def label(self) -> str:
        """Its name in metrics and messages."""
        return self.name or self.fn.fn.rpartition(":")[2].rpartition(".")[2]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yields (field, message) where the fields do not go together."""
        if twice := [name for name, times in Counter(self.metrics).items() if times > 1]:
            yield "metrics", f"{twice[0]!r} is there more than once"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunReward:
    """A reward model that a run has trained; its scores have a mean of 0 and a deviation of 1 on its reference texts.

    Attributes:
      run: the folder of the run.
      name: its name in metrics; by default the folder's.
      weight: its weight in the sum.
      clip: bounds the score to [-clip, clip] before it is weighted; null leaves it.
      reduce: how the scores of several heads become one: their `mean`, the `min`, or `mean_minus_std`, the mean less k
        deviations (Coste et al. 2024).
      k: the number of deviations.
      step: the step of the checkpoint; null takes the one that the run serves.
    """

    run: str
    name: Name | None = None
    weight: Number = 1.0
    clip: Positive | None = None
    reduce: Reduce = "mean"
    k: NotNegative = 1.0
    step: Annotated[int, Field(ge=0)] | None = None

    @property
    def label(self) -> str:
        """Its name in metrics and messages."""
        return self.name or PurePosixPath(self.run).name or "run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MissingEos:
    """A penalty for completions that were cut at the largest number of tokens, so that they never ended.

    Attributes:
      penalty: is taken off.
    """

    kind: Literal["missing_eos"] = "missing_eos"
    penalty: NotNegative

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return self.kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthPenalty:
    """A penalty for every token of a completion.

    Attributes:
      per_token: is taken off for each token; a negative one rewards length.
    """

    kind: Literal["length"] = "length"
    per_token: Number

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return self.kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlong:
    """The soft punishment of long completions in DAPO (Yu et al. 2025, equation 13).

    Nothing is taken off up to `longest - buffer` tokens. From there on the penalty grows linearly, and it is whole from
    `longest` tokens on.

    Attributes:
      longest: the number of tokens from which on the penalty is whole.
      buffer: the number of tokens over which it grows.
      penalty: is taken off at most.
    """

    kind: Literal["overlong"] = "overlong"
    longest: Annotated[int, Field(ge=1)]
    buffer: Annotated[int, Field(ge=1)]
    penalty: NotNegative = 1.0

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return self.kind

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yields (field, message) where the fields do not go together."""
        if self.buffer > self.longest:
            yield "buffer", f"must be at most longest ({self.longest})"


def further_metrics(rewards: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    """Returns the names of the further metrics of each function among `rewards`, by the function's name."""
    return {reward.label: reward.metrics for reward in rewards if isinstance(reward, FunctionReward)}


Reward = FunctionReward | RunReward | MissingEos | LengthPenalty | Overlong


def reward_problems(rewards: Sequence[Reward], path: str = "rewards") -> list[tuple[str, str]]:
    """Returns (dotted path, message) of everything that cannot work about the list of rewards at `path`."""
    if not rewards:
        return [(path, "nothing to learn from: name one reward or more")]
    times, found = Counter(reward.label for reward in rewards), []
    for at, reward in enumerate(rewards):
        if times[reward.label] > 1:
            has_name = isinstance(reward, FunctionReward | RunReward)
            hint = "set name" if has_name else "set the name of the other, or leave one out"
            found.append((f"{path}.{at}", f"another reward is named {reward.label!r} too: {hint}"))
    return found
