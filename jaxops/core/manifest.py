"""The manifest of a checkpoint: one JSON file that lists its arrays, and the size and CRC-32 of each of its files.

It is written last and atomically: a folder without a manifest is not a checkpoint, whatever else is in it. It is plain
JSON on any file system that etils.epath reaches. Tested in tests/core/test_checkpoint_manifest.py.
"""

import dataclasses
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxops.core import plain
from jaxops.core.checksums import Early, of_file, side_by_side
from jaxops.core.store_paths import StorePath
from jaxops.core.stores import StoreError, is_url

FILE = "jaxops.json"
FORMAT = 2
"""The newest version that is read, as are all older ones. Only manifests with shared parts are written as version 2."""

TEMPORARY = f".{FILE}.tmp"
SHARED_NAME = re.compile(r"(\w+-[0-9a-f]{16})(?:-(\d+))?")
"""The name of a folder with arrays that several checkpoints have in common (shared_parts.py)."""


class Damaged(Exception):
    """An error for a manifest that cannot be trusted; the message says why."""


class SavedArray(NamedTuple):
    """One array of a checkpoint: path (such as `params/w`), shape, dtype by name, and size in memory in bytes."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


class File(NamedTuple):
    """The size of one stored file in bytes, and its CRC-32, which is None until the file has been read back."""

    bytes: int
    crc32: int | None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint: its step, arrays and files.

    Attributes:
      step: the step it was saved at.
      serial: number of the save within its run, so that the newest is known after a run went back to an earlier step.
      meta: the caller's JSON.
      metrics: finite numbers known when it was saved.
      arrays: path -> (shape, dtype name).
      files: name relative to the folder -> File.
      shared: first part of a path -> name of the folder beside this one that holds the arrays below it, and may be
        named by other checkpoints too.
    """

    step: int
    serial: int
    meta: dict[str, Any]
    metrics: dict[str, float]
    arrays: dict[plain.Path, tuple[tuple[int, ...], str]]
    files: dict[str, File] = dataclasses.field(default_factory=dict)
    shared: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def format(self) -> int:
        """The version that it is written as: the lowest that can hold its contents."""
        return 2 if self.shared else 1

    def leaves(self) -> list[SavedArray]:
        """Returns a description of every array."""
        return [
            SavedArray(plain.name(path), shape, dtype, math.prod(shape) * np.dtype(dtype).itemsize)
            for path, (shape, dtype) in self.arrays.items()
        ]


def to_json(manifest: Manifest) -> str:
    """Returns the manifest as JSON text that carries its own checksum.

    Raises:
      TypeError, ValueError: `meta` is not JSON.
    """
    body = {
        "format": manifest.format,
        "step": manifest.step,
        "serial": manifest.serial,
        "meta": manifest.meta,
        "metrics": manifest.metrics,
        "arrays": [{"path": path, "shape": shape, "dtype": dtype} for path, (shape, dtype) in manifest.arrays.items()],
        "files": {name: file._asdict() for name, file in manifest.files.items()},
    }
    if manifest.shared:
        body["shared"] = manifest.shared
    body = json.loads(json.dumps(body, allow_nan=False))
    return json.dumps({"crc32": _crc_of(body), "manifest": body})


def write(folder: epath.Path, manifest: Manifest) -> None:
    """Writes the manifest into `folder` atomically, replacing an older one."""
    text = to_json(manifest)
    if is_url(folder):  # object stores write an object whole or not at all
        (folder / FILE).write_text(text)
        return
    with open(folder / TEMPORARY, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / TEMPORARY, folder / FILE)


def read(folder: epath.Path) -> Manifest:
    """Reads the manifest of `folder`.

    Raises:
      Damaged: the file is missing, cannot be read, was changed, or has a newer format.
      StoreError: an object store does not answer.
    """
    try:
        outer = json.loads((folder / FILE).read_text())
        body, crc = outer["manifest"], outer["crc32"]
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{FILE} cannot be read ({type(error).__name__}: {error})") from error
    if crc != _crc_of(body):
        raise Damaged(f"{FILE} was changed (its checksum differs)")
    if body["format"] > FORMAT:
        raise Damaged(f"{FILE} has format {body['format']}, written by a newer jaxops; this one reads {FORMAT}")
    return Manifest(
        step=body["step"],
        serial=body["serial"],
        meta=body["meta"],
        metrics=body["metrics"],
        arrays={tuple(a["path"]): (tuple(a["shape"]), a["dtype"]) for a in body["arrays"]},
        files={name: File(**file) for name, file in body["files"].items()},
        shared=_inside(body.get("shared", {})),
    )


def survey(folder: epath.Path, *, checksums: bool, early: Early | None = None) -> dict[str, File]:
    """Returns every file under `folder` but the manifest, with its size and, with `checksums`, its CRC-32.

    For the CRC-32 every file is read, except those whose checksum `early` knows already.
    """

    def crc(name: str) -> int:
        known = early.known(folder / name) if early else None
        return of_file(folder / name) if known is None else known

    sizes = {name: size for name, size in sorted(_sizes(folder).items()) if name not in (FILE, TEMPORARY)}
    crcs = side_by_side(crc, sizes) if checksums else [None] * len(sizes)
    return {name: File(size, crc) for (name, size), crc in zip(sizes.items(), crcs, strict=True)}


def problems(folder: epath.Path, manifest: Manifest, *, checksums: bool) -> Iterator[str]:
    """Yields one line for each file that is missing, has another size or, with `checksums`, another CRC-32.

    Raises:
      StoreError: an object store does not answer, which says nothing about the files.
    """
    there = folder.files() if isinstance(folder, StorePath) else None

    def problem(of: tuple[str, File]) -> str | None:
        name, expected = of
        path = folder / name
        try:
            size = path.stat().length if there is None else there.get(name)
            if size is None:
                return f"{name}: missing"
            if size != expected.bytes:
                return f"{name}: {size} bytes, expected {expected.bytes}"
            if checksums and expected.crc32 is not None and of_file(path) != expected.crc32:
                return f"{name}: contents were changed (CRC-32 differs)"
        except FileNotFoundError:
            return f"{name}: missing"
        except StoreError:
            raise
        except OSError as error:
            return f"{name}: cannot be read ({error})"
        return None

    yield from filter(None, (side_by_side if checksums else map)(problem, manifest.files.items()))


def differences(saved: Manifest, wanted: Mapping[plain.Path, tuple[tuple[int, ...], str]]) -> Iterator[tuple[str, str]]:
    """Yields (path, problem) for every array that is missing, not expected, or of another shape or dtype."""
    there = {plain.name(path): array for path, array in saved.arrays.items()}
    here = {plain.name(path): array for path, array in wanted.items()}
    for name, (shape, dtype) in here.items():
        if name not in there:
            yield name, f"not in the checkpoint, {dtype}{list(shape)} expected"
        elif there[name][0] != shape:
            yield name, f"shape {list(there[name][0])} in the checkpoint, {list(shape)} expected"
        elif there[name][1] != dtype:
            yield name, f"{there[name][1]} in the checkpoint, {dtype} expected"
    for name, (shape, dtype) in there.items():
        if name not in here:
            yield name, f"{dtype}{list(shape)} in the checkpoint, not expected"


def _inside(shared: dict[str, str]) -> dict[str, str]:
    """Returns the shared folders that a manifest names; raises Damaged for a name that could lead elsewhere."""
    if strange := [name for name in shared.values() if not SHARED_NAME.fullmatch(name)]:
        raise Damaged(f"{FILE} names {strange[0]!r}, which is no folder of a shared part")
    return shared


def _sizes(folder: epath.Path, prefix: str = "") -> dict[str, int]:
    """Returns the size in bytes of every file below a folder, by its name relative to the folder."""
    if isinstance(folder, StorePath):
        return folder.files()
    found: dict[str, int] = {}
    for path in folder.iterdir():
        name = f"{prefix}{path.name}"
        found |= _sizes(path, f"{name}/") if path.is_dir() else {name: path.stat().length}
    return found


def _crc_of(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
