"""Ctrl-C, SIGTERM and SIGHUP become a flag that the loop polls, so that a run saves before it stops."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_NOW = 130


class Interrupted(Exception):
    """Raised where `poll` returned true inside an evaluation or a step of the loop, whose partial work is dropped.

    A step may raise it only before it has donated the state it was given.
    """


class Interrupt:
    """The flag that asks a run to stop, with the signal that set it; a second SIGINT does not wait for the next step.

    That one ends the process where a command runs (`exits`), and raises KeyboardInterrupt where Python called: an
    `os._exit` there would take a notebook's kernel along with all its variables.

    Several processes all return the same answer at the same poll, whichever of them got the signal. The signal goes to
    jax's own preemption service, which chooses a poll that no process has passed yet. So all processes must poll
    equally often, as the same program on the same global batches does.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None, exits: bool = True):
        self.signal: str | None = None
        self._say, self._exits = say, exits
        self._several = jax.process_count() > 1
        self._polls = 0
        self._keyboard = False

    def __call__(self) -> bool:
        """Returns whether the run is to stop; this is the `poll()` that steps and evaluations receive."""
        if self._several and self.signal is None:
            self._polls += 1
            if multihost_utils.reached_preemption_sync_point(self._polls):
                self.signal = "SIGINT" if self._keyboard else "SIGTERM"
                self._say(f"{self.signal} to one of the processes: all save now")
        return self.signal is not None

    def request(self, name: str) -> None:
        """Asks the run to stop at the next step; among several processes either all call it at one poll, or none."""
        self.signal = name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self._keyboard:
            if self._exits:
                os._exit(EXIT_NOW)
            raise KeyboardInterrupt("stopped without waiting for the save of this step")
        self._keyboard = number == signal.SIGINT
        name = signal.Signals(number).name
        self._say(f"{name}: saving at the next step (Ctrl-C again {'exits' if self._exits else 'stops'} at once)")
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # jax's handler, which notifies all processes
        else:
            self.signal = name

    @contextlib.contextmanager
    def installed(self) -> Iterator["Interrupt"]:
        """Handles SIGINT, SIGTERM and SIGHUP inside; outside the main thread Python cannot, and nothing changes.

        SIGHUP comes where a terminal or its connection is closed; where it is ignored (nohup) it stays so.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # Among several processes SIGTERM belongs to jax, whose handler was installed when they connected.
        numbers = [signal.SIGINT] if self._several else [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = [signal.signal(number, self._handle) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
