"""The export of one checkpoint with all that it needs, as a checkpoint folder that contains only this one.

Every checksum is checked while its file is copied. A local copy is made under a temporary name and renamed when it is
complete. An object store cannot rename, so that the manifest is written last there. Tested in
tests/cli/test_ckpt_export.py.
"""

import contextlib
import dataclasses
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from etils import epath

from jaxops.core import manifest, store_paths, store_probe, stores
from jaxops.core.failures import RunFailed, UserError
from jaxops.core.manifest import Damaged, File
from jaxops.core.stores import StoreError
from jaxops.run.folder.saved import choose, open_saved

_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Exported:
    """A copy of a checkpoint.

    Attributes:
      step: the step of the checkpoint.
      out: the folder or URL of the copy.
      files: how many files were copied.
      bytes: their total size.
      unchecked: how many of them have no recorded checksum.
    """

    step: int
    out: str
    files: int
    bytes: int
    unchecked: int


def export_saved(run: str | os.PathLike[str], out: str | os.PathLike[str], step: int | None = None) -> Exported:
    """Copies the checkpoint of `step`, by default the best where the run keeps it, else the one saved last.

    `jaxops ckpt verify OUT` and `Checkpoints(OUT).restore(step, ...)` read the copy like the checkpoints of a run.

    Raises:
      UserError: there is no such run or step, `out` exists, or a file of the checkpoint is damaged or missing.
      RunFailed: the copy cannot be written.
    """
    place = open_saved(run)
    step, found = choose(run, place, step)
    source = place.find(step)
    with _made(out) as folder:
        copied: dict[str, File] = {}
        for name in dict.fromkeys(found.shared.values()):  # the checkpoint itself is copied last
            try:
                part = manifest.read(source.parent / name)
            except Damaged as damage:
                raise UserError(f"checkpoint {source} is damaged: {name}/{damage}; nothing was exported") from damage
            _copy(source.parent / name, folder / name, part.files)
            manifest.write(folder / name, part)
            copied |= {f"{name}/{file}": size for file, size in part.files.items()}
        _copy(source, folder / str(step), found.files)
        if wrong := place.shared.problems(found, checksums=False):
            raise UserError(f"checkpoint {source} is damaged: {wrong[0]}; nothing was exported")
        manifest.write(folder / str(step), found)
        copied |= found.files
    unchecked = sum(file.crc32 is None for file in copied.values())
    return Exported(step, os.fspath(out), len(copied), sum(file.bytes for file in copied.values()), unchecked)


@contextlib.contextmanager
def _made(out: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """Yields a folder to write to. It is at `out` when the context ends without an error, and removed otherwise."""
    target = store_paths.path(out)
    remote = stores.is_url(out)
    if remote:
        store_probe.check_access(out)
    if target.exists() or (not remote and os.path.lexists(target)):
        raise UserError(f"there is something at {out} already: export makes a new folder")
    folder = target if remote else target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        if not remote:
            os.makedirs(folder)
        yield folder
        if not remote:
            os.rename(folder, target)
    except BaseException as error:
        _remove(folder, remote)
        if isinstance(error, OSError) and not isinstance(error, StoreError):
            raise RunFailed(f"{out} cannot be written: {error}; nothing of it was left") from error
        raise


def _remove(folder: epath.Path, remote: bool) -> None:
    if remote:
        folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _copy(source: epath.Path, target: epath.Path, files: Mapping[str, File]) -> None:
    """Copies these files and no others.

    Raises:
      UserError: a file is missing, differs from what was written, or has a path outside of the folder.
    """
    for name, expected in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"checkpoint {source} names a file outside of itself: {name!r}")
        try:
            _require_ordinary(source / name, expected.bytes)
            size, crc = _copy_file(source / name, target / name)
        except _Unreadable as error:
            raise UserError(f"checkpoint {source} is damaged: {name}: {error}; nothing was exported") from error
        wrong = f"{size} bytes, expected {expected.bytes}" if size != expected.bytes else ""
        if not wrong and expected.crc32 not in (None, crc):
            wrong = "contents were changed (CRC-32 differs)"
        if wrong:
            raise UserError(f"checkpoint {source} is damaged: {name}: {wrong}; nothing was exported")


class _Unreadable(Exception):
    """A file of the source is missing or cannot be read."""


def _next(file: IO[bytes]) -> bytes:
    try:
        return file.read(_CHUNK)
    except StoreError:
        raise
    except OSError as error:
        raise _Unreadable(f"cannot be read ({error})") from error


def _require_ordinary(source: epath.Path, expected: int) -> None:
    """Holds a file against its size before it is read: a pipe or a device would be read for ever."""
    if stores.is_url(source) or not os.path.exists(source):
        return
    if not os.path.isfile(source):
        raise _Unreadable("it is no ordinary file")
    if (size := source.stat().length) != expected:
        raise _Unreadable(f"{size} bytes, expected {expected}")


def _copy_file(source: epath.Path, target: epath.Path) -> tuple[int, int]:
    """Copies a file and returns the size and the CRC-32 of its contents."""
    size = crc = 0
    if not stores.is_url(target):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            read = stack.enter_context(source.open("rb"))
        except FileNotFoundError as error:
            raise _Unreadable("missing") from error
        write = stack.enter_context(target.open("wb"))
        while block := _next(read):
            size, crc = size + len(block), zlib.crc32(block, crc)
            write.write(block)
        if not stores.is_url(target):
            write.flush()
            os.fsync(write.fileno())
    return size, crc
