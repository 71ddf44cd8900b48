"""Events larger than memory: a columnar, memory-mapped copy, built once, checksummed, rebuilt when stale.

Its columns are byte for byte those that `read_interactions` would make of the same files. Every unique id and its
count, and one chunk of rows, must fit in memory while it is built. A cache is a folder of `.npy`
columns and `manifest.json`, whose `fingerprint` covers the inputs (paths, sizes, modification times) and how
they were to be read.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxops.core.failures import UserError
from jaxops.data import scratch
from jaxops.data.files import DataFile, expand_paths, summary
from jaxops.data.ids import Ids
from jaxops.data.interactions import arrange, read
from jaxops.data.interactions.interactions import Interactions, assemble, gather_events
from jaxops.data.interactions.spec import InteractionsFile

VERSION = 3
READABLE = (2, VERSION)
"""The versions that can be read; version 2 knew nothing of exact copies."""
MANIFEST = "manifest.json"
COLUMNS = arrange.EncodedIds._fields
OTHERS = ("offsets", "user_ids", "item_ids")


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
      UserError: what `read_interactions` raises; `out_dir` is something else than a cache; the disk is full.
    """
    target = Path(out_dir).expanduser()
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
        raise UserError(f"cannot build the data cache {target}: {error}") from error
    return target


def ensure(config: InteractionsFile, root: str | os.PathLike[str], progress: arrange.Progress = arrange.silent) -> Path:
    """Returns the cache of `config` under `root`, built now if it is not there or if its inputs have changed.

    Each way of reading (paths, columns, filter) has its own folder, so one root serves many configs.
    """
    if "://" in os.fspath(root):
        raise UserError(f"`cache: {root}`: a data cache is memory-mapped, so it must be a local folder")
    key = hashlib.sha256(json.dumps(_reading(config), sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(root).expanduser() / key
    if (folder / MANIFEST).exists():
        prints = _fingerprint(config, expand_paths(config.path, config.format, config.text))
        if _manifest(folder)["fingerprint"] == prints:
            scratch.sweep(folder)
            return folder
    return build_cache(config, folder, progress)


def open_cache(folder: str | os.PathLike[str], verify: bool = False) -> Interactions:
    """Opens a cache as interactions over its memory-mapped columns; `verify` reads all and checks their SHA-256.

    Raises:
      UserError: no cache, of another version, or a column that is missing, cut short or (with `verify`)
      changed.
    """
    root = Path(folder).expanduser()
    manifest = _manifest(root)
    arrays = {name: _column(root, name, manifest["columns"], verify) for name in manifest["columns"]}
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


def _contexts(names: Collection[str]) -> list[str]:
    """Returns the names of the files of the context columns' values; a column may have a name that no file can."""
    return [f"context_{at}" for at in range(len(names))]


def _manifest(root: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((root / MANIFEST).read_text())
        version = manifest["version"]
    except FileNotFoundError:
        raise UserError(f"no data cache in {root} (no {MANIFEST}); build one with `jaxops data build`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root / MANIFEST} is damaged ({error}); remove {root} and build it again") from error
    if version not in READABLE:
        raise UserError(f"{root} is a data cache of version {version}, this jaxops reads {VERSION}; build it again")
    return manifest


def _column(root: Path, name: str, described: dict[str, Any], verify: bool) -> np.ndarray:
    path = root / f"{name}.npy"
    expected = described[name]
    advice = f"remove {root} and build it again"
    if not path.exists():
        raise UserError(f"the data cache is damaged: {path} is missing; {advice}")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise UserError(f"the data cache is damaged: {path} has {size} bytes, expected {expected['bytes']}; {advice}")
    if verify and (got := _sha256(path)) != expected["sha256"]:
        raise UserError(f"the data cache is damaged: {path} has SHA-256 {got}, expected {expected['sha256']}; {advice}")
    try:
        return np.asarray(np.load(path, mmap_mode="r"))
    except (ValueError, OSError) as error:
        raise UserError(f"the data cache is damaged: {path}: {error}; {advice}") from error


def _write_manifest(folder: Path, inter: Interactions, prints: dict[str, Any]) -> None:
    columns = {}
    for name in (*COLUMNS, *OTHERS, *_contexts(inter.contexts)):
        path = folder / f"{name}.npy"
        columns[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
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
        "columns": columns,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _reading(config: InteractionsFile) -> dict[str, Any]:
    """Returns the part of the config that decides the columns (neither the split nor the folder of the cache)."""
    fields = dataclasses.asdict(config)
    return {name: fields[name] for name in ("path", "columns", "min_count", "format", "header", "duplicates", "text")}


def _fingerprint(config: InteractionsFile, files: Sequence[DataFile]) -> dict[str, Any]:
    described = {"reading": _reading(config), "inputs": [[f.name, f.size, f.mtime_ns] for f in files]}
    return json.loads(json.dumps(described))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
