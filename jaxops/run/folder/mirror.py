"""A run folder in an object store, and its local stand-in.

The run, its writers and its report work in the stand-in, a folder below the jaxops cache. It is updated from the store
before anything reads it (a pull). A thread updates the store from it (pushes): small files whole, logs in parts
(log_parts.py). Checkpoints are written to the store directly. Tested in tests/run/folder/test_mirror.py.
"""

import contextlib
import fcntl
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxops.core import stores
from jaxops.core.cache import cache_root
from jaxops.core.failures import RunFailed, UserError
from jaxops.core.secret_text import without_passwords
from jaxops.core.stores import Denied, Entry, Location, Store
from jaxops.run.folder import lease
from jaxops.run.folder.log_parts import LogParts, is_log, known, part_name, parts_of

INDEX = ".mirror.json"
PULL = ".pull"
KEPT = (INDEX, PULL, lease.NAME)
"""Files of the stand-in that do not belong to the run."""
EVERY = 5.0
"""Seconds between two pushes."""
GIVE_UP = 300.0
"""After so many seconds of failing pushes the run stops."""
LARGE = 8 << 20
"""Files above this size are pushed at the end of the run, like W&B's own files."""
_LAST = ("config.yaml", "report.html", "summary.json")
"""Files that are pushed last, in this order: a run exists once its config does, and has ended once its summary has."""


class Mirror:
    """One run in an object store: `pull` before reading it, `held` while writing it."""

    def __init__(self, url: str) -> None:
        self.place = stores.parse_url(url)
        self.local = stand_in(self.place)
        self._store: Store | None = None
        self._logs: dict[str, LogParts] = {}
        self._sent: dict[str, tuple[int, int]] = {}
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self._failure: RunFailed | None = None
        self._lease: lease.Lease | None = None
        self.names: set[str] = set()
        """The names in the run's folder in the store, as of the last pull."""

    @property
    def store(self) -> Store:
        """The object store, opened at first use."""
        if self._store is None:
            self._store = stores.open_store(self.place)
        return self._store

    def pull(self) -> None:
        """Updates the stand-in from the store, unless a process of this machine trains in it.

        Raises:
          UserError: the store cannot be read; the message says what to do about it.
        """
        self.local.mkdir(parents=True, exist_ok=True)
        with open(self.local / PULL, "a") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)  # readers take turns, each for a moment
            store = stores.open_store(self.place, patient=False)
            for left in (2, 1, 0):
                try:
                    here = self._look(store)
                    if not lease.held_here(self.local):
                        self._pull(store, here)
                    return
                except FileNotFoundError as error:  # the run has replaced it since it was listed
                    if not left:
                        raise UserError(f"{self.place}: {error}") from None
                except OSError as error:
                    raise UserError(f"{self.place}: {stores.advice(self.place, error)}") from None

    @contextlib.contextmanager
    def held(self, say: Callable[[str], None]) -> Iterator[None]:
        """Holds the lease of the run, and pushes what the stand-in gets, to the last file.

        Raises:
          UserError: another process trains the run.
          RunFailed: the last files of the run did not reach the store.
        """
        self._lease = lease.Lease(self.store, self.place.key, str(self.place))
        self._lease.hold(say)
        thread = threading.Thread(target=self._push_now_and_then, name="mirror", daemon=True)
        failed: BaseException | None = None
        try:
            with open(self.local / PULL, "a") as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)
                self._pull(self.store, self._look(self.store))
            self._stop.clear()
            thread.start()
            yield
        except BaseException as error:
            failed = error
            raise
        finally:
            self._stop.set()
            if thread.ident is not None:
                thread.join()
            self._let_go(failed)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Pushes `processes/`, which is all that the other processes of a run write; ignores errors of the store."""

        def send() -> None:
            while True:
                ended = self._stop.wait(EVERY)
                with contextlib.suppress(OSError):
                    self.push(only="processes/", last=True)
                if ended:
                    return

        self._stop.clear()
        thread = threading.Thread(target=send, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def leave(self, seconds: float) -> None:
        """Pushes what it can in so many seconds and gives the lease up, before a process ends without unwinding."""

        def hurry() -> None:
            with contextlib.suppress(Exception):
                self.push(last=True, only="" if self._lease else "processes/")
            if self._lease is not None:
                with contextlib.suppress(Exception):
                    self._lease.release()

        thread = threading.Thread(target=hurry, daemon=True)
        thread.start()
        thread.join(seconds)

    def push(self, *, last: bool = False, only: str = "") -> None:
        """Updates the store from the stand-in now.

        Args:
          last: true to push also the files that wait for the end of the run.
          only: push only names that begin with this.

        Raises:
          StoreError: the store refuses a write; the next push tries the remaining files again.
          RunFailed: another process has taken the run over.
        """
        with self._busy:
            if self._lease is not None:
                self._lease.lost()
            files = (name for name in self._files() if name.startswith(only))
            waiting = sorted(files, key=lambda name: (_LAST.index(name) if name in _LAST else -1, name))
            for name in waiting:
                file = self.local / name
                try:
                    if is_log(name):
                        self._log(name).push()
                    else:
                        self._send(name, file, last)
                except FileNotFoundError:  # replaced or deleted since it was listed
                    continue

    def send(self, name: str) -> None:
        """Writes one small file to the store, if it is there, without holding the run.

        Raises:
          StoreError: the store does not take it.
        """
        if (self.local / name).exists():
            self.store.write(self._key(name), (self.local / name).read_bytes())

    def poll(self) -> None:
        """Raises the error of pushes in the background, if there is one; it costs nothing.

        Raises:
          RunFailed: pushes have failed for too long, or another process has taken the run over.
        """
        if self._failure is not None:
            raise self._failure
        if self._lease is not None:
            self._lease.lost()

    def _push_now_and_then(self) -> None:
        wait, since = EVERY, 0.0
        while not self._stop.wait(wait):
            try:
                self.push()
                wait, since = EVERY, 0.0
            except RunFailed as error:  # a StoreError, or a lost lease
                since = since or time.monotonic()
                lasting = not isinstance(error, stores.StoreError) or isinstance(error, Denied)
                if lasting or time.monotonic() - since > GIVE_UP:
                    self._failure = self._told(error)
                    return
                wait = min(wait * 2, 60.0)
            except BaseException as error:
                self._failure = self._told(error)
                return

    def _let_go(self, failed: BaseException | None) -> None:
        """Pushes a last time, with a few attempts, and gives the lease up. An error of the run itself goes first."""
        trouble: BaseException | None = None
        for pause in (0.0, EVERY / 5, EVERY):
            time.sleep(pause)
            try:
                self.push(last=True)
                trouble = None
                break
            except Exception as error:
                trouble = error
                if not isinstance(error, stores.StoreError) or isinstance(error, Denied):
                    break
        assert self._lease is not None
        try:
            self._lease.release()
        except OSError as error:
            trouble = trouble or error
        if trouble is not None:
            told = self._told(trouble)
            if failed is None:
                raise told from trouble
            failed.add_note(str(told))

    def _told(self, error: BaseException) -> RunFailed:
        if isinstance(error, RunFailed) and not isinstance(error, stores.StoreError):
            return error
        return RunFailed(
            f"the records of {self.place} could not be brought there: {error}. Mend that, then run the same command"
            " again: it resumes from the last checkpoint"
        )

    def _files(self) -> Iterator[str]:
        """Yields the paths of all files to push, relative to the stand-in."""
        for folder, below, names in os.walk(self.local):
            below[:] = [name for name in below if not name.startswith(".") and name != "checkpoints"]
            for name in names:
                if not name.startswith("."):
                    yield (Path(folder) / name).relative_to(self.local).as_posix()

    def _send(self, name: str, file: Path, last: bool) -> None:
        about = file.stat()
        state = (about.st_mtime_ns, about.st_size)
        if (
            not about.st_size
            or self._sent.get(name) == state
            or (not last and (about.st_size > LARGE or name.startswith("wandb/")))
        ):
            return
        self.store.write(self._key(name), file if about.st_size > LARGE else file.read_bytes())
        self._sent[name] = state

    def _log(self, name: str) -> LogParts:
        if name not in self._logs:

            def put(number: int, data: bytes) -> None:
                self.store.write(self._key(part_name(name, number)), data)

            def drop(number: int) -> None:
                self.store.delete([self._key(part_name(name, number))])

            self._logs[name] = LogParts(self.local / name, put, drop)
        return self._logs[name]

    def _key(self, name: str) -> str:
        return f"{self.place.key}/{name}".lstrip("/")

    def _look(self, store: Store) -> list[Entry]:
        """Lists the objects directly in the run's folder."""
        folders, here = store.children(self.place.key)
        self.names = {name for name in (*folders, *map(_name, here)) if not name.startswith(".")}
        return here

    def _pull(self, store: Store, here: list[Entry]) -> None:
        """Downloads what changed since the last pull, and deletes files that the store does not have.

        TensorBoard's logs, reports and profiles are not downloaded, since nothing here reads them.
        """
        entries = {_name(entry): entry for entry in here}
        transform = store.entries(self._key("transform"))
        entries |= {f"transform/{_name(entry)}": entry for entry in transform}
        logs = {log: parts for log, parts in parts_of(entries).items() if log.endswith(".jsonl")}
        wanted = {name: [name] for name in entries if _WANTED.fullmatch(name)} | logs
        index = self._index()
        states = {name: [entries[part].version for part in parts] for name, parts in wanted.items()}
        stale = [name for name in wanted if index.get(name) != [states[name], _about(self.local / name)]]

        def fetch(name: str) -> None:
            pieces = [store.read(entries[part].key) for part in wanted[name]]
            _replace(self.local / name, b"".join(pieces))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(fetch, stale))
        for name in [*self._files(), lease.NAME]:
            if name not in wanted:
                (self.local / name).unlink(missing_ok=True)
        _replace(
            self.local / INDEX,
            json.dumps({name: [states[name], _about(self.local / name)] for name in wanted}).encode(),
        )
        self._logs, self._sent = {}, {}
        for name in wanted:
            if name in logs:
                whole, ends = (self.local / name).read_bytes(), [0]
                for part in logs[name]:
                    ends.append(ends[-1] + entries[part].size)
                self._log(name).parts = known(whole[a:b] for a, b in itertools.pairwise(ends))
            else:
                about = (self.local / name).stat()
                self._sent[name] = (about.st_mtime_ns, about.st_size)

    def _index(self) -> dict[str, object]:
        try:
            found = json.loads((self.local / INDEX).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


_WANTED = re.compile(r"transform/[^/]+|[^/]+\.(json|yaml)")


def stand_in(place: Location) -> Path:
    """The local folder for a place in a store; one of its own for every endpoint."""
    at = re.sub(r"[^A-Za-z0-9.-]+", "_", without_passwords(stores.endpoint(place.scheme)).partition("://")[2])
    return cache_root() / "runs" / (place.scheme + (f"@{at}" if at else "")) / place.bucket / place.key


def pulled(url: str) -> Path:
    """Updates the stand-in of a run from the store and returns its path.

    Raises:
      UserError: the store cannot be read.
    """
    mirror = Mirror(url)
    mirror.pull()
    return mirror.local


def _name(entry: Entry) -> str:
    return entry.key.rpartition("/")[2]


def _about(file: Path) -> list[int] | None:
    try:
        about = file.stat()
    except OSError:
        return None
    return [about.st_mtime_ns, about.st_size]


def _replace(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    scratch.write_bytes(data)
    os.replace(scratch, file)
