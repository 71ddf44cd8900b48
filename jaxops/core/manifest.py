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

from jaxops.core import plain, small_files
from jaxops.core.checksums import Early, of_file, side_by_side
from jaxops.core.store_paths import StorePath
from jaxops.core.stores import StoreError, is_url

FILE = "jaxops.json"
FORMAT = 2
"""The newest version that is read, as are all older ones. Only manifests with shared parts are written as version 2."""

TEMPORARY = f".{FILE}.tmp"
_MOST_BYTES = 256 << 20
_DTYPE = re.compile(r"bool|u?int\d+|bfloat16|float\d+(_\w+)?|complex\d+")
"""Numbers and nothing else: an object could be anything, and `S999999999` is a gigabyte an entry."""
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
        path = folder / FILE
        text = path.read_text() if is_url(folder) else small_files.read_text(path, _MOST_BYTES)
        outer = json.loads(text)
        body, crc = outer["manifest"], outer["crc32"]
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{FILE} cannot be read ({type(error).__name__}: {error})") from error
    try:
        found = _crc_of(body)
    except RecursionError as error:
        raise Damaged(f"{FILE} cannot be read ({error})") from error
    if crc != found:
        raise Damaged(f"{FILE} was changed (its checksum differs)")
    return _believed(body)


def _believed(body: Any) -> Manifest:
    """The manifest in a body whose checksum holds: whoever wrote it may have meant harm.

    Raises:
      Damaged: a part is missing, is of another type, or names what lies outside of the checkpoint.
    """
    _require(isinstance(body, dict), "it is no JSON object")
    version = body.get("format")
    _require(_is_count(version), f"format is {version!r}")
    if version > FORMAT:
        raise Damaged(f"{FILE} has format {version}, written by a newer jaxops; this one reads {FORMAT}")
    for name in ("step", "serial"):
        _require(_is_count(body.get(name)), f"{name} is {body.get(name)!r}")
    for name, kind in (("meta", dict), ("metrics", dict), ("files", dict), ("arrays", list)):
        _require(isinstance(body.get(name), kind), f"{name} is no {'list' if kind is list else 'mapping'}")
    for name, value in body["metrics"].items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        _require(number, f"metric {name!r} is {value!r}")
    arrays = dict(_array(entry) for entry in body["arrays"])
    _require(len(arrays) == len(body["arrays"]), "an array is named twice")
    return Manifest(
        step=body["step"],
        serial=body["serial"],
        meta=body["meta"],
        metrics=body["metrics"],
        arrays=arrays,
        files=dict(_file(name, file) for name, file in body["files"].items()),
        shared=_inside(body.get("shared", {})),
    )


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Damaged(f"{FILE} is no manifest: {what[:200]}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _array(entry: Any) -> tuple[plain.Path, tuple[tuple[int, ...], str]]:
    _require(isinstance(entry, dict) and entry.keys() >= {"path", "shape", "dtype"}, f"array {entry!r}")
    path, shape, dtype = entry["path"], entry["shape"], entry["dtype"]
    named = isinstance(path, list) and all(isinstance(part, str) or _is_count(part) for part in path)
    _require(named, f"array {path!r}")
    sized = isinstance(shape, list) and len(shape) <= 32 and all(map(_is_count, shape))
    _require(sized and math.prod(shape) < 1 << 60, f"array {path!r} has shape {shape!r}")
    _require(isinstance(dtype, str) and _DTYPE.fullmatch(dtype) is not None, f"array {path!r} has dtype {dtype!r}")
    try:
        np.dtype(dtype)
    except TypeError:
        raise Damaged(f"{FILE} names the dtype {dtype!r}, which is not known here") from None
    return tuple(path), (tuple(shape), dtype)


def _file(name: str, file: Any) -> tuple[str, File]:
    inside = name and not name.startswith("/") and not {"", ".", ".."} & {*name.split("/")} and "\0" not in name
    _require(bool(inside), f"it names a file outside of itself: {name!r}")
    known = isinstance(file, dict) and file.keys() == {"bytes", "crc32"} and _is_count(file["bytes"])
    _require(known and (file["crc32"] is None or _is_count(file["crc32"])), f"file {name!r} has {file!r}")
    return name, File(**file)


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
            if there is None and not os.path.isfile(path):  # a pipe would be read for ever
                return f"{name}: no ordinary file"
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


def _inside(shared: Any) -> dict[str, str]:
    """The folders that a manifest names, none of them elsewhere."""
    _require(isinstance(shared, dict) and all(isinstance(name, str) for name in shared.values()), f"shared: {shared!r}")
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
