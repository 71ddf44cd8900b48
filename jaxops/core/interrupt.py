"""Ctrl-C and SIGTERM become a flag that the loop polls, so that a run saves before it stops."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_NOW = 130


class Interrupt:
    """Whether someone asked the run to stop, and how (`SIGINT`, `SIGTERM`); the second SIGINT exits at once."""

    def __init__(self, say: Callable[[str], None] = lambda text: None):
        self.signal: str | None = None
        self._say = say

    def __call__(self) -> bool:
        """The `poll()` that steps and evaluations receive."""
        return self.signal is not None

    def request(self, name: str) -> None:
        """Asks the run to stop at the next step."""
        self.signal = name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal == "SIGINT" and number == signal.SIGINT:
            os._exit(EXIT_NOW)
        self.signal = signal.Signals(number).name
        self._say(f"{self.signal}: saving at the next step (Ctrl-C again exits at once)")

    @contextlib.contextmanager
    def installed(self) -> Iterator["Interrupt"]:
        """Handles SIGINT and SIGTERM inside; outside the main thread Python cannot, and nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._handle) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
