"""Checkpoints of a run, saved in the background and restored to any mesh; a partial save never counts as one.

A save writes orbax's files first and `jaxops.json` (manifest.py) last, into a new folder (checkpoint_folder.py). A
folder without a manifest is not a checkpoint. An old checkpoint is deleted only after every file of a newer one has
been read back. Entries that hardly ever change are written once and shared (shared_parts.py). Orbax is used through
orbax_io.py only. Tested in tests/core/test_checkpoint*.py, which kill real processes in mid-save.
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
    """The checkpoints in one folder (local, gs:// or s3://); use it as a context manager, or call `close()`.

    Every method but `check` and `oldest` first waits for the save under way, and raises RunFailed if it failed.
    Each error is raised once, at the next call. With several processes all of them must make the same calls;
    process 0 decides, writes the manifests and deletes. The constructor reads and writes nothing.

    Args:
      directory: the folder of the checkpoints; the first save creates it.
      keep: number of most recently saved checkpoints to keep.
      keep_every: also keep steps that are a multiple of this.
      best: also keep the checkpoint that is best by this name of `metrics`.
      best_mode: "max" where a larger metric is better, else "min".
      compress: compress with zstd; the files are little smaller (weights hardly compress) and writing is much slower.
      checksums: read back every save (in the background) and store its CRC-32; otherwise only sizes are stored.
      before_commit: called on process 0 in the background before a save counts (in an object store the logs must not
        be older than the checkpoint); its error fails the save.
      shared: top-level entries of a state that hardly ever change. Each is written once, to a folder that all
        checkpoints with the same values refer to. Every save fingerprints these entries, so that a change is noticed.
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
        """Starts to save `state`, which may be donated or overwritten once this method returns.

        A step that exists already is saved again (a run that went back may reach it with another state). The old
        checkpoint is deleted once the new one is complete.

        Args:
          step: the step to save under.
          state: a pytree of arrays.
          meta: JSON to store with the arrays (cursor, seed, resolved config).
          metrics: numbers known at this step, which `best` compares; numbers that are not finite are left out.
          wait: return only when the save is complete.

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
        manifest.to_json(draft)  # so that a `meta` that is not JSON raises here, not in the background
        folder = self._folder.at(draft.step, _agreed(lambda: self._folder.edition(draft.step)))
        try:
            if jax.process_index() == 0 and not self._swept:
                self._folder.path.mkdir(parents=True, exist_ok=True)
                self._folder.sweep()
                self._swept = True
            writes = self._writes(folder, draft, leaves)
            # With several processes orbax makes the copies, and the shared folders are written before the rest begins.
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
        """Raises the error of a save that has failed; it never waits and is cheap enough for every step."""
        if self._failures:
            message, cause = self._failures.pop()
            raise RunFailed(message) from cause

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
          RunFailed: the save failed.
        """
        self._settle()

    def close(self) -> None:
        """Waits as `wait` does; a process that exits without it loses the save under way and prints its error."""
        self._settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and jax.process_count() > 1:
            return  # other processes may not see this error, or be gone: the save under way would wait for them
        try:
            self._settle()
        except RunFailed as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def steps(self) -> list[int]:
        """Returns every saved step in ascending order, damaged ones too.

        Raises:
          UserError: the folder cannot be read (the same holds for all the methods below).
        """
        self._settle()
        return sorted(self._folder.steps())

    def oldest(self) -> int | None:
        """Returns the lowest saved step without waiting for the save under way; None if nothing was saved."""
        return min(self._folder.steps(), default=None)

    def latest(self) -> int | None:
        """Returns the step saved last (not the highest, if a run went back), unchecked; see `latest_good`."""
        self._settle()
        saved = self._folder.readable()
        return max(saved, key=lambda step: saved[step].serial) if saved else None

    def latest_good(self, warn: Callable[[str], None]) -> int | None:
        """Returns the step saved last among the undamaged checkpoints; None if none was saved.

        It reads every byte of that checkpoint (CRC-32 runs at 1 to 4 GB/s). Each damaged checkpoint that is passed
        over is reported to `warn` (on process 0); nothing is deleted.

        Raises:
          UserError: all checkpoints are damaged.
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
        """Returns the step whose metric `best` is best, the earliest save of equals; None if none has it."""
        self._settle()
        return self._retention.best_of(self._folder.readable())

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the `meta` that `save` was given.

        Raises:
          UserError: the step was not saved, or its manifest is damaged.
        """
        self._settle()
        return self._folder.open(step)[1].meta

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the finite `metrics` that `save` was given; raises as `meta` does."""
        self._settle()
        return self._folder.open(step)[1].metrics

    def describe(self, step: int) -> list[SavedArray]:
        """Returns path, shape, dtype and bytes of every array without reading the arrays; raises as `meta` does."""
        self._settle()
        return self._folder.open(step)[1].leaves()

    def verify(self, step: int) -> list[str]:
        """Reads every byte and returns one line per problem, each naming its file; an empty list means undamaged.

        Raises:
          UserError: the step was not saved.
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
        """Returns the state saved at `step` as a tree like `abstract`, with the shardings of its leaves, on any mesh.

        `abstract` is a pytree of jax.ShapeDtypeStruct (or arrays). A sharding on an abstract mesh is placed on the
        mesh of `jax.set_mesh`; a leaf without a sharding is loaded as a numpy array.

        Raises:
          UserError: the step was not saved, a file is missing or truncated, or a path, shape or dtype differs. The
            message names every difference, and is raised before anything is loaded.
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
        """Returns the arrays under `prefix` as nested dicts; neither the mesh nor the model that wrote them is needed.

        Positions (of lists, or integer keys) become int keys.

        Args:
          step: a saved step.
          prefix: path of the subtree, "" for the whole state.
          sharding: of the jax arrays to return; None returns numpy arrays.
          leaves: only load arrays with these last path parts (the rows of tables without their slots, say).

        Raises:
          UserError: the step or the prefix does not exist, or a file is missing or truncated.
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
        """Returns some of the arrays, keyed by the paths that `describe` gives, each placed by its sharding.

        A leaf without a sharding becomes a numpy array. Each process reads the parts that its devices hold.

        Raises:
          UserError: the step or a path does not exist, or a file is missing or truncated.
          ValueError: a stored array has another shape or dtype.
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
        """Waits for the save under way and raises its error; an error of process 0 is raised on all processes."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if _agreed(lambda: len(self._failures)) and not self._failures:
                self._failures.append(("saving a checkpoint failed on process 0", None))
        self.check()

    def _writes(self, folder: epath.Path, draft: Manifest, leaves: Mapping[plain.Path, Any]) -> list[Write]:
        """Returns the folders to write: shared ones that do not exist yet, then the step's own, which names them."""
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
        """Writes each folder and its manifest in the background, shared folders first; then applies retention."""
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
        """Loads the wanted leaves; file sizes are checked first, so that the error for a truncated file names it."""
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
    """Returns the decision of process 0 on all processes."""
    if jax.process_count() == 1:
        return decide()
    return int(multihost_utils.broadcast_one_to_all(np.int32(decide() if jax.process_index() == 0 else 0)))


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns shape, dtype and concrete sharding to restore for a leaf of an abstract tree."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return jax.ShapeDtypeStruct(np.shape(leaf), plain.dtype(leaf), sharding=sharding)


def _empty(leaf: jax.ShapeDtypeStruct) -> Any:
    """Returns an array without entries; orbax cannot store those, so only the manifest records them."""
    zeros = np.zeros(leaf.shape, leaf.dtype)
    return zeros if leaf.sharding is None else jax.device_put(zeros, leaf.sharding)


def _last_words(failures: list[tuple[str, BaseException | None]]) -> None:
    """Prints the errors that no call has raised, when the object or the process ends."""
    for message, _ in failures:
        print(f"{message} (Checkpoints.close() was not called)", file=sys.stderr)


def _failed(folder: epath.Path, error: BaseException) -> str:
    return f"saving {folder} failed: {_brief(error)}; the checkpoints before it are untouched"


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__
