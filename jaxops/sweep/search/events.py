"""One event of a search, and the line of JSON that it is kept as."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from typing import Any, Literal

from jaxops.core.failures import UserError

VERSION = 1
What = Literal["begin", "ask", "report", "prune", "tell"]


@dataclasses.dataclass(frozen=True)
class SearchEvent:
    """One event of a search.

    Attributes:
      what: `begin` of the search, `ask` of a trial, a `report` of its metric, the decision to `prune` it, or how it
        ended (`tell`).
      trial: its number; 0 for `begin`.
      fields: the rest, as JSON holds it.
    """

    what: What
    trial: int
    fields: Mapping[str, Any]

    def line(self) -> str:
        """Returns the event as one line of JSON."""
        values = {"v": VERSION, "event": self.what, "trial": self.trial, "time": round(time.time(), 3), **self.fields}
        return json.dumps({name: _finite(value) for name, value in values.items()}, allow_nan=False)


def parse_event(line: str | bytes, where: str) -> SearchEvent:
    """Returns the event of a line.

    Raises:
      UserError: it is broken, or of a newer version.
    """
    try:
        found = json.loads(line)
        version, what, trial = found.pop("v"), found.pop("event"), found.pop("trial")
        found.pop("time", None)
        if version > VERSION:
            raise UserError(f"{where} is of a newer version of jaxops, which reads it")
        if what not in ("begin", "ask", "report", "prune", "tell") or not isinstance(trial, int):
            raise ValueError("it is not as jaxops writes it")
        return SearchEvent(what, trial, found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} is broken ({error}); nothing is searched on a journal with a gap") from None


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
