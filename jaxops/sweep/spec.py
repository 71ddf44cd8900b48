"""The schema of a sweep file: what is swept over a base config, how its runs are run, and what they are judged by."""

import dataclasses
import math
from collections.abc import Mapping
from random import Random
from typing import Annotated, Any, Literal

from pydantic import Field

MAX_POINTS = 20_000
"""Of one sweep; more than that can be planned by nobody, and a slip of a zero must not fill the memory."""
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=1, le=MAX_POINTS)]
DIGITS = 4
"""Significant digits of a number that is drawn: more would say nothing, and fewer can be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bounded:
    """A distribution of numbers from `low` to `high`."""

    low: float
    high: float

    def problems(self) -> list[tuple[str, str]]:
        """Returns (field, message) where the bounds leave nothing to draw."""
        if self.low < self.high:
            return []
        return [("low", f"must be below high {self.high:g}, got {self.low:g}")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(_Bounded):
    """A number from `low` to `high`, each as likely."""

    kind: Literal["uniform"] = "uniform"

    def draw(self, random: Random) -> float:
        """Returns a value of the distribution."""
        return _within(random.uniform(self.low, self.high), self.low, self.high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogUniform(_Bounded):
    """A number from `low` to `high` whose logarithm is uniform: for learning rates."""

    kind: Literal["loguniform"] = "loguniform"
    low: Annotated[float, Field(gt=0)]
    high: Annotated[float, Field(gt=0)]

    def draw(self, random: Random) -> float:
        """Returns a value of the distribution."""
        return _within(math.exp(random.uniform(math.log(self.low), math.log(self.high))), self.low, self.high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integer(_Bounded):
    """A whole number from `low` to `high`, both included."""

    kind: Literal["int"] = "int"
    low: int
    high: int

    def draw(self, random: Random) -> int:
        """Returns a value of the distribution."""
        return random.randint(self.low, self.high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pick:
    """One of the values `of`, each as likely; whole sections too."""

    kind: Literal["choice"] = "choice"
    of: Annotated[tuple[Any, ...], Field(min_length=1)]

    def draw(self, random: Random) -> Any:
        """Returns one of the values."""
        return self.of[random.randrange(len(self.of))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomDraws:
    """Random points: `count` draws of all the `values`.

    Draw number i of a path depends on the seed, the path and i alone: a larger count adds points and changes none.
    """

    count: Count
    seed: int = 0
    values: Mapping[str, Uniform | LogUniform | Integer | Pick]


@dataclasses.dataclass(frozen=True, kw_only=True)
class When:
    """Further parts of the sweep, for the points whose config has the values of `if`.

    A list in `if` means one of its values.
    """

    if_: Mapping[str, Any]
    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    zip: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    random: RandomDraws | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """The points of a sweep: the product of its parts, over dotted paths of the base config.

    Attributes:
      grid: lists of values, or a range of whole numbers `0..4`; every combination is run.
      zip: lists of one length that are walked together.
      random: values that are drawn.
      seeds: the number of seeds of each point (run.seed 0, 1, ...), or the seeds themselves.
      when: parts for some of the points only.
    """

    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    zip: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    random: RandomDraws | None = None
    seeds: Count | tuple[int, ...] | None = None
    when: tuple[When, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class InProcess:
    """Runs one point after the other in this process: nothing is imported or compiled twice, but a crash ends all."""

    kind: Literal["in_process"] = "in_process"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """Runs each point in a process of its own on this machine, `jobs` at a time, each with its share of it."""

    kind: Literal["local"] = "local"
    jobs: Positive = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """A sweep file without its `base:`.

    Attributes:
      runs: the points.
      metric: what the runs are judged by, on validation. By default what the base keeps its best checkpoint by, else
        what it stops early by, else the first of evaluate.metrics.
      runner: how they are run.
      name: the sweep's name; by default that of its file.
      dir: where its folder is made; by default run.dir of the base.
    """

    runs: Runs = Runs()
    metric: str | None = None
    runner: Local | InProcess = Local()
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] | None = None
    dir: str | None = None


def _within(value: float, low: float, high: float) -> float:
    """Returns a value with few digits that is still between the bounds."""
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)
