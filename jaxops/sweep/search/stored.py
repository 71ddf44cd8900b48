"""A search's journal in an object store: it outlives the machine, as one of a cluster's spot machines must.

Stores cannot append. Each event that must be durable is an object of its own, `NUMBER.jsonl`, with the reports since
the last one before it; a process that begins to lead merges them. An object is written only where there is none yet, so
that a process which has lost the lead without noticing writes over nothing.
Tested in tests/sweep/test_search_stored.py.
"""

import contextlib
import re

from jaxops.core import stores
from jaxops.core.failures import RunFailed, UserError
from jaxops.core.stores import Changed, Unconditional
from jaxops.run.folder.lease import Lease
from jaxops.sweep.search.events import SearchEvent, parse_event

MOST = 64
"""Objects above which they are merged into one when a process begins to lead."""
_OBJECT = re.compile(r"(\d{8})(-whole)?\.jsonl")


class StoreJournal:
    """A journal in a folder of an object store, led by the process that holds its lease.

    Args:
      url: `s3://BUCKET/FOLDER` or `gs://BUCKET/FOLDER`.
      search: the name of the search, whose objects lie below that folder.

    Raises:
      UserError: the URL is wrong, or the package for it is not installed.
    """

    def __init__(self, url: str, search: str) -> None:
        self.where = f"{url.rstrip('/')}/{search}"
        place = stores.parse_url(self.where)
        self._store, self._key = stores.open_store(place), place.key
        self._lease = Lease(self._store, self._key, self.where)
        self._next = 0
        self._waiting: list[str] = []

    def lead(self) -> bool:
        """Takes the lease, also from a process that is gone, which takes up to a minute to find out.

        Raises:
          RunFailed: the store does not answer.
        """
        try:
            self._lease.hold(lambda line: None)
        except UserError:
            return False
        found = self._objects()
        self._next = 1 + max((number for number, _ in found), default=0)
        if len(found) > MOST:
            lines = "".join(self._read(name) for _, name in found)
            name = f"{self._next:08}-whole.jsonl"
            self._store.write(f"{self._key}/{name}", lines.encode())
            self._next += 1
            self._store.delete(f"{self._key}/{old}" for _, old in found)
        return True

    def read(self) -> list[SearchEvent]:
        """Returns all events.

        Raises:
          UserError: a line is broken, or of a newer version.
          RunFailed: the store does not answer.
        """
        return [
            parse_event(line, f"{self.where}/{name}:{number}")
            for _, name in self._objects()
            for number, line in enumerate(self._read(name).splitlines(), start=1)
        ]

    def append(self, event: SearchEvent, *, durable: bool = True) -> None:
        """Adds an event; one that need not be durable is written with the next that must.

        Raises:
          RunFailed: it cannot be written, or another process leads by now.
        """
        self._waiting.append(event.line())
        if durable:
            self._flush()

    def close(self) -> None:
        """Writes what waits, and gives the lease up."""
        with contextlib.suppress(RunFailed):  # reports, which the next leader reads again where the run wrote them
            self._flush()
        self._lease.release()

    def _flush(self) -> None:
        if not self._waiting:
            return
        self._lease.lost()
        key, data = f"{self._key}/{self._next:08}.jsonl", "".join(f"{line}\n" for line in self._waiting).encode()
        try:
            self._store.write(key, data, only_if={})
        except Unconditional:
            self._store.write(key, data)
        except Changed:
            if self._store.read(key) != data:  # else it was our own write, whose answer was lost and that was retried
                raise RunFailed(f"{self.where}: another process leads this search; nothing more is written") from None
        self._waiting.clear()
        self._next += 1

    def _objects(self) -> list[tuple[int, str]]:
        """Returns number and name of the objects that count, in their order: from the last merged one on."""
        _, entries = self._store.children(self._key)
        names = sorted(name for entry in entries if _OBJECT.fullmatch(name := entry.key.rpartition("/")[2]))
        whole = max((at for at, name in enumerate(names) if "whole" in name), default=0)
        return [(int(name[:8]), name) for name in names[whole:]]

    def _read(self, name: str) -> str:
        return self._store.read(f"{self._key}/{name}").decode()
