"""A thread that watches a run: signs of life, stacks where it stands still, the failure of another process.

`processes/<rank>.json` says what each process is at and when it last got on; where a process gets no further for
JAXOPS_STALL_SECONDS, or is ended by a fatal signal, the stacks of its threads go to `processes/<rank>.stacks.txt`.
Held by tests/recovery/.
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
from jaxops.core.writers import replace_file

STALL_SECONDS = 600
"""Longer than most compiles take; a false alarm costs one file."""
SIGN_SECONDS = 5.0
TURN_SECONDS = 0.5


class Watch:
    """Watches the run in `folder` while it is open as a context.

    `at(phase)` and `step` are how the run says that it gets on. Where another process failed, its words are printed,
    `ended(why)` is called and this process exits with its status, whatever it was waiting for.
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
        """The run enters a phase, shown in messages of this and of the other processes; the phase that it leaves."""
        before, self.phase = self.phase, phase
        distributed.announce_phase(phase)
        return before

    def where(self) -> str:
        """`train, step 12`."""
        return f"{self.phase}, step {self.step}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def begin(self) -> None:
        """The run is good to go: from here on its folder gets signs of life (a refused one is left as it was)."""
        self._signs = True
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)  # here alone: a folder that is deleted later stays so
        self._sign()
        if self._several and (file := self._open()):  # jax ends a process that lost the others by SIGABRT
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
        """The file for stacks; None where it cannot be written, which is no reason to stop a run."""
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
        """`processes/<rank>.json`."""
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
        """Another process failed: so does this one, now, since no collective will ever end."""
        why = f"process {rank} failed ({word['where']}): {word['text']}"
        print(f"jaxops: {why}", file=sys.stderr, flush=True)
        self.phase = f"ended with process {rank} ({self.where()})"
        if self._signs:
            self._sign()
        with contextlib.suppress(Exception):
            self._ended(why)
        distributed.leave(int(word["status"]))
