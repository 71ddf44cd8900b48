"""Object-store paths with the interface of etils paths, for our own code and for orbax's small files.

The paths of etils itself would use fsspec or TensorFlow. Their cached listings go stale under tensorstore's writes,
they have no modification times, and their `mkdir` creates buckets. Tested in tests/core/test_stores.py.
"""

import fnmatch
import io
import os
from collections.abc import Iterator
from typing import IO, Any

from etils import epath
from etils.epath.stat_utils import StatResult

from jaxops.core import stores
from jaxops.core.home import expand_home


def path(place: str | os.PathLike[str]) -> epath.Path:
    """Returns an etils path: a `StorePath` for a URL, else an absolute local path.

    Raises:
      UserError: the URL has an unknown scheme or no bucket, or there is no home folder of the name after `~`.
    """
    if stores.is_url(place):
        stores.parse_url(place)
        return StorePath(os.fspath(place))
    return epath.Path(os.path.abspath(expand_home(place)))


class StorePath(type(epath.Path("/"))):  # type: ignore[misc]
    """A path in an object store; a folder exists as long as an object is below it."""

    @property
    def _at(self) -> tuple[stores.Store, str]:
        place = stores.parse_url(self)
        return stores.open_store(place), place.key

    def exists(self) -> bool:
        store, key = self._at
        return store.head(key) is not None or self.is_dir()

    def is_dir(self) -> bool:
        store, key = self._at
        return next(store.entries(key), None) is not None

    def is_file(self) -> bool:
        store, key = self._at
        return store.head(key) is not None

    def iterdir(self) -> Iterator["StorePath"]:
        store, key = self._at
        folders, entries = store.children(key)
        names = [*folders, *(entry.key.rpartition("/")[2] for entry in entries)]
        return iter([self / name for name in dict.fromkeys(names)])

    def glob(self, pattern: str) -> Iterator["StorePath"]:
        first, _, rest = pattern.partition("/")
        for child in self.iterdir():
            if fnmatch.fnmatchcase(child.name, first):
                yield from child.glob(rest) if rest else (child,)

    def files(self) -> dict[str, int]:
        """Returns the size in bytes of every object below this folder, by relative name, from one listing."""
        store, key = self._at
        return {entry.key[len(key) :].lstrip("/"): entry.size for entry in store.entries(key)}

    def stat(self) -> StatResult:
        store, key = self._at
        entry = store.head(key)
        if entry is None and not self.is_dir():
            raise FileNotFoundError(f"{self}: not there")
        size, changed = (entry.size, int(entry.changed)) if entry else (0, 0)
        return StatResult(is_directory=entry is None, length=size, mtime=changed)

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Creates nothing, as stores have no folders; raises FileExistsError if one exists and `exist_ok` is False."""
        if not exist_ok and self.exists():
            raise FileExistsError(f"{self} is there already")

    def rmtree(self, missing_ok: bool = False) -> None:
        store, key = self._at
        keys = [entry.key for entry in store.entries(key)]
        if not keys and not missing_ok:
            raise FileNotFoundError(f"{self}: not there")
        store.delete(keys)

    rmdir = rmtree

    def unlink(self, missing_ok: bool = False) -> None:
        store, key = self._at
        if not missing_ok and store.head(key) is None:
            raise FileNotFoundError(f"{self}: not there")
        store.delete([key])

    def open(self, mode: str = "r", *, encoding: str | None = None, errors: str | None = None, **other: Any) -> IO[Any]:
        store, key = self._at
        kind = mode.replace("b", "").replace("t", "")
        if kind == "w":
            return _Upload(store, key) if "b" in mode else _TextUpload(_Upload(store, key), encoding="utf-8")
        if kind != "r":
            raise NotImplementedError(f"{self}: an object is read or written whole, not opened as {mode!r}")
        return store.open(key) if "b" in mode else io.StringIO(store.read(key).decode("utf-8"))

    def read_bytes(self) -> bytes:
        store, key = self._at
        return store.read(key)

    def write_bytes(self, data: bytes) -> int:
        store, key = self._at
        store.write(key, data)
        return len(data)

    def rename(self, target: Any) -> Any:
        raise NotImplementedError(f"{self}: an object store cannot rename")

    def replace(self, target: Any) -> Any:
        raise NotImplementedError(f"{self}: an object store cannot rename")

    def copy(self, dst: Any, overwrite: bool = False) -> Any:
        raise NotImplementedError(f"{self}: read_bytes and write_bytes copy an object")

    def walk(self, **options: Any) -> Any:
        raise NotImplementedError(f"{self}: `files` lists all that is below a folder")


class _Upload(io.BytesIO):
    """A file that writes its contents to the store when it is closed, unless an error occurred in its context."""

    def __init__(self, store: stores.Store, key: str) -> None:
        super().__init__()
        self._store, self._key, self._whole = store, key, True

    def close(self) -> None:
        if not self.closed and self._whole:
            self._whole = False
            self._store.write(self._key, self.getvalue())
        super().close()

    def discard(self) -> None:
        self._whole = False

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            self.discard()
        self.close()


class _TextUpload(io.TextIOWrapper):
    """The counterpart of `_Upload` for text."""

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            self.buffer.discard()  # type: ignore[attr-defined]
        self.close()
