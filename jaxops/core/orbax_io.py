"""The interface to orbax: it writes a tree of arrays to a folder in the background. read_arrays.py reads them again.

This is the only module that imports orbax, and it does so on first use. All uses of orbax's private modules, where
there is no public way, are here too. Tested in tests/core/test_checkpoint.py and test_stores.py.
"""

import contextlib
import functools
import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxops.core import plain, stores

ITEM = "state"
"""Where orbax's tree lies in a checkpoint; `orbax.checkpoint.v1.load(folder)` reads it without jaxops."""
FILES = frozenset({"_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt"})
"""What orbax writes beside it."""
_CHUNK, _FILE = 32 << 20, 128 << 20
"""Bytes of the chunks that arrays are cut into, and of the files that hold the chunks."""


def save_async(folder: epath.Path, tree: Any, leaves: Iterable[Any], *, compress: bool) -> Any:
    """Begins to write `tree`; `.result()` of the returned object waits for the end and raises the errors.

    Args:
      folder: the folder to write, which must not exist yet.
      tree: nested dicts of arrays.
      leaves: the arrays of `tree`.
      compress: compress with zstd.
    """
    with options(folder, leaves, compress=compress):
        return _orbax().save_async(folder, tree, checkpointable_name=ITEM)


def release_threads() -> None:
    """Ends the threads of orbax that, after a failed save, wait for minutes for a part of it that never comes.

    They are no daemons: the process would stay, and hold its devices, long after it has said what went wrong.
    Orbax has no call for that. No save may be under way; several processes end by themselves (distributed.leave).
    Tested in tests/core/test_checkpoint.py.
    """
    if jax.process_count() > 1:
        return
    from orbax.checkpoint._src.futures import future

    # What they would have done is dropped, and Python says so of each, around the one message that matters.
    warnings.filterwarnings("ignore", message=r"coroutine '.*' was never awaited", category=RuntimeWarning)
    waiting: list[Any] = list(threading.enumerate())
    for thread in waiting:
        if type(thread).__name__ == "_SignalingThread":
            with contextlib.suppress(Exception):  # of another version: it ends in its own time
                thread._cancelled = True
                future.set_signals(thread._receive_signals, operation_id=thread._operation_id)


def options(folder: epath.Path, leaves: Iterable[Any], *, compress: bool) -> Any:
    """Returns orbax's options for saving these leaves."""
    ocp, remote = _orbax(), stores.is_url(folder)
    context = ocp.Context()
    context.array.saving.use_compression = compress
    # Splitting replicas spreads the writing over processes; within one it only costs a compilation.
    context.array.saving.use_replica_parallel = jax.process_count() > 1
    if jax.process_count() == 1 and not remote:
        # Small chunks and files are written, synced and read in parallel. Orbax cuts evenly or not at all, and into
        # single rows where the number of rows is prime: such an array stays whole.
        def cut(_: Any, leaf: Any) -> Any:
            return context.array.saving.StorageOptions(chunk_byte_size=_CHUNK if _cuts(leaf, _CHUNK) else None)

        context.array.saving.scoped_storage_options_creator = cut
        context.array.saving.ocdbt_target_data_file_size = _FILE if all(_cuts(x, _FILE) for x in leaves) else 0
    context.memory.deepcopy_host_arrays = False
    if remote:  # a rename would copy every object, and the manifest is the commit anyway
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
        if os.fspath(folder).startswith("s3://"):
            _teach_s3()
    return context


def _cuts(leaf: Any, size: int) -> bool:
    """Returns whether orbax would write `leaf` whole, or cut it into pieces not far below `size` bytes."""
    from orbax.checkpoint._src.arrays import subchunking

    shape, dtype = np.shape(leaf), np.dtype(plain.dtype(leaf))
    if isinstance(leaf, jax.Array):
        shape = leaf.sharding.shard_shape(shape)
    if math.prod(shape) * dtype.itemsize <= size:
        return True
    return math.prod(subchunking.choose_chunk_shape(shape, shape, dtype, size)) * dtype.itemsize >= size // 8


@functools.cache
def _orbax() -> Any:
    """Imports orbax v1 on first use (0.7 s) and drops its log messages: this package raises errors itself."""
    from orbax.checkpoint import v1

    logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    # After a failed save, its other pending operations find orbax's event loop closed. Each would print a traceback
    # from a C++ thread around the one message that matters.
    show = sys.unraisablehook
    sys.unraisablehook = lambda one: None if str(one.exc_value) == "Event loop is closed" else show(one)
    return v1


@functools.cache
def _teach_s3() -> None:
    """Patches orbax to pass s3:// paths on to tensorstore, which supports them, as it does with gs:// paths.

    Orbax has no hook for that (google/orbax issues 359 and 872, pull request 2739), and takes s3:// for a local
    path. All its specs come from the one function that is patched. Tested in tests/core/test_stores.py.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils

    build = tensorstore_utils.build_kvstore_tspec

    @functools.wraps(build)
    def build_for_any_store(directory: str, *args: Any, **options: Any) -> Any:
        if not directory.startswith("s3://"):
            return build(directory, *args, **options)
        s3 = stores.kvstore_spec(stores.parse_url(directory))

        def swapped(node: Any) -> Any:
            if isinstance(node, list):
                return [swapped(one) for one in node]
            if not isinstance(node, dict):
                return node
            if str(node.get("driver")).startswith("gcs"):
                return {**s3, "path": node["path"]}
            return {name: swapped(one) for name, one in node.items()}

        return swapped(build("gs" + directory.removeprefix("s3"), *args, **options))

    tensorstore_utils.build_kvstore_tspec = build_for_any_store
