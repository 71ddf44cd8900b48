"""Distributions of swept values: of random draws, and of what a search suggests.

Each knows how it is drawn, how it is suggested by something that has Optuna's `suggest_...` methods, and the number
that stands for a value there. Optuna itself is not imported.
"""

import dataclasses
import math
from random import Random
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

DIGITS = 4
"""Significant digits of a number that is drawn: more would say nothing, and fewer can be read."""


class Suggests(Protocol):
    """The methods of an Optuna trial that suggest values."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Returns a number.

        Args:
          name: the dotted path that it is for.
          low: the smallest.
          high: the largest.
          log: its logarithm is what is uniform.
        """
        ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Returns a whole number.

        Args:
          name: the dotted path that it is for.
          low: the smallest.
          high: the largest.
          log: its logarithm is what is uniform.
        """
        ...

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Returns one of the choices."""
        ...


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

    def parameter_of(self, value: Any) -> float | None:
        """Returns the number that stands for a value in a search; None where it is not between the bounds."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if number and self.low <= value <= self.high else None

    @property
    def shown(self) -> str:
        """The values it has, for people."""
        return f"{self.low:g} to {self.high:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(_Bounded):
    """A number from `low` to `high`, each as likely."""

    kind: Literal["uniform"] = "uniform"

    def draw(self, random: Random) -> float:
        """Returns a value of the distribution."""
        return _within(random.uniform(self.low, self.high), self.low, self.high)

    def suggest(self, trial: Suggests, name: str) -> float:
        """Returns the value that a trial suggests."""
        return _within(trial.suggest_float(name, self.low, self.high), self.low, self.high)

    def corners(self) -> list[Any]:
        """Returns the values at which a config is most likely to be wrong."""
        return [self.low, self.high]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogUniform(_Bounded):
    """A number from `low` to `high` whose logarithm is uniform: for learning rates."""

    kind: Literal["loguniform"] = "loguniform"
    low: Annotated[float, Field(gt=0)]
    high: Annotated[float, Field(gt=0)]

    def draw(self, random: Random) -> float:
        """Returns a value of the distribution."""
        return _within(math.exp(random.uniform(math.log(self.low), math.log(self.high))), self.low, self.high)

    def suggest(self, trial: Suggests, name: str) -> float:
        """Returns the value that a trial suggests."""
        return _within(trial.suggest_float(name, self.low, self.high, log=True), self.low, self.high)

    def corners(self) -> list[Any]:
        """Returns the values at which a config is most likely to be wrong."""
        return [self.low, self.high]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integer(_Bounded):
    """A whole number from `low` to `high`, both included."""

    kind: Literal["int"] = "int"
    low: int
    high: int

    def draw(self, random: Random) -> int:
        """Returns a value of the distribution."""
        return random.randint(self.low, self.high)

    def suggest(self, trial: Suggests, name: str) -> int:
        """Returns the value that a trial suggests."""
        return trial.suggest_int(name, self.low, self.high)

    def parameter_of(self, value: Any) -> float | None:
        """Returns the number that stands for a value in a search; None where it is no whole number of the range."""
        return super().parameter_of(value) if isinstance(value, int) else None

    def corners(self) -> list[Any]:
        """Returns every value of a short range, else its bounds and two between."""
        if self.high - self.low < 8:
            return list(range(self.low, self.high + 1))
        third = (self.high - self.low) // 3
        return [self.low, self.low + third, self.high - third, self.high]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pick:
    """One of the values `of`, each as likely; whole sections too."""

    kind: Literal["choice"] = "choice"
    of: Annotated[tuple[Any, ...], Field(min_length=1)]

    def draw(self, random: Random) -> Any:
        """Returns one of the values."""
        return self.of[random.randrange(len(self.of))]

    def suggest(self, trial: Suggests, name: str) -> Any:
        """Returns the value that a trial suggests, by its number: sections are no categories of Optuna's."""
        return self.of[trial.suggest_categorical(name, list(range(len(self.of))))]

    def parameter_of(self, value: Any) -> float | None:
        """Returns the number of a value in `of`; None where it is not there."""
        same = (at for at, one in enumerate(self.of) if type(one) is type(value) and one == value)
        return next(same, None)

    def corners(self) -> list[Any]:
        """Returns all values."""
        return list(self.of)

    @property
    def shown(self) -> str:
        """The values it has, for people."""
        return f"{len(self.of)} values"


Distribution = Uniform | LogUniform | Integer | Pick


def _within(value: float, low: float, high: float) -> float:
    """Returns a value with few digits that is still between the bounds."""
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)
