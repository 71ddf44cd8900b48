"""The contents of a run's checkpoints, read without the mesh, the model or the devices that wrote them.

No array is loaded and no device is touched. Tested in tests/cli/test_runs_commands.py.
"""

import dataclasses
import datetime as dt
import math
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from jaxops.config.dump import digest
from jaxops.core import manifest, store_paths, store_probe, stores
from jaxops.core.checkpoint_folder import CheckpointFolder, Retention, some
from jaxops.core.failures import UserError
from jaxops.core.manifest import Damaged, Manifest, SavedArray
from jaxops.core.shared_parts import Known
from jaxops.run.folder.listing import existing_folder


@dataclasses.dataclass(frozen=True)
class Saved:
    """One checkpoint of a list. Fields that come from its manifest are None where that cannot be read.

    Attributes:
      step: the step of the checkpoint.
      folder: its folder.
      written: the time at which its manifest was written (for a copy, copied).
      files: the number of files in its own folder.
      bytes: their total size.
      metrics: the metrics that were saved with it.
      latest: true for the checkpoint that was saved last.
      best: true for the checkpoint that is kept as the best.
      damage: files that are missing or have another size; contents are not checked.
      shared: by first part of an array's path, the shared folder that holds the arrays.
      shared_files: the number of files in the folders that it shares with other checkpoints.
      shared_bytes: their total size.
    """

    step: int
    folder: str
    written: dt.datetime | None
    files: int | None
    bytes: int | None
    metrics: dict[str, float]
    latest: bool
    best: bool
    damage: list[str]
    shared: dict[str, str]
    shared_files: int
    shared_bytes: int


@dataclasses.dataclass(frozen=True)
class Group:
    """The totals of one part of the state (`params`, `opt_state`, ...): arrays, their entries and bytes."""

    name: str
    arrays: int
    entries: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything that a checkpoint holds, except the values of its arrays.

    Attributes:
      saved: the checkpoint itself.
      cursor: the cursor of the data, in examples.
      seed: the seed of the run.
      wall_s: seconds of training up to it.
      config: the resolved config.
      digest: the SHA-256 of the config.
      arrays: paths, shapes and dtypes of the arrays.
    """

    saved: Saved
    cursor: int | None
    seed: int | None
    wall_s: float | None
    config: dict[str, Any]
    digest: str | None
    arrays: list[SavedArray]

    @property
    def groups(self) -> list[Group]:
        """The totals for each first part of the arrays' paths, in their order."""
        found: dict[str, list[SavedArray]] = {}
        for leaf in self.arrays:
            found.setdefault(leaf.path.split("/")[0], []).append(leaf)
        return [Group(name, len(leaves), *_totals(leaves)) for name, leaves in found.items()]

    @property
    def total(self) -> Group:
        """The totals of all arrays."""
        return Group("total", len(self.arrays), *_totals(self.arrays))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of reading every byte of a checkpoint.

    Folders that it shares with other checkpoints count as parts of it; they are read once for all of them.

    Attributes:
      step: the step of the checkpoint.
      folder: its folder.
      serial: the number of its save, which tells two saves of one step apart.
      files: the number of files.
      bytes: their total size.
      unchecked: the number of files without a recorded checksum (a kill between save and check).
      damage: the damaged files, with the reason; empty where all is as it was written.
    """

    step: int
    folder: str
    serial: int
    files: int
    bytes: int
    unchecked: int
    damage: list[str]


def list_saved(run: str | os.PathLike[str]) -> tuple[list[Saved], list[tuple[str, str]]]:
    """Lists the checkpoints of a run by step, and (name, description) of every other folder beside them.

    A checkpoint that a running run deletes meanwhile is left out.

    Raises:
      UserError: there is no such run, or its checkpoints cannot be listed.
    """
    place = open_saved(run)
    folders, readable = place.steps(), place.readable()
    found = [_saved(place, step, folders, readable) for step in sorted(folders)]
    there = [one for one in found if not one.damage or (folders[one.step] / manifest.FILE).exists()]
    return there, list(_others(place, folders, readable))


def show_saved(run: str | os.PathLike[str], step: int | None = None) -> Contents:
    """Describes the contents of the checkpoint of `step`, by default the one saved last.

    Raises:
      UserError: there is no such run or step, or a manifest cannot be read.
    """
    place = open_saved(run)
    folders, readable = place.steps(), place.readable()
    step = _latest(_some(run, folders, readable)) if step is None else step
    assert step is not None
    _, found = place.open(step)
    meta = found.meta
    config, history = meta.get("config"), meta.get("history")
    config = config if isinstance(config, dict) else {}
    return Contents(
        saved=_saved(place, step, folders, {**readable, step: found}),
        cursor=meta.get("cursor"),
        seed=meta.get("seed"),
        wall_s=history.get("wall_s") if isinstance(history, dict) else None,
        config=config,
        digest=digest(config) if config else None,
        arrays=found.leaves(),
    )


def verify_saved(run: str | os.PathLike[str], step: int | None = None) -> Iterator[Verdict]:
    """Reads every byte of the checkpoint of `step`, or of all; skips checkpoints that a running run deletes.

    Raises:
      UserError: there is no such run or step, or there is nothing to verify.
    """
    place = open_saved(run)
    folders = place.steps()
    if step is not None:
        folders = {step: place.find(step)}
    if not folders:
        raise UserError(f"{run} has no checkpoint to verify")
    known = Known()
    for number in sorted(folders):
        verdict = _verdict(place, number, folders[number], known)
        if verdict is not None:
            yield verdict


def choose(run: str | os.PathLike[str], place: CheckpointFolder, step: int | None = None) -> tuple[int, Manifest]:
    """Chooses the checkpoint of `step`, by default the best where the run keeps it, else the one saved last.

    Raises:
      UserError: there is no such checkpoint, or its manifest cannot be read.
    """
    if step is None:
        readable = _some(run, place.steps(), place.readable())
        best = _best(readable)
        step = _latest(readable) if best is None else best
    assert step is not None
    return step, place.open(step)[1]


def open_saved(run: str | os.PathLike[str]) -> CheckpointFolder:
    """Opens the checkpoints of a run folder; `run` may also be a folder of checkpoints itself.

    Raises:
      UserError: there is no such folder, or an object store cannot be read.
    """
    if stores.is_url(run):
        store_probe.check_access(run, write=False)
        folder = store_paths.path(run)
        if not folder.is_dir():
            raise UserError(f"there is nothing at {folder}")
    else:
        folder = epath.Path(existing_folder(run))
    inside = folder / "checkpoints"
    if not inside.exists() and CheckpointFolder(folder).steps():
        return CheckpointFolder(folder)
    return CheckpointFolder(inside)


def _some(
    run: str | os.PathLike[str], folders: dict[int, epath.Path], readable: dict[int, Manifest]
) -> dict[int, Manifest]:
    """Returns the checkpoints that can be read, and raises a UserError where there is none."""
    if not folders:
        raise UserError(f"{run} has no checkpoint yet")
    if not readable:
        raise UserError(f"no checkpoint of {run} can be read; `jaxops ckpt verify {run}` says why")
    return readable


def _saved(place: CheckpointFolder, step: int, folders: dict[int, epath.Path], readable: dict[int, Manifest]) -> Saved:
    folder, found = folders[step], readable.get(step)
    if found is None:
        try:
            manifest.read(folder)
            damage = []
        except Damaged as error:
            damage = [str(error)]
    else:
        damage = place.problems(folder, found, checksums=False)
    shared = {} if found is None else place.shared.files(found)
    return Saved(
        step=step,
        folder=os.fspath(folder),
        written=_written(folder),
        files=None if found is None else len(found.files),
        bytes=None if found is None else sum(file.bytes for file in found.files.values()),
        metrics={} if found is None else found.metrics,
        latest=step == _latest(readable),
        best=step == _best(readable),
        damage=damage,
        shared={} if found is None else found.shared,
        shared_files=len(shared),
        shared_bytes=sum(file.bytes for file in shared.values()),
    )


def _latest(readable: dict[int, Manifest]) -> int | None:
    return max(readable, key=lambda step: readable[step].serial, default=None)


def _best(readable: dict[int, Manifest]) -> int | None:
    """Returns the step that is kept as the best, by the config of the checkpoint saved last."""
    latest = _latest(readable)
    config = {} if latest is None else readable[latest].meta.get("config")
    keep = config.get("checkpoint") if isinstance(config, dict) else None
    name = keep.get("best") if isinstance(keep, dict) else None
    return Retention(best=f"valid/{name}").best_of(readable) if name else None


def _written(folder: epath.Path) -> dt.datetime | None:
    try:
        return dt.datetime.fromtimestamp((folder / manifest.FILE).stat().mtime, dt.UTC)
    except OSError:
        return None


def _others(
    place: CheckpointFolder, folders: dict[int, epath.Path], readable: dict[int, Manifest]
) -> Iterator[tuple[str, str]]:
    try:
        paths = sorted(place.path.iterdir(), key=lambda path: path.name)
    except FileNotFoundError:
        return
    counted = {folder.name for folder in folders.values()}
    for path in paths:
        if path.name not in counted and path.is_dir():
            users = [step for step in sorted(readable) if path.name in readable[step].shared.values()]
            if users:
                yield path.name, f"shared by step{'s' * (len(users) > 1)} {some(users)}"
            elif not (path / manifest.FILE).exists():
                yield path.name, "unfinished: a save under way, or one cut short"
            elif path.name in place.shared.names():
                yield path.name, "a shared part that no checkpoint names"
            else:
                yield path.name, "an older save of a step"


def _verdict(place: CheckpointFolder, step: int, folder: epath.Path, known: Known) -> Verdict | None:
    files, damage, serial = {}, [], -1
    try:
        found = manifest.read(folder)
        files, serial = place.files(found), found.serial
        damage = place.problems(folder, found, checksums=True, known=known)
    except Damaged as error:
        damage = [str(error)]
    if damage and not (folder / manifest.FILE).exists():
        return None
    unchecked = sum(file.crc32 is None for file in files.values())
    size = sum(file.bytes for file in files.values())
    return Verdict(step, os.fspath(folder), serial, len(files), size, unchecked, damage)


def _totals(leaves: list[SavedArray]) -> tuple[int, int]:
    """Returns the total entries and bytes of arrays."""
    return sum(math.prod(leaf.shape) for leaf in leaves), sum(leaf.bytes for leaf in leaves)
