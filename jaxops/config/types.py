"""Small value types of configurations; each has one spelling in YAML, which the dump reproduces."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from jaxops.config.bypath import ByPath, Factory

__all__ = ["ByPath", "CrossChecked", "Duration", "Every", "Factory", "Spelled"]

_SECONDS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


@runtime_checkable
class Spelled(Protocol):
    """A dataclass that is written as one YAML value; these methods read and write it, not its fields."""

    expected: ClassVar[str]
    """The value to write, for the error message: "a duration such as 30s"."""

    @classmethod
    def from_config(cls, value: Any) -> Self:
        """Returns the value that YAML holds.

        Raises:
          ValueError: the value does not fit.
        """
        ...

    def to_config(self) -> Any:
        """Returns the spelling in plain YAML values, the inverse of `from_config`."""
        ...


@runtime_checkable
class CrossChecked(Protocol):
    """A dataclass whose fields depend on each other; it is checked once all its fields are valid."""

    def problems(self) -> Iterable[tuple[str, str]]:
        """Returns what does not go together, as (dotted path from this dataclass on, message)."""
        ...


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of time: `500ms`, `30s`, `10min`, `2h`, `1d`."""

    seconds: float
    text: str = dataclasses.field(default="", compare=False, repr=False)

    expected: ClassVar[str] = "a duration such as 30s, 10min or 2h"

    @classmethod
    def from_config(cls, value: Any) -> "Duration":
        """Reads `30s`.

        Raises:
          ValueError: the spelling is another, or the duration is not above zero.
        """
        return cls(_seconds(value), value)

    def to_config(self) -> str:
        """Returns the spelling that it was read from, else the shortest that is exact."""
        return self.text or _spell(self.seconds)


@dataclasses.dataclass(frozen=True)
class Every:
    """An interval in `steps`, `seconds` or `epochs`, the others None; of steps and epochs together, the shorter."""

    steps: int | None = None
    seconds: float | None = None
    epochs: float | None = None
    text: str = dataclasses.field(default="", compare=False, repr=False)

    expected: ClassVar[str] = (
        "a number of steps, or a duration such as 30s, 10min or 2h, or 1epoch, or '100 or 1epoch' (the shorter)"
    )

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None and self.epochs is None):
            raise ValueError("steps, epochs or both of them, or seconds")

    @classmethod
    def from_config(cls, value: Any) -> "Every":
        """Reads `1000`, `10min`, `1epoch` (`0.5epoch`, `2epochs`) or `100 or 1epoch`.

        Raises:
          ValueError: the spelling is another, or the value is not above zero.
        """
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ValueError("must be at least 1 step")
            return cls(steps=value)
        if isinstance(value, str) and (match := re.fullmatch(r"(\d+) or (.*)", value)):
            steps, other = cls.from_config(int(match[1])), cls.from_config(match[2])
            if other.epochs is None:
                raise ValueError
            return cls(steps=steps.steps, epochs=other.epochs, text=value)
        if match := re.fullmatch(r"(\d+(?:\.\d+)?) ?epochs?", value) if isinstance(value, str) else None:
            if float(match[1]) <= 0:
                raise ValueError("must be more than no epoch")
            return cls(epochs=float(match[1]), text=value)
        return cls(seconds=_seconds(value), text=value)

    def in_steps(self, epoch: float) -> int | None:
        """Steps between two times, where an epoch has `epoch` of them; None where seconds are given."""
        if self.epochs is None:
            return self.steps
        epochs = max(round(self.epochs * epoch), 1)
        return epochs if self.steps is None else min(self.steps, epochs)

    def to_config(self) -> int | str:
        """Returns the spelling that it was read from, else the shortest that is exact."""
        if self.seconds is not None:
            return self.text or _spell(self.seconds)
        if self.epochs is None:
            assert self.steps is not None
            return self.steps
        epochs = f"{self.epochs:g}epoch{'' if self.epochs == 1 else 's'}"
        return self.text or (epochs if self.steps is None else f"{self.steps} or {epochs}")


def _seconds(value: Any) -> float:
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(_SECONDS)})", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError
    seconds = float(match.group(1)) * _SECONDS[match.group(2)]
    if seconds <= 0:
        raise ValueError("must be longer than nothing")
    return seconds


def _spell(seconds: float) -> str:
    for unit in ("d", "h", "min"):
        if seconds % _SECONDS[unit] == 0:
            return f"{int(seconds / _SECONDS[unit])}{unit}"
    return f"{seconds:g}s" if float(f"{seconds:g}") == seconds else f"{seconds!r}s"
