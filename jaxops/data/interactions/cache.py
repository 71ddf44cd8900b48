"""Events larger than memory: a columnar, memory-mapped copy, built once, checksummed, rebuilt when stale.

Its columns are byte for byte those that `read_interactions` would make of the same files. Every unique id and its
count, and one chunk of rows, must fit in memory while it is built. A cache is a folder of `.npy`
columns and `manifest.json`, whose `fingerprint` covers the inputs (paths, sizes, modification times) and how
they were to be read. Every file has checksums (`blocks.py`), which are held against it when the cache is opened.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxops.core.failures import NO_ROOM, RunFailed, UserError
from jaxops.core.home import expand_home
from jaxops.data import notes, scratch
from jaxops.data.files import DataFile, expand_paths, summary
from jaxops.data.ids import Ids
from jaxops.data.interactions import arrange, blocks, read
from jaxops.data.interactions.interactions import Interactions, assemble, gather_events
from jaxops.data.interactions.spec import InteractionsFile

VERSION = 4
READABLE = (2, 3, VERSION)
"""The versions that can be read; 2 knew nothing of exact copies, 3 had one checksum a file and none of the manifest."""
MANIFEST = "manifest.json"
COLUMNS = arrange.EncodedIds._fields
OTHERS = ("offsets", "user_ids", "item_ids")
_NEEDED = {"version", "fingerprint", "timed", "dropped", "contexts", "columns"}


class DamagedCache(UserError):
    """A cache whose files are not what was written; the message names the folder and the files."""

    def __init__(self, folder: Path, problems: Sequence[str]):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        super().__init__(f"the data cache {folder} is damaged: {'; '.join(problems[:3])}{more}")


def build_cache(
    config: InteractionsFile,
    out_dir: str | os.PathLike[str],
    progress: arrange.Progress = arrange.silent,
    *,
    chunk: int = arrange.CHUNK,
) -> Path:
    """Builds the cache of `config`'s events in `out_dir` (replacing one that is there) and returns that folder.

    Args:
      config: the data section.
      out_dir: the folder of the cache.
      progress: is called with how far it is.
      chunk: rows that are worked on at once.

    Raises:
      UserError: what `read_interactions` raises; `out_dir` is something else than a cache, or cannot be written.
      RunFailed: the disk is full.
    """
    target = Path(expand_home(out_dir))
    if target.exists() and any(target.iterdir()) and not (target / MANIFEST).exists():
        raise UserError(f"{target} exists and is not a jaxops data cache; give an empty or a new folder")
    files = expand_paths(config.path, config.format, config.text)
    prints = _fingerprint(config, files)
    try:
        with scratch.folder_beside(target) as work:
            folder = work / "cache"
            folder.mkdir()
            events = read.read_events(files, config.columns, config.header)
            with _Spill(work) as sink:
                text, shown, context = read.is_text(files), summary(files), config.columns.context
                gathered = gather_events(events, sink, text=text, shown=shown, progress=progress, context=context)
            allocate = _Mapped(folder)
            columns = arrange.arrange(
                sink.columns(),
                gathered.codes,
                config.min_count,
                allocate,
                copies=gathered.copy_rule(config.duplicates),
                chunk=chunk,
                progress=progress,
            )
            inter = assemble(columns, gathered)
            allocate.finish()
            np.save(folder / "offsets.npy", inter.offsets)
            np.save(folder / "user_ids.npy", inter.user_ids.values)
            np.save(folder / "item_ids.npy", inter.item_ids.values)
            for name, ids in zip(_contexts(inter.contexts), inter.contexts.values(), strict=True):
                np.save(folder / f"{name}.npy", ids.values)
            _write_manifest(folder, inter, prints)
            scratch.replace_folder(folder, target, work)
    except OSError as error:
        told = f"cannot build the data cache {target}: {error}"
        raise (RunFailed(f"{told}; nothing of it was left") if error.errno in NO_ROOM else UserError(told)) from error
    return target


def ensure(config: InteractionsFile, root: str | os.PathLike[str], progress: arrange.Progress = arrange.silent) -> Path:
    """Returns the cache of `config` under `root`, built now if it is not there or if its inputs have changed.

    Raises:
      DamagedCache: its manifest cannot be read.
      UserError: what `build_cache` raises.
    """
    folder = folder_of(config, root)
    if not is_current(config, folder):
        return build_cache(config, folder, progress)
    scratch.sweep(folder)
    return folder


def open_built(
    config: InteractionsFile, root: str | os.PathLike[str], progress: arrange.Progress = arrange.silent
) -> tuple[Interactions, Path]:
    """Opens the cache of `config` under `root` and returns it with its folder.

    It is built if it is not there or if its inputs have changed. If it is damaged, it is built again, since the inputs
    are the same and give the same columns, and that is said.

    Raises:
      UserError: it cannot be built.
      RunFailed: the disk is full.
    """
    try:
        folder = ensure(config, root, progress)
        return open_cache(folder), folder
    except DamagedCache as damage:
        folder = folder_of(config, root)
        notes.tell(f"{damage}; it is built again from its source. Disk or memory of this machine may be failing")
        try:
            build_cache(config, folder, progress)
        except (UserError, RunFailed) as error:
            kind = RunFailed if isinstance(error, RunFailed) else UserError
            raise kind(f"{damage}; building it again failed: {error}") from error
    return open_cache(folder), folder


def folder_of(config: InteractionsFile, root: str | os.PathLike[str]) -> Path:
    """Returns the folder of the cache of `config` under `root`.

    Each way of reading (paths, columns, filter) has its own folder, so one root serves many configs.

    Raises:
      UserError: `root` is not on this machine, or begins with `~` and names no home folder.
    """
    if "://" in os.fspath(root):
        raise UserError(f"`cache: {root}`: a data cache is memory-mapped, so it must be a local folder")
    key = hashlib.sha256(json.dumps(_reading(config), sort_keys=True).encode()).hexdigest()[:16]
    return Path(expand_home(root, "data.cache")) / key


def is_current(config: InteractionsFile, folder: Path) -> bool:
    """Returns whether a cache is there and was built from the inputs as they are now.

    Raises:
      UserError: an input is not there, or the cache is of a version that cannot be read.
    """
    if not (folder / MANIFEST).exists():
        return False
    prints = _fingerprint(config, expand_paths(config.path, config.format, config.text))
    return bool(_manifest(folder)["fingerprint"] == prints)


def open_cache(folder: str | os.PathLike[str], verify: bool = False) -> Interactions:
    """Opens a cache as interactions over its memory-mapped columns, after a check of their checksums.

    Small files are checked whole, large ones by a sample; `verify` reads all of all.

    Raises:
      DamagedCache: a file is missing, cut short or changed.
      UserError: no cache, or one of another version.
    """
    root = Path(expand_home(folder))
    if wrong := problems(root, whole=verify):
        raise DamagedCache(root, wrong)
    manifest = _manifest(root)
    if not verify and manifest["version"] < VERSION and any(map(blocks.is_sampled, manifest["columns"].values())):
        notes.tell(
            f"the data cache {root} was built by an older jaxops: of its large files only the sizes are checked;"
            " `jaxops data verify` reads them whole"
        )
    arrays = {name: _column(root, name) for name in manifest["columns"]}
    contexts = dict(zip(manifest["contexts"], _contexts(manifest["contexts"]), strict=True))
    return Interactions(
        **{name: arrays[name] for name in (*COLUMNS, "offsets")},
        user_ids=Ids(arrays["user_ids"], 0),
        item_ids=Ids(arrays["item_ids"], 1),
        timed=manifest["timed"],
        dropped=manifest["dropped"],
        copies=manifest.get("copies", 0),
        contexts={name: Ids(arrays[file], 0) for name, file in contexts.items()},
    )


def problems(folder: Path, *, whole: bool) -> list[str]:
    """Returns one line for each file of a cache that is not what was written; with `whole` every byte is read.

    Raises:
      DamagedCache: its manifest cannot be read.
      UserError: no cache, or one of another version.
    """
    described = _manifest(folder)["columns"].items()
    found = (blocks.problem(folder / f"{name}.npy", expected, whole=whole) for name, expected in described)
    return [problem for problem in found if problem]


def sizes(folder: Path) -> dict[str, int]:
    """Returns the bytes of each column of a cache, by its name.

    Raises:
      UserError: what `problems` raises.
    """
    return {name: expected["bytes"] for name, expected in _manifest(folder)["columns"].items()}


def _contexts(names: Collection[str]) -> list[str]:
    """Returns the names of the files of the context columns' values; a column may have a name that no file can."""
    return [f"context_{at}" for at in range(len(names))]


def _manifest(root: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((root / MANIFEST).read_text())
        version = manifest["version"]
    except FileNotFoundError:
        raise UserError(f"no data cache in {root} (no {MANIFEST}); build one with `jaxops data build`") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCache(root, [f"{MANIFEST}: cannot be read ({error})"]) from error
    if version not in READABLE:
        raise UserError(f"{root} is a data cache of version {version}, this jaxops reads {VERSION}; build it again")
    if not manifest.keys() >= _NEEDED or (version == VERSION and manifest.pop("crc32", None) != _crc_of(manifest)):
        raise DamagedCache(root, [f"{MANIFEST}: contents were changed"])
    return manifest


def _column(root: Path, name: str) -> np.ndarray:
    try:
        return np.asarray(np.load(root / f"{name}.npy", mmap_mode="r"))
    except (ValueError, OSError) as error:
        raise DamagedCache(root, [f"{name}.npy: {error}"]) from error


def _write_manifest(folder: Path, inter: Interactions, prints: dict[str, Any]) -> None:
    names = (*COLUMNS, *OTHERS, *_contexts(inter.contexts))
    manifest = {
        "version": VERSION,
        "fingerprint": prints,
        "timed": inter.timed,
        "events": inter.n_events,
        "users": inter.n_users,
        "items": inter.n_items,
        "dropped": inter.dropped,
        "copies": inter.copies,
        "contexts": list(inter.contexts),
        "columns": {name: blocks.describe(folder / f"{name}.npy") for name in names},
    }
    (folder / MANIFEST).write_text(json.dumps({**manifest, "crc32": _crc_of(manifest)}) + "\n")


def _crc_of(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _reading(config: InteractionsFile) -> dict[str, Any]:
    """Returns the part of the config that decides the columns (neither the split nor the folder of the cache)."""
    fields = dataclasses.asdict(config)
    return {name: fields[name] for name in ("path", "columns", "min_count", "format", "header", "duplicates", "text")}


def _fingerprint(config: InteractionsFile, files: Sequence[DataFile]) -> dict[str, Any]:
    described = {"reading": _reading(config), "inputs": [[f.name, f.size, f.mtime_ns] for f in files]}
    return json.loads(json.dumps(described))


class _Spill:
    """Encoded batches, appended to one raw file a column and mapped back."""

    def __init__(self, folder: Path) -> None:
        self._paths = [folder / f"{name}.raw" for name in arrange.EncodedIds._fields]
        self._files = [path.open("wb") for path in self._paths]
        self._types: list[np.dtype] = []
        self._shapes: list[tuple[int, ...]] = []
        self._rows = 0

    def append(self, batch: arrange.EncodedIds) -> None:
        self._types = [column.dtype for column in batch]
        self._rows += len(batch.user)
        self._shapes = [(self._rows, *column.shape[1:]) for column in batch]
        for file, column in zip(self._files, batch, strict=True):
            file.write(np.ascontiguousarray(column).data)

    def __enter__(self) -> "_Spill":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def columns(self) -> arrange.EncodedIds:
        described = zip(self._paths, self._types, self._shapes, strict=True)
        return arrange.EncodedIds(*(_mapped(path, kind, shape) for path, kind, shape in described))


def _mapped(path: Path, kind: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Maps a raw file as an array; an empty file, which cannot be mapped, gives an empty array."""
    return np.asarray(np.memmap(path, kind, "r", shape=shape)) if path.stat().st_size else np.empty(shape, kind)


class _Mapped:
    """Allocates columns, in their order, as memory-mapped `.npy` files; of several sets the last one stays."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays: list[np.memmap] = []
        self._paths: list[Path] = []

    def __call__(self, shape: Any, dtype: Any) -> np.ndarray:
        at = len(self._arrays)
        path = self._folder / f"{COLUMNS[at % len(COLUMNS)]}-{at // len(COLUMNS)}.npy"
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with path.open("rb+") as file:  # else a full disk would kill the process at a write to the mapping (SIGBUS)
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        self._arrays.append(array)
        self._paths.append(path)
        return array

    def finish(self) -> None:
        """Writes the last set under the names of the columns and removes the others."""
        for array in self._arrays[-len(COLUMNS) :]:
            array.flush()
        for path in self._paths[: -len(COLUMNS)]:
            path.unlink()
        for name, path in zip(COLUMNS, self._paths[-len(COLUMNS) :], strict=True):
            path.rename(self._folder / f"{name}.npy")
