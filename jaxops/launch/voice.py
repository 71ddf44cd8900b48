"""Where the words of a launcher go: lines for people, or one JSON object a line for machines (`--log json`).

One process is one launcher, so there is one voice. Tested in tests/launch/test_voice.py.
"""

import json
import sys
import time
from typing import Any

EVENTS = ("attempt", "code", "environment", "preflight", "reaching", "stopping", "found")
"""What a line of the launcher is about, where it begins with this word; it is a `note` otherwise."""


class Voice:
    """The voice of this process.

    Attributes:
      json: whether everything is one JSON object a line, on stdout.
      launch: the id of the launch.
    """

    def __init__(self) -> None:
        self.json, self.launch = False, ""

    def say(self, text: str, event: str = "") -> None:
        """Says a line of the launcher itself."""
        if not self.json:
            print(f"launch: {text}", file=sys.stderr, flush=True)
            return
        first = text.partition(" ")[0].rstrip(":")
        self._object(event=event or (first if first in EVENTS else "note"), worker=None, host=None, text=text)

    def worker(self, worker: int, host: str, line: str) -> None:
        """Passes on a line of a worker, which has been cleaned of secrets and control characters."""
        if self.json:
            self._object(event="output", worker=worker, host=host, text=line)
        else:
            print(f"[{worker}] {line}", flush=True)

    def _object(self, **values: Any) -> None:
        print(json.dumps({"time": round(time.time(), 3), "launch": self.launch, **values}), flush=True)


VOICE = Voice()
"""The voice of this process; the command line sets it."""
