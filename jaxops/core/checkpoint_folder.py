"""The folder of a run's checkpoints: it lists the steps, finds the undamaged ones, and deletes old ones.

A checkpoint is a folder `20` (or `20-2` where step 20 was saved again: beside the older, never over it) that
has a manifest. Nothing damaged is deleted, and nothing goes before something newer is whole. What checkpoints have in
common lies beside them (shared_parts.py), as long as one of them names it. Folders of somebody else are left alone,
whatever their names, and nothing is changed through a link: a checkpoint that was moved away and linked is read.
Tested in tests/core/test_checkpoint_folder.py.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from etils import epath

from jaxops.core import manifest, orbax_io, plain, store_paths, stores
from jaxops.core.failures import UserError
from jaxops.core.manifest import Damaged, File, Manifest
from jaxops.core.shared_parts import DAMAGED, Known, SharedParts

_NAME = re.compile(r"(\d+)(?:-(\d+))?$")
_TEMPORARY = ".orbax-checkpoint-tmp"
_WRITTEN = {orbax_io.ITEM, *orbax_io.FILES, DAMAGED, manifest.TEMPORARY}
_UNFINISHED = re.compile(r"\d+(-\d+)?\.orbax-checkpoint-tmp.*")


@dataclasses.dataclass(frozen=True)
class Retention:
    """The rule for which checkpoints stay: the `keep` saved last, multiples of `keep_every`, and the best by a metric.

    Attributes:
      keep: number of most recently saved checkpoints to keep.
      keep_every: also keep steps that are a multiple of this.
      best: name of the metric whose best checkpoint is kept too.
      best_mode: "max" where a larger metric is better, else "min".
    """

    keep: int = 3
    keep_every: int | None = None
    best: str | None = None
    best_mode: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(f"keep must be at least 1, got {self.keep}")
        if self.keep_every is not None and self.keep_every < 1:
            raise UserError(f"keep_every must be at least 1, got {self.keep_every}")
        if self.best_mode not in ("max", "min"):
            raise UserError(f"best_mode must be 'max' or 'min', got {self.best_mode!r}")

    def best_of(self, saved: Mapping[int, Manifest]) -> int | None:
        """Returns the step with the best metric, the earliest save of equals; None if none has the metric."""
        if self.best is None:
            return None
        sign = -1 if self.best_mode == "max" else 1
        scored = [
            (sign * one.metrics[self.best], one.serial, step) for step, one in saved.items() if self.best in one.metrics
        ]
        return min(scored)[2] if scored else None

    def kept(self, saved: Mapping[int, Manifest]) -> set[int]:
        """Returns the steps of `saved` that stay."""
        kept = set(sorted(saved, key=lambda step: saved[step].serial)[-self.keep :])
        if self.keep_every is not None:
            kept |= {step for step in saved if step % self.keep_every == 0}
        best = self.best_of(saved)
        return kept if best is None else kept | {best}


class CheckpointFolder:
    """The checkpoints under one path (local, gs:// or s3://); every call reads the folder afresh.

    Every method raises StoreError (a RunFailed) if an object store does not answer.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = store_paths.path(directory)
        self.shared = SharedParts(self.path)
        self._damaged: dict[epath.Path, list[str]] = {}

    @property
    def remote(self) -> bool:
        """True where the path is in an object store."""
        return stores.is_url(self.path)

    def steps(self) -> dict[int, epath.Path]:
        """Maps each step to its newest folder with a manifest, damaged or not; empty if nothing was saved.

        Raises:
          UserError: the path cannot be listed.
        """
        listing = sorted(self._listing(), key=lambda found: found[2])
        whole = self._each(lambda found: (found[0] / manifest.FILE).is_file(), listing)
        return {step: folder for (folder, step, _), there in zip(listing, whole, strict=True) if there}

    def readable(self) -> dict[int, Manifest]:
        """Maps each step to its manifest, without the steps whose manifest cannot be read."""
        folders = self.steps()
        found = self._each(_readable, folders.values())
        return {step: one for step, one in zip(folders, found, strict=True) if one is not None}

    def find(self, step: int) -> epath.Path:
        """Returns the folder of `step`.

        Raises:
          UserError: the step was not saved.
        """
        folders = self.steps()
        if step not in folders:
            there = f"there are steps {some(sorted(folders))}" if folders else "there are none"
            raise UserError(f"no checkpoint of step {step} in {self.path}; {there}")
        return folders[step]

    def open(self, step: int) -> tuple[epath.Path, Manifest]:
        """Returns folder and manifest of `step`.

        Raises:
          UserError: the step was not saved, or its manifest is damaged.
        """
        folder = self.find(step)
        try:
            return folder, manifest.read(folder)
        except Damaged as damage:
            raise UserError(f"checkpoint {folder} is damaged: {damage}") from damage

    def edition(self, step: int) -> int:
        """Returns the number of the next save of `step`: 1, or one more than the newest save, complete or not."""
        return 1 + max((edition for _, there, edition in self._listing() if there == step), default=0)

    def at(self, step: int, edition: int) -> epath.Path:
        """Returns the path for one save of a step, which need not exist."""
        return self.path / (str(step) if edition == 1 else f"{step}-{edition}")

    def home(self, folder: epath.Path, saved: Manifest, path: plain.Path) -> epath.Path:
        """Returns the folder that holds this array of a checkpoint: its own, or one that it shares with others."""
        name = saved.shared.get(str(path[0])) if path else None
        return folder if name is None else self.path / name

    def files(self, saved: Manifest) -> dict[str, File]:
        """Returns all files of a checkpoint, its own and shared ones, as far as their manifests can be read."""
        return saved.files | self.shared.files(saved)

    def problems(
        self, folder: epath.Path, saved: Manifest, *, checksums: bool, known: Known | None = None
    ) -> list[str]:
        """Returns one line for each problem with the files of a checkpoint, shared ones included.

        Args:
          folder: the checkpoint's folder.
          saved: its manifest.
          checksums: read every byte.
          known: findings about shared folders so far, as in `SharedParts.problems`.

        Raises:
          StoreError: an object store does not answer.
        """
        own = manifest.problems(folder, saved, checksums=checksums)
        return [*own, *self.shared.problems(saved, checksums=checksums, known=known)]

    def newest_good(self, warn: Callable[[str], None]) -> int | None:
        """Returns the step saved last among the undamaged; reports each damaged one that it passes over to `warn`."""
        folders, readable, known = self.steps(), self.readable(), Known()
        # Without a readable manifest there is no serial: such checkpoints are reported first.
        serials = {step: readable[step].serial if step in readable else math.inf for step in folders}
        for step in sorted(folders, key=lambda step: (serials[step], step), reverse=True):
            try:
                found = self.problems(folders[step], manifest.read(folders[step]), checksums=True, known=known)
            except Damaged as damage:
                found = [str(damage)]
            if not found:
                return step
            self._damaged[folders[step]] = found
            warn(f"WARNING: checkpoint {folders[step]} is damaged and is passed over: {some(found, 3)}")
        return None

    def sweep(self) -> None:
        """Removes what killed or failed saves left behind, and nothing else; no save may be under way."""
        for path in list(self.shared.sweep(self._named())):
            if _TEMPORARY in path.name or is_ours(path):
                _delete(path)
        for path in self.path.iterdir():
            named = _NAME.fullmatch(path.name) and not (path / manifest.FILE).exists()
            if (named and is_ours(path)) or _UNFINISHED.fullmatch(path.name):
                _delete(path)

    def retire(self, retention: Retention) -> None:
        """Deletes the checkpoints that `retention` does not keep.

        A checkpoint known to be damaged neither counts as kept nor is deleted. Its problems are written into its
        folder, so that later runs know them.
        """
        for folder, found in self._damaged.items():
            if is_link(folder):
                continue
            with contextlib.suppress(OSError):
                (folder / DAMAGED).write_text("\n".join(found) + "\n")
        self.shared.mark()
        folders, known = self.steps(), Known()
        good = {
            step: saved
            for step, saved in self.readable().items()
            if folders[step] not in self._damaged
            and not self.problems(folders[step], saved, checksums=False, known=known)
        }
        kept = retention.kept(good)
        for folder, step, _ in self._listing():
            superseded = step in good and (step not in kept or folder != folders[step])
            if superseded and folder not in self._damaged and not (folder / DAMAGED).exists() and is_ours(folder):
                _delete(folder)
        if self.shared.names() and (named := self._named()) is not None:
            for folder in list(self.shared.unnamed(named)):
                if is_ours(folder):
                    _delete(folder)

    def _named(self) -> set[str] | None:
        """Returns the shared folders that checkpoints name, damaged ones too; None if a manifest cannot be read."""
        whole = [folder for folder, _, _ in self._listing() if (folder / manifest.FILE).exists()]
        read = self._each(_readable, whole)
        return None if None in read else {name for saved in read for name in saved.shared.values()}

    def _each(self, ask: Callable[[Any], Any], about: Iterable[Any]) -> list[Any]:
        """Calls `ask` on each; in parallel for an object store, where a request takes as long as reading a megabyte."""
        if not self.remote:
            return [ask(one) for one in about]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(ask, about))

    def _listing(self) -> list[tuple[epath.Path, int, int]]:
        """Returns (folder, step, edition) of everything named like a checkpoint."""
        try:
            paths = list(self.path.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read the checkpoint folder {self.path}: {error}") from error
        named = [(path, match) for path in paths if (match := _NAME.fullmatch(path.name))]
        return [(path, int(match[1]), int(match[2] or 1)) for path, match in named if len(path.name) < 40]


def _readable(folder: epath.Path) -> Manifest | None:
    try:
        return manifest.read(folder)
    except Damaged:
        return None


def some(items: list[Any], most: int = 10) -> str:
    """Returns the first `most` items as text, such as `1, 2, 3 and 4 more`."""
    shown = ", ".join(str(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def is_link(folder: epath.Path) -> bool:
    """Returns true if the path is a symbolic link. Its target is not part of this folder and is never changed."""
    return not stores.is_url(folder) and os.path.islink(os.fspath(folder))


def is_ours(folder: epath.Path) -> bool:
    """Returns true if a save made this folder: it has our manifest, or holds only what orbax writes before that.

    A folder `2023` with somebody's notes is none, and neither is a link.
    """
    if is_link(folder) or not folder.is_dir():
        return False
    return (folder / manifest.FILE).exists() or _WRITTEN.issuperset(path.name for path in folder.iterdir())


def _delete(folder: epath.Path) -> None:
    """Deletes a folder, but never a link. The manifest goes first, so a kill leaves no damaged checkpoint."""
    if is_link(folder):
        return
    (folder / manifest.FILE).unlink(missing_ok=True)
    folder.rmtree(missing_ok=True)
