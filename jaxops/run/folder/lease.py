"""The lease of a run in an object store: one small object that names the process that trains it.

The holder refreshes the object as long as it lives. It is alive if the object changes while another process watches,
so that clocks of two machines are never compared. Tested in tests/run/folder/test_mirror.py.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxops.core.failures import RunFailed, UserError
from jaxops.core.stores import Changed, Entry, Store, Unconditional

NAME = ".owner.json"
BEAT = 10.0
"""Seconds between two refreshes."""
LAPSE = 60.0
"""Seconds without a refresh after which a holder counts as gone."""


class Lease:
    """The right to write a run: call `hold` first, `lost` from time to time, and `release` at the end."""

    def __init__(self, store: Store, key: str, where: str) -> None:
        self._store, self._key, self._where = store, f"{key}/{NAME}".lstrip("/"), where
        self._id = uuid.uuid4().hex
        self._version: dict[str, str] = {}
        self._conditional = True
        self._lost = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def hold(self, say: Callable[[str], None]) -> None:
        """Takes the lease, also from a holder that is gone; waits up to LAPSE seconds to find that out.

        Raises:
          UserError: another process holds the lease and is alive.
          StoreError: the store does not answer.
        """
        seen: Entry | None = None
        since = 0.0
        while True:
            entry = self._store.head(self._key)
            holder = self._holder() if entry else {}
            if entry is None:
                free = "nobody"
            elif _dead_here(holder):
                free = f"{_named(holder)}, which is gone"
            elif seen is not None and entry.version == seen.version:
                free = f"{_named(holder)}, which was silent" if time.monotonic() - since > LAPSE else ""
            elif seen is not None:
                raise UserError(
                    f"run {self._where} is being trained by another process ({_named(holder)}); wait for it, or set"
                    " run.name"
                )
            else:
                seen, since, free = entry, time.monotonic(), ""
                say(f"{self._where} is held by {_named(holder)}: waiting up to {LAPSE:.0f} s to see whether it lives")
            if free and self._take(entry):
                if entry is not None:
                    say(f"{self._where} taken over from {free}")
                break
            if not free:
                time.sleep(min(BEAT / 5, 1.0))
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def lost(self) -> None:
        """Checks that no other process has taken the lease over.

        Raises:
          RunFailed: another process has it, and nothing more may be written.
        """
        if self._lost:
            raise RunFailed(self._lost)

    def release(self) -> None:
        """Gives the lease up; does nothing where it was lost."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if not self._lost and self._holder().get("id") == self._id:
            self._store.delete([self._key])

    def _take(self, entry: Entry | None) -> bool:
        """Writes the object and returns whether it is this process's now; False where another one was faster."""
        try:
            self._put(entry.version if entry else {})
        except Changed:
            return False
        if not self._conditional:  # of two that wrote at once, the last one has it
            time.sleep(min(BEAT / 5, 1.0))
            return self._holder().get("id") == self._id
        return True

    def _put(self, version: dict[str, str]) -> None:
        value = {"id": self._id, "machine": _machine(), "host": socket.gethostname(), "pid": os.getpid()}
        data = json.dumps({**value, "time": time.time()}).encode()
        if self._conditional:
            try:
                self._version = self._store.write(self._key, data, only_if=version)
                return
            except Unconditional:
                self._conditional = False
        self._store.write(self._key, data)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                if self._conditional:
                    self._put(self._version)
                elif self._holder().get("id") == self._id:
                    self._put({})
                else:
                    raise Changed(self._key)
            except Changed:
                try:
                    entry, holder = self._store.head(self._key), self._holder()
                except OSError:
                    continue
                if entry is not None and holder.get("id") == self._id:  # our own write, whose answer was lost
                    self._version = entry.version
                    continue
                self._lost = (
                    f"run {self._where} was taken over by {_named(holder) if holder else 'nobody (its lock is gone)'}"
                    f" while this process could not refresh its lock; nothing more is written"
                )
                return
            except OSError:
                continue  # the next refresh may succeed, and a process that waits for the lease waits longer
            except Exception as error:
                self._lost = f"the lock of run {self._where} could not be refreshed: {error!r}"
                return

    def _holder(self) -> dict[str, Any]:
        try:
            found = json.loads(self._store.read(self._key))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def is_fresh(text: str | bytes) -> bool:
    """Returns whether the holder in the text of a lock object is alive, judged by this machine's clock."""
    try:
        found = json.loads(text)
        return not _dead_here(found) and time.time() - float(found["time"]) < 2 * LAPSE
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False


def held_here(folder: Path) -> bool | None:
    """Returns whether a process of this machine trains in this folder; None where that cannot be found out."""
    try:
        # Without waiting: a pipe in its place would be opened when somebody writes to it.
        with open(os.open(folder / ".lock", os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            # Shared and given back at once: two that ask do not take each other for a trainer.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _named(holder: dict[str, Any]) -> str:
    return f"{holder.get('host', 'an unknown host')}, pid {holder.get('pid', 'unknown')}"


def _dead_here(holder: dict[str, Any]) -> bool:
    """Returns whether the holder was a process of this machine that has ended."""
    if not holder or holder.get("machine") != _machine() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _machine() -> str:
    """Returns a name for this boot of this machine and its process id namespace (containers have their own)."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode():x}"
