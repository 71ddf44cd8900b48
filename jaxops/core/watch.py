"""A thread that watches a run: it writes signs of life and the stacks of a stalled run, and follows failed processes.

`processes/<rank>.json` has the phase and step of each process and the time of writing. Where a process makes no
progress for JAXOPS_STALL_SECONDS, or a fatal signal ends it, the stacks of its threads are written to
`processes/<rank>.stacks.txt`. Tested in tests/recovery/.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from jaxops.core import distributed
from jaxops.core.whole_files import replace_file

STALL_SECONDS = 600
"""The default of JAXOPS_STALL_SECONDS: longer than most compiles take, and a false alarm costs one file."""
SIGN_SECONDS = 5.0
TURN_SECONDS = 0.5


class Watch:
    """Watches the run in `folder` while it is open as a context.

    The run reports its progress by `at(phase)` and by setting `step`. Where another process failed, the watch prints
    that process's message, calls `ended(why)` and exits with its status, even from inside a collective.
    """

    def __init__(
        self,
        folder: Path,
        say: Callable[[str], None],
        ended: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.step = 0
        self.phase = "start"
        self._folder, self._say, self._ended = folder / "processes", say, ended
        self._rank = jax.process_index()
        self._several = distributed.is_distributed()
        self._stall = distributed.seconds("JAXOPS_STALL_SECONDS", STALL_SECONDS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._stacks: Any = None
        self._signs = False

    def at(self, phase: str) -> str:
        """Enters a phase, which messages of all processes show, and returns the phase before."""
        before, self.phase = self.phase, phase
        distributed.announce_phase(phase)
        return before

    def where(self) -> str:
        """Returns phase and step for messages: `train, step 12`."""
        return f"{self.phase}, step {self.step}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def begin(self) -> None:
        """Starts the signs of life in the run's folder, once the run is accepted: a refused folder stays as it was."""
        self._signs = True
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)  # here alone: a folder that is deleted later stays so
        self._sign()
        if self._several and (file := self._open()):  # jax sends SIGABRT to a process that lost the others
            faulthandler.enable(file)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is not None:
            distributed.announce_failure(error, self.where())
        self.phase = "done" if error is None else f"failed ({self.where()})"
        if self._signs:
            self._sign()
        if self._stacks is not None:
            if self._several:
                faulthandler.enable()
            self._stacks.close()
            with contextlib.suppress(OSError):
                if not os.path.getsize(self._stacks.name):
                    os.unlink(self._stacks.name)

    def _open(self) -> Any:
        """Returns the file for stacks; None where it cannot be written, which is no reason to stop a run."""
        with contextlib.suppress(OSError):
            if self._stacks is None:
                self._folder.mkdir(exist_ok=True)
                self._stacks = open(self._folder / f"{self._rank}.stacks.txt", "w")  # noqa: SIM115 (kept open for a fatal signal)
        return self._stacks

    def _watch(self) -> None:
        seen, since, signed, stalled = (self.phase, self.step), time.monotonic(), time.monotonic(), False
        while not self._stop.wait(TURN_SECONDS):
            now = time.monotonic()
            if seen != (self.phase, self.step):
                seen, since, stalled = (self.phase, self.step), now, False
            if now - since > self._stall and not stalled:
                stalled = True
                self._dump(now - since)
            if self._signs and now - signed > SIGN_SECONDS:
                signed = now
                self._sign()
            if self._several and (failed := distributed.others_failed()):
                self._follow(*next(iter(failed.items())))

    def _sign(self) -> None:
        """Writes `processes/<rank>.json`."""
        sign = {"process": self._rank, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        text = json.dumps({**sign, "phase": self.phase, "step": self.step}) + "\n"
        with contextlib.suppress(OSError):
            replace_file(self._folder / f"{self._rank}.json", [text.encode()])

    def _dump(self, seconds: float) -> None:
        if self._open() is None:
            return
        print(
            f"{time.strftime('%F %T')} no progress for {seconds:.0f} s ({self.where()})", file=self._stacks, flush=True
        )
        faulthandler.dump_traceback(self._stacks)
        self._say(
            f"WARNING: no progress for {seconds:.0f} s ({self.where()}); what every thread is at:"
            f" {self._stacks.name} (JAXOPS_STALL_SECONDS={self._stall})"
        )

    def _follow(self, rank: int, word: dict[str, Any]) -> None:
        """Ends this process after another one failed, since no collective with that one can end."""
        why = f"process {rank} failed ({word['where']}): {word['text']}"
        print(f"jaxops: {why}", file=sys.stderr, flush=True)
        self.phase = f"ended with process {rank} ({self.where()})"
        if self._signs:
            self._sign()
        with contextlib.suppress(Exception):
            self._ended(why)
        distributed.leave(int(word["status"]))
