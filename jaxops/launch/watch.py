"""Watching one attempt: its logs with the worker in front, its end, and the end of the others when one has ended."""

import signal
import time
from typing import Any

from jaxops.core.failures import RunFailed, UserError
from jaxops.core.secret_text import printable, without_secrets
from jaxops.launch.hosts import each
from jaxops.launch.session import Session
from jaxops.launch.verdict import AttemptVerdict, End, judge
from jaxops.launch.voice import VOICE

SETTLE_SECONDS = 20.0
"""How long the others have to end by themselves once one worker has not ended well."""
UNREACHABLE_SECONDS = 180.0
"""How long a host may be silent, while another one answers, before its worker counts as lost."""


class AttemptWatch:
    """One attempt as it is watched.

    Args:
      session: the launch.
      pause: the time between two looks, in seconds.
      adopted: whether the attempt was begun by an earlier launcher, which has printed what its workers said.
    """

    def __init__(self, session: Session, pause: float, adopted: bool = False):
        self._session, self._pause = session, pause
        count = len(session.hosts)
        self._offsets = [-1 if adopted else 0] * count
        self._ends: list[End | None] = [None] * count
        self._silent: list[float | None] = [None] * count
        self._asked: set[int] = set()
        self._begun: dict[str, float] = {}
        self._told: dict[str, set[int]] = {}
        self._stopping = False

    def attempt(self) -> AttemptVerdict:
        """Returns what the attempt comes to, once all of its workers have ended."""
        while not self._look():
            self._end_others()
            time.sleep(self._pause)
        return judge([end for end in self._ends if end is not None], self._stopping)

    def stopped_by(self, error: BaseException) -> AttemptVerdict:
        """Has the workers save and end, as Ctrl-C asks; a closed terminal (SIGHUP) leaves them alone.

        Raises:
          KeyboardInterrupt: a second Ctrl-C, or SIGHUP; the workers may go on.
        """
        id = self._session.folder.id
        if str(error) == signal.Signals.SIGHUP.name:
            self._session.say(f"the terminal is gone; the workers go on, and `jaxops job status {id}` finds them")
            raise error
        self._session.say(f"stopping: the workers save (Ctrl-C again leaves them to it: jaxops job status {id})")
        self._session.folder.ask_to_stop()
        return self.attempt()

    def _look(self) -> bool:
        """Looks at all workers and prints what they said; returns whether all have ended."""
        session = self._session
        polls = each(lambda worker, _: session.poll(worker, self._offsets[worker]), session.hosts)
        answering = any(poll["state"] != "unreachable" for poll in polls)
        standing = answering or self._standing()
        for worker, poll in enumerate(polls):
            self._print(worker, poll)
            name = f"worker {worker} ({session.hosts[worker].name})"
            if poll["state"] == "unreachable":
                # Where no host answers, it is this machine that is away.
                since = self._silent[worker] if answering else None
                self._silent[worker] = since or time.monotonic()
                silent = time.monotonic() - (self._silent[worker] or 0.0)
                if not standing or (answering and silent > UNREACHABLE_SECONDS):
                    self._ends[worker] = End(name, None, "unreachable")
                continue
            self._silent[worker] = None
            if poll["state"] != "running" and self._ends[worker] is None:
                asked = worker in self._asked and poll["why"] != "max-hours"
                known = poll["state"] == "ended"
                self._ends[worker] = End(name, poll["code"] if known else None, poll["why"] or poll["state"], asked)
        return all(end is not None for end in self._ends) and not any(poll["text"] for poll in polls)

    def _standing(self) -> bool:
        """Returns whether the machines are there, as far as anybody answers."""
        try:
            return self._session.backend.standing(self._session.record)
        except (RunFailed, UserError):  # such as a login that has expired
            return True

    def _print(self, worker: int, poll: Any) -> None:
        for line in printable(without_secrets(poll["text"])).splitlines():
            if not line.startswith("[Gloo]"):
                VOICE.worker(worker, self._session.hosts[worker].name, line)
        self._offsets[worker] = poll["offset"]

    def _end_others(self) -> None:
        """Ends the workers that are left: after a wish to stop, and after one of them has not ended well."""
        self._stopping = self._stopping or self._session.folder.stop_wanted()
        bad = any(end is not None and end.code != 0 for end in self._ends)
        if self._stopping:
            self._press("stop", 0.0)
        elif bad:
            self._press("others", SETTLE_SECONDS)

    def _press(self, what: str, settle: float) -> None:
        """Sends TERM after `settle` seconds and KILL a grace period later, to each worker until it is reached."""
        begun = self._begun.setdefault(what, time.monotonic())
        for name, after in (("TERM", settle), ("KILL", settle + self._session.record.grace)):
            told = self._told.setdefault(f"{what} {name}", set())
            left = [worker for worker, end in enumerate(self._ends) if end is None and worker not in told]
            if left and time.monotonic() - begun >= after:
                self._asked |= set(left)
                told |= set(left) - set(self._session.stop(name, left))
