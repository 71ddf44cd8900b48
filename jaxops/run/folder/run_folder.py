"""The folder of a run, and the check that a config may resume the run in it.

A folder in an object store (s3://, gs://) has a local stand-in, which all of this works in; see mirror.py.
"""

import contextlib
import fcntl
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxops.config.dump import diff, dump_yaml
from jaxops.config.node import plain_node
from jaxops.config.shapes import ABSENT
from jaxops.config.yaml_text import parse_yaml
from jaxops.core import small_files, store_probe, stores
from jaxops.core.failures import UserError
from jaxops.core.home import expand_home
from jaxops.core.secret_text import without_secrets
from jaxops.core.whole_files import writing
from jaxops.run.config import MAY_CHANGE_ON_RESUME
from jaxops.run.folder.mirror import KEPT, Mirror
from jaxops.run.folder.transform import read_transform, transform_file, write_transform

SUMMARY_VERSION = 1
ABOUT_VERSION = 1
LOCK = ".lock"
SCRATCH = re.compile(r"\.(?:.+\.)?(?:[0-9a-f]{32}|tmp)")
"""The names of temporary files: those of `replace_file` and `write_text`."""
BEGUN = {LOCK, "transform", "data.json", ".data.json.tmp", ".config.yaml.tmp"}
"""The files of a run that was killed while it made its folder. The next run makes the folder again."""


class RunFolder:
    """The paths and the small files of one run. Nothing is written before `create`.

    Args:
      path: a path, or a URL in an object store.
      may_change: the dotted paths of a config that a resumed run may change.
      complete: gives the config of an older run the defaults of fields that were added since.

    Attributes:
      where: the folder as people name it: a path, or a URL in an object store.
      path: the folder, or the local stand-in of one in an object store.
      checkpoints: the folder of checkpoints, in the store itself, as `Checkpoints` takes it.
      metrics: the path of `metrics.jsonl`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        may_change: Sequence[str] = MAY_CHANGE_ON_RESUME,
        complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ):
        self.path = Path(expand_home(path))
        self._may_change, self._complete = tuple(may_change), complete
        self._mirror: Mirror | None = None
        self.where = str(self.path)
        self.checkpoints: Path | str = self.path / "checkpoints"
        if stores.is_url(path):
            self._mirror = Mirror(os.fspath(path))
            self.path, self.where = self._mirror.local, str(self._mirror.place)
            self.checkpoints = f"{self.where}/checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self._fresh = self._mirror is None

    @property
    def dir(self) -> Path | str:
        """The folder as other commands take it: a path, or a URL."""
        return self.path if self._mirror is None else self.where

    def shown(self, name: str) -> str:
        """Returns the path or URL of a file of the run, for people."""
        return f"{self.where}/{name}" if self._mirror else str(self.path / name)

    def poll(self) -> None:
        """Raises the error of uploads to an object store, if there is one; it costs nothing.

        Raises:
          RunFailed: uploads have failed for too long, or another process has taken the run over.
        """
        if self._mirror is not None:
            self._mirror.poll()

    def push(self) -> None:
        """Uploads what is written so far to an object store, since a checkpoint must not be ahead of its logs.

        Raises:
          RunFailed: the store refuses it.
        """
        if self._mirror is not None:
            self._mirror.push()

    def beside(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for the processes that do not hold the run; it uploads what they write in `processes/`."""
        return contextlib.nullcontext() if self._mirror is None else self._mirror.beside()

    def leave(self, seconds: float = 10.0) -> None:
        """Uploads what it can within so many seconds, before the process ends without unwinding."""
        if self._mirror is not None:
            self._mirror.leave(seconds)

    def _refresh(self) -> None:
        """Updates the stand-in from the store, before anything is read for the first time."""
        if self._mirror is not None and not self._fresh:
            self._mirror.pull()
            self._fresh = True

    @property
    def exists(self) -> bool:
        """True where a run has begun in this folder."""
        self._refresh()
        return (self.path / "config.yaml").is_file()

    def check(self, resolved: Mapping[str, Any], inspection: Mapping[str, Any] | None = None) -> bool:
        """Returns True where the folder has a run that this config may resume, and False where it has nothing yet.

        Raises:
          UserError: the folder holds something else, the config differs in what may not change, the data has changed
            (by the SHA-256 of its split), the folder cannot be written, or an object store cannot be used (no package,
            bucket, credentials, permission or answer).
        """
        if self._mirror is not None and not self._fresh:
            store_probe.check_access(self.where)
        parent = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        if not parent.is_dir():
            raise UserError(f"run folder {self.path}: {parent} is a file")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"run folder {self.path}: {parent} cannot be written to; set {self._set}")
        if not self.exists:
            found = sorted(self.names())
            if not BEGUN.issuperset(found):
                raise UserError(
                    f"run folder {self.where} is not empty and holds no config.yaml ({', '.join(found[:5])}): not a"
                    " run; set run.name or run.dir"
                )
            return False
        changed = [
            f"  {path}: {shown_value(old)} there, {shown_value(new)} here"
            for path, old, new in diff(self._complete(self.config()), resolved)
            if not any(path == free or path.startswith(free + ".") for free in self._may_change)
        ]
        if changed:
            raise UserError(
                f"run folder {self.where} belongs to another config:\n" + "\n".join(changed) + "\nA resumed run may"
                f" change only {', '.join(self._may_change)}. Set run.name to begin"
                f" another run, and init_from.run={self.where} to begin it with these parameters."
            )
        self._check_data(inspection or {})
        return True

    def _check_data(self, inspection: Mapping[str, Any]) -> None:
        if differs := self.other_data(inspection):
            raise UserError(
                f"run folder {self.where}: the data is no longer what the run began with ({differs})."
                " Set run.name to begin another run."
            )

    def other_data(self, inspection: Mapping[str, Any]) -> str:
        """Describes how these data differ from those that the run began with; empty where they do not."""
        recorded = self.read_json("data.json")
        for part, what in (("split", "the split"), ("features", "the features")):
            here, there = (found.get(part, {}).get("sha256") for found in (inspection, recorded))
            if here and there and here != there:
                return f"SHA-256 of {what} {there} there, {here} here"
        return ""

    def config(self) -> dict[str, Any]:
        """Returns the resolved config of the run.

        Raises:
          UserError: there is no run, or its config cannot be read.
        """
        self._refresh()
        try:
            text = small_files.read_text(self.path / "config.yaml")
            values = plain_node(parse_yaml(text, self.shown("config.yaml")))
        except FileNotFoundError:
            raise UserError(f"{self.where} is not a run folder: it has no config.yaml") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.shown('config.yaml')} cannot be read: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"{self.shown('config.yaml')} holds no config")
        return values

    def write_about(self, about: Mapping[str, Any]) -> None:
        """Writes `about.json`: names for people, and the better direction of each metric."""
        self.write_json("about.json", {"version": ABOUT_VERSION, **about})

    def create(self, resolved: Mapping[str, Any], transform: Mapping[str, np.ndarray], inspection: Any) -> None:
        """Makes the folder with its config, the arrays for serving (`transform/`) and a description of the data."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_transform(self.path / "transform", transform)
        self.write_json("data.json", inspection)
        self.write_text("config.yaml", dump_yaml(resolved))

    def transform(self, name: str) -> np.ndarray:
        """Returns one array of the frozen transform.

        Raises:
          UserError: the file is missing, broken, or not what the run wrote.
        """
        self._refresh()
        return read_transform(self.path / "transform", name)

    def has_transform(self, name: str) -> bool:
        """Returns whether the frozen transform has an array of this name."""
        self._refresh()
        return transform_file(self.path / "transform", name).is_file()

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file whole or not at all.

        Raises:
          RunFailed: the file cannot be written.
        """
        file = self.path / name
        scratch = file.with_name(f".{name}.tmp")
        with writing(file):
            try:
                with open(scratch, "w") as out:
                    out.write(text)
                    out.flush()
                    os.fsync(out.fileno())  # a machine that loses power after the rename has the text, not its length
                os.replace(scratch, file)
            finally:
                scratch.unlink(missing_ok=True)

    def write_json(self, name: str, values: Any) -> None:
        """Writes a small JSON file whole or not at all; NaN and infinities become null."""
        self.write_text(name, json.dumps(_plain(values), indent=1, allow_nan=False) + "\n")

    def is_there(self) -> bool:
        """Returns whether a run that trains still has its folder: what is saved in another would belong to no run."""
        return (self.path / "config.yaml").is_file()

    def has(self, name: str) -> bool:
        """Returns true if the folder holds this file (in an object store: at the last listing)."""
        return name in self.names()

    def send(self, name: str) -> None:
        """Brings one small file to the object store, where the run lies in one: for a run that nobody trains.

        Raises:
          RunFailed: the store does not take it.
        """
        if self._mirror is not None:
            self._mirror.send(name)

    def summary(self) -> dict[str, Any]:
        """Reads `summary.json`; empty where there is none yet."""
        return self.read_json("summary.json")

    def about(self) -> dict[str, Any]:
        """Reads `about.json`: names for people, and the better direction of each metric; empty in older folders."""
        return self.read_json("about.json")

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads the JSON object in a small file of the run; empty where there is none that can be read."""
        self._refresh()
        try:
            found = json.loads(small_files.read_text(self.path / name))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def names(self) -> set[str]:
        """Returns the names in the folder (in an object store: at the last listing)."""
        if self._mirror is not None:
            return self._mirror.names
        return {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()

    @property
    def _set(self) -> str:
        return (
            "run.dir" if self._mirror is None else "JAXOPS_CACHE: what goes to an object store is written there first"
        )

    @contextlib.contextmanager
    def locked(self, say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)) -> Iterator[None]:
        """Locks the run for this process. Folders made for it that are still empty at the end are removed again.

        A run in an object store is uploaded meanwhile, and completely at the end. Where another process seems to hold
        it, this waits up to a minute to see whether that process is alive, and reports that through `say`.

        Raises:
          UserError: another process holds the run.
          RunFailed: the last files did not reach the object store.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise UserError(
                    f"run {self.where} is being trained by another process ({file.read().strip() or 'unknown'});"
                    f" wait for it, or set run.name"
                ) from None
            file.seek(0)
            file.truncate()
            file.write(f"pid {os.getpid()}")
            file.flush()
            self._sweep()
            try:
                with self._mirror.held(say) if self._mirror else contextlib.nullcontext():
                    yield
            finally:
                file.truncate(0)
                left = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
                if left and left <= {LOCK, *KEPT}:
                    for name in left:
                        (self.path / name).unlink()
                    with contextlib.suppress(OSError):  # another run may have begun beside this one
                        for folder in made:
                            folder.rmdir()

    def scraps(self) -> list[Path]:
        """The temporary files that killed processes left in the folder (or that a living one is about to rename)."""
        found = [path for folder in (self.path, self.path / "processes") for path in folder.glob(".*")]
        return [path for path in found if SCRATCH.fullmatch(path.name) and path.is_file() and not path.is_symlink()]

    def _sweep(self) -> None:
        """Removes what killed processes left in the folder, which this process alone holds."""
        for path in self.scraps():
            with contextlib.suppress(OSError):
                path.unlink()


def shown_value(value: Any) -> str:
    """Returns a config value as a config would write it."""
    return "nothing" if value is ABSENT else json.dumps(value, default=str)


def _plain(value: Any) -> Any:
    """Converts values to plain ones for JSON: arrays to lists, NaN and infinities to None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, str):
        return without_secrets(value)
    return value
