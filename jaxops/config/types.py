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
    """An interval in one unit, `steps`, `seconds` or `epochs`; the other two are None."""

    steps: int | None = None
    seconds: float | None = None
    epochs: float | None = None
    text: str = dataclasses.field(default="", compare=False, repr=False)

    expected: ClassVar[str] = "a number of steps, or a duration such as 30s, 10min or 2h, or 1epoch"

    def __post_init__(self) -> None:
        if (self.steps, self.seconds, self.epochs).count(None) != 2:
            raise ValueError("exactly one of steps, seconds and epochs")

    @classmethod
    def from_config(cls, value: Any) -> "Every":
        """Reads `1000`, `10min` or `1epoch` (`0.5epoch`, `2epochs`).

        Raises:
          ValueError: the spelling is another, or the value is not above zero.
        """
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ValueError("must be at least 1 step")
            return cls(steps=value)
        if match := re.fullmatch(r"(\d+(?:\.\d+)?) ?epochs?", value) if isinstance(value, str) else None:
            if float(match[1]) <= 0:
                raise ValueError("must be more than no epoch")
            return cls(epochs=float(match[1]), text=value)
        return cls(seconds=_seconds(value), text=value)

    def in_steps(self, epoch: float) -> int | None:
        """Steps between two times, where an epoch has `epoch` of them; None where seconds are given."""
        if self.epochs is not None:
            return max(round(self.epochs * epoch), 1)
        return self.steps

    def to_config(self) -> int | str:
        """Returns the spelling that it was read from, else the shortest that is exact."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return self.text or f"{self.epochs:g}epoch{'' if self.epochs == 1 else 's'}"
        assert self.seconds is not None
        return self.text or _spell(self.seconds)


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
