"""Arrays that checkpoints have in common, saved once: the folder `frozen-DIGEST` beside the checkpoints that name it.

Such a folder holds orbax's tree and a manifest of its own, which is written before any checkpoint names the folder.
Another digest is another folder. Where a folder was found damaged, the same arrays are written again, to
`frozen-DIGEST-2`. Neither a damaged folder nor one that a checkpoint names is ever deleted.
Tested in tests/core/test_checkpoint_shared.py.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from jaxops.core import manifest, plain, stores
from jaxops.core.manifest import Damaged, File, Manifest

DAMAGED = "jaxops.damaged"
"""Name of the file, in a folder that was found damaged, that lists its problems. A run never deletes such a folder."""

_TEMPORARY = ".orbax-checkpoint-tmp"

Look = tuple[list[str], dict[str, tuple[tuple[int, ...], str]]]
"""The problems of a shared folder, and the arrays in it by name."""
Known = dict[str, Look]


def split_shared(leaves: Mapping[plain.Path, Any], entries: tuple[str, ...]) -> dict[str, dict[plain.Path, Any]]:
    """Groups leaves by the shared entry above them, all others under ""; entries without leaves are left out."""
    parts: dict[str, dict[plain.Path, Any]] = {}
    for path, leaf in leaves.items():
        entry = str(path[0]) if path else ""
        parts.setdefault(entry if entry in entries else "", {})[path] = leaf
    return parts


def draft(entry: str, digest: str, beside: Manifest) -> Manifest:
    """Returns the manifest of a new shared folder for the arrays under `entry` of the checkpoint `beside`."""
    arrays = {path: array for path, array in beside.arrays.items() if str(path[0]) == entry}
    return Manifest(beside.step, beside.serial, meta={"fingerprint": digest}, metrics={}, arrays=arrays)


class SharedParts:
    """The shared folders below one path.

    Every call reads the folder afresh, but remembers which folders this object has found good or damaged.
    """

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self._read: set[str] = set()  # folders of which every byte was read or written by this object, and is good
        self._damaged: dict[str, list[str]] = {}

    def find(self, entry: str, digest: str) -> int:
        """Returns the edition that holds these arrays; if none is good, minus the number of the edition to write.

        An edition that this object has neither written nor read is read first, every byte: otherwise all later
        checkpoints could name a folder with corrupted files.
        """
        editions = {int(number or 1): name for name, stem, number in self._names() if stem == _stem(entry, digest)}
        for edition, name in sorted(editions.items()):
            if (self.path / name / manifest.FILE).exists() and self._usable(name, digest):
                return edition
        return -1 - max(editions, default=0)

    def at(self, entry: str, digest: str, edition: int) -> epath.Path:
        """Returns the folder of an edition.

        Raises:
          ValueError: the entry cannot be part of a folder's name.
        """
        name = _stem(entry, digest) + (f"-{edition}" if edition > 1 else "")
        if manifest.SHARED_NAME.fullmatch(name) is None:
            raise ValueError(f"{entry!r} cannot be shared: its name must be of letters, digits and underscores")
        return self.path / name

    def written(self, folder: epath.Path) -> None:
        """Records that this folder has been written completely."""
        self._read.add(folder.name)
        self._damaged.pop(folder.name, None)

    def problems(self, saved: Manifest, *, checksums: bool, known: Known | None = None) -> list[str]:
        """Returns one line for each problem with the shared folders that a checkpoint names.

        Args:
          saved: the manifest of the checkpoint.
          checksums: read every byte.
          known: findings so far, by folder, so that a folder that several checkpoints name is read once; extended here.

        Raises:
          StoreError: an object store does not answer.
        """
        wrong: list[str] = []
        known = {} if known is None else known
        for entry, name in saved.shared.items():
            if name not in known:
                known[name] = self._look(name, checksums)
            found, there = known[name]
            wrong += found
            own = {plain.name(path): array for path, array in saved.arrays.items() if str(path[0]) == entry}
            lost = [path for path, array in own.items() if 0 not in array[0] and there.get(path) != array]
            wrong += [f"{name}/{manifest.FILE} lacks {path}" for path in lost if not found]
        return wrong

    def files(self, saved: Manifest) -> dict[str, File]:
        """Returns the files of shared folders that a checkpoint names, by relative name; skips damaged manifests."""
        found: dict[str, File] = {}
        for name in saved.shared.values():
            with contextlib.suppress(Damaged):
                there = manifest.read(self.path / name)
                found |= {f"{name}/{file}": size for file, size in there.files.items()}
        return found

    def sweep(self, named: set[str] | None) -> Iterator[epath.Path]:
        """Yields the unfinished folders of killed or failed saves, except those that a checkpoint names."""
        for path in self._folders():
            stem, temporary, _ = path.name.partition(_TEMPORARY)
            if manifest.SHARED_NAME.fullmatch(stem) is None:
                continue
            if temporary or (named is not None and stem not in named and not (path / manifest.FILE).exists()):
                yield path

    def unnamed(self, named: set[str]) -> Iterator[epath.Path]:
        """Yields the complete folders that no checkpoint names any more; damaged ones are left out."""
        for name, _, _ in self._names():
            folder = self.path / name
            if name in named or name in self._damaged or (folder / DAMAGED).exists():
                continue
            if (folder / manifest.FILE).exists() and not self._look(name, checksums=False)[0]:
                yield folder

    def mark(self) -> None:
        """Writes the problems of each damaged folder into it, so that later runs know them."""
        for name, found in self._damaged.items():
            if not stores.is_url(self.path) and os.path.islink(os.fspath(self.path / name)):
                continue
            with contextlib.suppress(OSError):
                (self.path / name / DAMAGED).write_text("\n".join(found) + "\n")

    def names(self) -> list[str]:
        """Returns the names of all shared folders, complete or not."""
        return sorted(name for name, _, _ in self._names())

    def _usable(self, name: str, digest: str) -> bool:
        if name in self._damaged or (self.path / name / DAMAGED).exists():
            return False
        if self._look(name, checksums=name not in self._read)[0]:
            return False
        return bool(manifest.read(self.path / name).meta["fingerprint"] == digest)

    def _look(self, name: str, checksums: bool) -> Look:
        """Checks one folder, and remembers the outcome if every byte was read."""
        folder, found, arrays = self.path / name, [], {}
        try:
            there = manifest.read(folder)
            digest = str(there.meta.get("fingerprint"))[:16]
            if f"-{digest}" not in name:
                found.append(f"{manifest.FILE} belongs to another folder (its fingerprint begins with {digest})")
            arrays = {plain.name(path): array for path, array in there.arrays.items()}
            found += manifest.problems(folder, there, checksums=checksums)
        except Damaged as damage:
            found.append(str(damage))
        if checksums and found:
            self._damaged[name] = found
        elif checksums:
            self._read.add(name)
        return [f"{name}/{what}" for what in found], arrays

    def _names(self) -> Iterator[tuple[str, str, str | None]]:
        """Yields (name, name of the first edition, number of the edition or None) of each shared folder."""
        for path in self._folders():
            if match := manifest.SHARED_NAME.fullmatch(path.name):
                yield path.name, match[1], match[2]

    def _folders(self) -> list[epath.Path]:
        try:
            return list(self.path.iterdir())
        except FileNotFoundError:
            return []


def _stem(entry: str, digest: str) -> str:
    return f"{entry}-{digest[:16]}"
