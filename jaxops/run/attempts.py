"""The attempts of a run that something else starts: `attempts.json` in the run's folder, kept by the run itself.

Whoever starts a run may describe it in the variable JAXOPS_ATTEMPT, a JSON object: `chips` (their number), `began` (the
Unix time at which the worker was started), and any other facts, such as accelerator, price or labels. The run knows
nothing of what they mean. The report shows them. Tested in tests/run/test_attempts.py.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxops.core.failures import RunFailed, UserError
from jaxops.run.folder.run_folder import RunFolder

VARIABLE = "JAXOPS_ATTEMPT"
FILE = "attempts.json"
VERSION = 1
MOST = 1000
"""The most attempts that are kept."""


class Attempts:
    """The record of the attempts of a run; without facts nothing is written.

    Args:
      folder: the run's.
      facts: of this attempt.
      now: returns the Unix time.
    """

    def __init__(self, folder: RunFolder, facts: Mapping[str, Any], now: Callable[[], float] = time.time):
        self._folder, self._facts, self._now = folder, dict(facts), now
        self._earlier: list[Any] = []
        self._began = now()

    def begin(self) -> None:
        """Adds this attempt to those before it; call it on the process that writes the folder.

        Raises:
          RunFailed: the file cannot be written.
        """
        if not self._facts:
            return
        listed = self._folder.read_json(FILE).get("attempts")
        self._earlier = listed[-(MOST - 1) :] if isinstance(listed, list) else []
        self._write(None)

    def update(self, state: str | None = None) -> None:
        """Notes that the attempt is alive, or how it has ended; a failure to write it does not end the run."""
        if self._facts:
            try:
                self._write(state)
            except (OSError, RunFailed):
                return

    def _write(self, state: str | None) -> None:
        mine = {"began": self._began, **self._facts, "seen": self._now()} | ({"state": state} if state else {})
        self._folder.write_json(FILE, {"version": VERSION, "attempts": [*self._earlier, mine]})


def attempt_facts(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Returns what the environment says of this attempt; empty where nothing started the run that describes it.

    Raises:
      UserError: the variable holds no JSON object.
    """
    text = (os.environ if environment is None else environment).get(VARIABLE, "")
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{VARIABLE}: expected a JSON object of facts about this attempt, got {text[:60]!r}")
    return found
