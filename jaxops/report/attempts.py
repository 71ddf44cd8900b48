"""What `attempts.json` in a run's folder says: how often the run was begun, on what, and for how many chip-hours.

The file is written by jaxops/run/attempts.py. Tested in tests/run/test_attempts.py.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jaxops.report.folder import finite


@dataclasses.dataclass(frozen=True)
class AttemptsRecord:
    """The attempts of a run that was launched.

    Attributes:
      count: how many there were.
      preemptions: how many ended without the run being over and without a person's wish: preempted or killed.
      chip_hours: hours from the start of each worker to its last sign of life, times its chips; None where the number
        of chips is unknown.
      facts: what is known of the last attempt, by name: accelerator, backend, price, code, image, labels, ...
    """

    count: int
    preemptions: int
    chip_hours: float | None
    facts: Mapping[str, Any]


def read_attempts(found: Mapping[str, Any]) -> AttemptsRecord | None:
    """Returns what the contents of `attempts.json` come to; None where there is no attempt in them."""
    listed = found.get("attempts")
    attempts = [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
    if not attempts:
        return None
    hours: float | None = 0.0
    for one in attempts:
        began, seen, chips = (finite(one.get(name)) for name in ("began", "seen", "chips"))
        known = began is not None and seen is not None and chips is not None and hours is not None
        hours = hours + max(seen - began, 0.0) / 3600 * chips if known else None  # type: ignore[operator]
    over = sum(one.get("state") in (None, "preempted") for one in attempts[:-1])
    facts = {name: value for name, value in attempts[-1].items() if name not in ("began", "seen", "state", "chips")}
    return AttemptsRecord(len(attempts), over, hours, facts)


def attempt_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (name, value) rows for people."""
    record = read_attempts(found)
    if record is None:
        return
    times = lambda number, what: f"{number} {what}{'' if number == 1 else 's'}"
    words = [times(record.count, "attempt"), times(record.preemptions, "preemption")]
    words += [] if record.chip_hours is None else [f"{record.chip_hours:,.2f} chip-hours"]
    on = [str(record.facts[name]) for name in ("accelerator", "backend", "price") if record.facts.get(name)]
    yield "Launched", ", ".join(words) + (f" on {', '.join(on)}" if on else "")
    for name, value in record.facts.items():
        if name in ("accelerator", "backend", "price") or not value:
            continue
        text = ", ".join(f"{key}={one}" for key, one in value.items()) if isinstance(value, Mapping) else str(value)
        yield f"Launch: {name.replace('_', ' ')}", text
