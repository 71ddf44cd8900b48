"""Checkpoints of a run: saved while it goes on, restored to any mesh, never a partial one taken for whole.

A save is orbax's files first and `jaxops.json` (manifest.py) last, in a new folder (checkpoint_folder.py): a
folder without it is not a checkpoint. An old one goes only after every file of a newer one has been read.
What hardly ever changes is written once and shared (shared_parts.py). Orbax is behind orbax_io.py. Held by
tests/core/test_checkpoint*.py, which kill real processes in mid-save.
"""

import contextlib
import dataclasses
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding, Sharding

from jaxops.core import manifest, orbax_io, plain, shared_parts, writing
from jaxops.core.checkpoint_folder import CheckpointFolder, Retention, is_link, some
from jaxops.core.failures import RunFailed, UserError, nearest
from jaxops.core.fingerprint import fingerprint
from jaxops.core.manifest import Damaged, Manifest, SavedArray
from jaxops.core.read_arrays import read_arrays
from jaxops.core.writing import Write


class Checkpoints:
    """The checkpoints in one folder (local, gs:// or s3://); use as a context, or call `close()`.

    Every method but `check` and `oldest` first waits for the save under way, and raises RunFailed if it failed;
    an error is raised once, at the next call. With several processes all of them make the same calls; process 0
    decides, writes the manifests and deletes. Opening reads and writes nothing.

    Args:
      directory: where the checkpoints lie; made by the first save.
      keep: how many of those saved last to keep.
      keep_every: also keep steps that are a multiple of this.
      best: also keep the best by this name of `metrics`.
      best_mode: whether more of it is better.
      compress: zstd; little smaller on disk (weights hardly compress), much slower.
      checksums: read every save (in the background) and note its CRC-32; sizes alone otherwise.
      before_commit: called on process 0 in the background before a save counts (the logs must not be older than
        the checkpoint, where both go to an object store); its error fails the save.
      shared: top-level entries of a state that hardly ever change: each is written once, to a folder that all
        checkpoints with the same values in it name. Every save takes its fingerprint, so that a change is seen.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_every: int | None = None,
        best: str | None = None,
        best_mode: Literal["max", "min"] = "max",
        compress: bool = False,
        checksums: bool = True,
        before_commit: Callable[[], None] | None = None,
        shared: tuple[str, ...] = ("frozen",),
    ) -> None:
        self._retention = Retention(keep, keep_every, best, best_mode)
        self._folder = CheckpointFolder(directory)
        self._compress, self._checksums, self._before_commit = compress, checksums, before_commit
        self._shared = shared
        self._thread: threading.Thread | None = None
        self._failures: list[tuple[str, BaseException | None]] = []
        weakref.finalize(self, _last_words, self._failures)
        self._swept = False

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Starts to save `state`, a pytree of arrays; it may be donated or overwritten once this returns.

        A step that is there already is saved again: the new one counts from the moment it is whole, and the
        old one is deleted then (a run that went back may reach the same step with another state).

        Args:
          meta: JSON to keep with it (cursor, seed, resolved config).
          metrics: numbers known at this step, from which `best` picks; what is not finite is left out.
          wait: return when the save is complete.

        Raises:
          RunFailed: an earlier save failed, or this one could not be started.
          TypeError, ValueError: `meta` is not JSON, or two leaves share a path.
        """
        self._settle()
        leaves = plain.flatten(state)
        draft = Manifest(
            step=int(step),
            serial=1 + max((saved.serial for saved in self._folder.readable().values()), default=0),
            meta=dict(meta),
            metrics={name: float(x) for name, x in (metrics or {}).items() if math.isfinite(x)},
            arrays={path: (np.shape(leaf), str(plain.dtype(leaf))) for path, leaf in leaves.items()},
        )
        manifest.to_json(draft)  # what is not JSON is an error here, not in the background
        folder = self._folder.at(draft.step, _agreed(lambda: self._folder.edition(draft.step)))
        try:
            if jax.process_index() == 0 and not self._swept:
                self._folder.path.mkdir(parents=True, exist_ok=True)
                self._folder.sweep()
                self._swept = True
            writes = self._writes(folder, draft, leaves)
            # With several processes orbax copies to the host, and writes what is shared before it begins with the rest.
            ours = jax.process_count() == 1 and (len(writes) > 1 or all(map(writing.on_cpu, leaves.values())))
            begun = [write.hold(copied=ours, wait=write.folder != folder) for write in writes]
        except Exception as error:
            orbax_io.release_threads()
            raise RunFailed(_failed(folder, error)) from error
        self._thread = threading.Thread(target=self._complete, args=(writes, begun), name="checkpoint")
        self._thread.start()
        if wait:
            self._settle()

    def check(self) -> None:
        """Raises the error of a save that has failed; never waits, costs nothing: call it every step."""
        if self._failures:
            message, cause = self._failures.pop()
            raise RunFailed(message) from cause

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
          RunFailed: it failed.
        """
        self._settle()

    def close(self) -> None:
        """As `wait`. A process that exits without it loses the save under way, and says so on stderr."""
        self._settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and jax.process_count() > 1:
            return  # the others may know nothing of this error, or be gone: the save under way would wait for them
        try:
            self._settle()
        except RunFailed as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def steps(self) -> list[int]:
        """Every saved step, ascending, damaged ones too.

        Raises:
          UserError: the folder cannot be read (so do all the methods below).
        """
        self._settle()
        return sorted(self._folder.steps())

    def oldest(self) -> int | None:
        """The lowest saved step, without waiting for the save under way; None where nothing was saved."""
        return min(self._folder.steps(), default=None)

    def latest(self) -> int | None:
        """The step saved last (not the highest, where a run went back), unchecked; see `latest_good`."""
        self._settle()
        saved = self._folder.readable()
        return max(saved, key=lambda step: saved[step].serial) if saved else None

    def latest_good(self, warn: Callable[[str], None]) -> int | None:
        """The step saved last of those whose files are as they were written; None if none was saved.

        Reads every byte of what it returns (CRC-32 runs at 1 to 4 GB/s). Each damaged one that is passed over
        is told to `warn` (on process 0); nothing is deleted.

        Raises:
          UserError: all are damaged.
        """
        self._settle()
        found = _agreed(lambda: -1 if (step := self._folder.newest_good(warn)) is None else step)
        if found < 0 and (steps := self._folder.steps()):
            raise UserError(
                f"every checkpoint in {self._folder.path} is damaged (steps {some(sorted(steps))}); "
                "move the folder away to start afresh"
            )
        return None if found < 0 else found

    def best(self) -> int | None:
        """The step whose metric `best` is best, the one saved first of equals; None if none has it."""
        self._settle()
        return self._retention.best_of(self._folder.readable())

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`.

        Raises:
          UserError: no such step, or its manifest is damaged.
        """
        self._settle()
        return self._folder.open(step)[1].meta

    def metrics(self, step: int) -> dict[str, float]:
        """What `save` was given as `metrics`, without what was not finite; raises as `meta`."""
        self._settle()
        return self._folder.open(step)[1].metrics

    def describe(self, step: int) -> list[SavedArray]:
        """(path, shape, dtype, bytes) of every array, without reading them; raises as `meta`."""
        self._settle()
        return self._folder.open(step)[1].leaves()

    def verify(self, step: int) -> list[str]:
        """Reads every byte and says what is wrong, naming each file; empty where all is well.

        Raises:
          UserError: no such step.
        """
        self._settle()
        folder = self._folder.find(step)
        try:
            saved = manifest.read(folder)
        except Damaged as damage:
            return [str(damage)]
        found = self._folder.problems(folder, saved, checksums=True)
        if any(file.crc32 is None for file in self._folder.files(saved).values()):
            found.append("no checksums were written: the sizes are right, the contents are not known to be")
        return found

    def complete(self, step: int) -> None:
        """Reads a checkpoint that was killed between its commit and its checksums, and notes them; else nothing.

        For a run that has just restored it: what it goes on from is then held to every byte by all that come after.
        One that lies behind a link, or may not be written, stays as it is.

        Raises:
          UserError: no such step, or its manifest is damaged.
        """
        self._settle()
        if jax.process_index() != 0 or not self._checksums:
            return
        folder, saved = self._folder.open(step)
        if is_link(folder) or all(file.crc32 is not None for file in saved.files.values()):
            return
        with contextlib.suppress(OSError, RunFailed):
            there = manifest.survey(folder, checksums=True)
            files = {name: there[name] for name in saved.files if name in there}
            if [file.bytes for file in files.values()] == [file.bytes for file in saved.files.values()]:
                manifest.write(folder, dataclasses.replace(saved, files=files))

    def restore(self, step: int, abstract: Any) -> Any:
        """The state saved at `step`, as a tree like `abstract` and placed as its shardings say, on any mesh.

        `abstract` is a pytree of jax.ShapeDtypeStruct (or arrays). A sharding on an abstract mesh means the
        mesh of `jax.set_mesh`; a leaf without sharding is loaded as a numpy array.

        Raises:
          UserError: no such step, a file is missing or truncated, or a path, shape or dtype differs: all are
            named, before anything is loaded.
        """
        self._settle()
        folder, saved = self._folder.open(step)
        wanted = {path: _target(leaf) for path, leaf in plain.flatten(abstract).items()}
        names = [plain.name(path) for path in saved.arrays]
        wrong = [
            f"{name}: {what}{nearest(name, names) if what.startswith('not in') else ''}"
            for name, what in manifest.differences(
                saved, {path: (leaf.shape, str(leaf.dtype)) for path, leaf in wanted.items()}
            )
        ]
        if wrong:
            shown = "\n  ".join(wrong[:12] + [f"... and {len(wrong) - 12} more"] * (len(wrong) > 12))
            raise UserError(f"checkpoint {folder} does not fit this run:\n  {shown}")
        loaded = self._load(folder, saved, wanted)
        return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[path] for path in wanted])

    def load_params(
        self, step: int, prefix: str = "params", sharding: Sharding | None = None, leaves: Collection[str] = ()
    ) -> Any:
        """The arrays under `prefix` as nested dicts, without the mesh or the model that wrote them.

        Numpy arrays, or jax arrays placed by `sharding`. Positions (lists, integer keys) are int keys. With
        `leaves` only the arrays of these names: the rows of tables, without their slots.

        Raises:
          UserError: no such step or prefix, or a file is missing or truncated.
        """
        self._settle()
        folder, saved = self._folder.open(step)
        at = prefix.split("/") if prefix else []
        wanted = {
            path: jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding)
            for path, (shape, dtype) in saved.arrays.items()
            if [str(part) for part in path[: len(at)]] == at and (not leaves or path[-1] in leaves)
        }
        if not wanted:
            tops = sorted({str(path[0]) for path in saved.arrays})
            raise UserError(f"{folder} holds nothing under {prefix!r}{nearest(prefix, tops)} (it holds {some(tops)})")
        loaded = self._load(folder, saved, wanted)
        return plain.nest({path[len(at) :]: leaf for path, leaf in loaded.items()})

    def load_leaves(self, step: int, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
        """Some of the arrays, by the paths that `describe` gives, each placed by its sharding; numpy without one.

        Each process reads what its devices hold.

        Raises:
          UserError: no such step or path, or a file is missing or truncated.
          ValueError: an array has another shape or dtype there.
        """
        self._settle()
        folder, saved = self._folder.open(step)
        paths = {plain.name(path): path for path in saved.arrays}
        if missing := [name for name in leaves if name not in paths]:
            raise UserError(
                f"{folder} holds no {missing[0]}{nearest(missing[0], paths)} (it holds {some(list(paths))})"
            )
        for name, like in leaves.items():
            shape, dtype = saved.arrays[paths[name]]
            if (shape, dtype) != (like.shape, str(np.dtype(like.dtype))):
                raise ValueError(f"{name} is {dtype}{list(shape)} in {folder}, not {like.dtype}{list(like.shape)}")
        found = self._load(folder, saved, {paths[name]: _target(like) for name, like in leaves.items()})
        return {name: found[paths[name]] for name in leaves}

    def _settle(self) -> None:
        """Waits for the save under way and raises its error, on all processes if process 0 had it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if _agreed(lambda: len(self._failures)) and not self._failures:
                self._failures.append(("saving a checkpoint failed on process 0", None))
        self.check()

    def _writes(self, folder: epath.Path, draft: Manifest, leaves: Mapping[plain.Path, Any]) -> list[Write]:
        """The folders to write: shared ones that are not there yet, and last that of the step, which names them."""
        parts = shared_parts.split_shared({path: leaf for path, leaf in leaves.items() if np.size(leaf)}, self._shared)
        own, writes, named = parts.pop("", {}), [], {}
        for entry, part in parts.items():
            digest, shared = fingerprint(part), self._folder.shared
            edition = _agreed(lambda e=entry, d=digest: self._folder.shared.find(e, d))  # type: ignore[misc]
            place = shared.at(entry, digest, abs(edition))
            named[entry] = place.name
            if edition < 0:
                writes.append((place, shared_parts.draft(entry, digest, draft), part))
        writes.append((folder, dataclasses.replace(draft, shared=named), own))
        return [Write(*write, compress=self._compress, checksums=self._checksums) for write in writes]

    def _complete(self, writes: Sequence[Write], begun: Sequence[Callable[[], None]]) -> None:
        """In the background: files and manifest of each folder, what is shared before what names it; then retention."""
        try:
            for write, begin in zip(writes[:-1], begun[:-1], strict=True):
                write.run(begin, None, early=False)
                self._folder.shared.written(write.folder)
            writes[-1].run(begun[-1], self._before_commit, early=True)
            if jax.process_index() == 0:
                self._folder.retire(self._retention)
        except BaseException as error:
            self._swept = False
            orbax_io.release_threads()
            self._failures.append((_failed(writes[-1].folder, error), error))

    def _load(
        self, folder: epath.Path, saved: Manifest, wanted: Mapping[plain.Path, jax.ShapeDtypeStruct]
    ) -> dict[plain.Path, Any]:
        """The wanted leaves; sizes of files are checked first, so that a truncated file has a name."""
        homes: dict[epath.Path, dict[str, jax.ShapeDtypeStruct]] = {}
        for path, leaf in wanted.items():
            if leaf.size:
                homes.setdefault(self._folder.home(folder, saved, path), {})[".".join(map(str, path))] = leaf
        needed = {entry: name for entry, name in saved.shared.items() if folder.parent / name in homes}
        if wrong := self._folder.problems(folder, dataclasses.replace(saved, shared=needed), checksums=False):
            raise UserError(f"checkpoint {folder} is damaged: {some(wrong, 3)}")
        found: dict[str, Any] = {}
        for home, stored in homes.items():
            try:
                found |= read_arrays(home / orbax_io.ITEM, stored)
            except (jax.errors.JaxRuntimeError, MemoryError):
                raise
            except Exception as error:
                raise UserError(f"checkpoint {home} cannot be read: {_brief(error)}") from error
        return {path: found[".".join(map(str, path))] if leaf.size else _empty(leaf) for path, leaf in wanted.items()}


def _agreed(decide: Callable[[], int]) -> int:
    """What process 0 decides, on all processes."""
    if jax.process_count() == 1:
        return decide()
    return int(multihost_utils.broadcast_one_to_all(np.int32(decide() if jax.process_index() == 0 else 0)))


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """What to restore for a leaf of an abstract tree."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return jax.ShapeDtypeStruct(np.shape(leaf), plain.dtype(leaf), sharding=sharding)


def _empty(leaf: jax.ShapeDtypeStruct) -> Any:
    """An array without entries: orbax refuses those, so only the manifest knows of them."""
    zeros = np.zeros(leaf.shape, leaf.dtype)
    return zeros if leaf.sharding is None else jax.device_put(zeros, leaf.sharding)


def _last_words(failures: list[tuple[str, BaseException | None]]) -> None:
    """An error that nobody asked for is at least printed, when the object or the process ends."""
    for message, _ in failures:
        print(f"{message} (Checkpoints.close() was not called)", file=sys.stderr)


def _failed(folder: epath.Path, error: BaseException) -> str:
    return f"saving {folder} failed: {_brief(error)}; the checkpoints before it are untouched"


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__
