"""The writing of one tree of arrays to a folder: held when the save begins, written in the background, then committed.

The commit is the manifest, which is written when all files are there. Tested in tests/core/test_checkpoint*.py.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxops.core import manifest, orbax_io, plain, stores
from jaxops.core.checksums import Early
from jaxops.core.manifest import Manifest


@dataclasses.dataclass(frozen=True)
class Write:
    """A folder to be written: its arrays, and its manifest without the list of files.

    Attributes:
      folder: the path, which must not exist yet.
      draft: the manifest, without files.
      leaves: the arrays, none of them empty (orbax refuses empty arrays).
      compress: compress with zstd.
      checksums: read back the files and store their CRC-32.
    """

    folder: epath.Path
    draft: Manifest
    leaves: Mapping[plain.Path, Any]
    compress: bool
    checksums: bool

    def hold(self, *, copied: bool, wait: bool = False) -> Callable[[], None]:
        """Secures the current values, and returns a function for the background that writes them.

        Args:
          copied: make copies here (one process only), so that nothing is written before the background begins.
          wait: write everything now. Orbax numbers its saves for the whole process, so two must not be under way.
        """

        def save_async(tree: Any) -> Any:
            return orbax_io.save_async(self.folder, tree, self.leaves.values(), compress=self.compress)

        if copied:
            # On CPU orbax reads the arrays' own memory, and a step that they are donated to would wait until all is
            # written. Copies, dispatched here without waiting for them, avoid that.
            for leaf in self.leaves.values():
                if not on_cpu(leaf):
                    leaf.copy_to_host_async()
            copies = [plain.nest({path: _copy(leaf) for path, leaf in self.leaves.items()}, key=str)]
            return lambda: save_async(copies.pop()).result()  # `pop` frees the copies once they are written
        held = {path: x if isinstance(x, jax.Array) else np.array(x) for path, x in self.leaves.items()}
        begun = save_async(plain.nest(held, key=str))  # on return orbax has copied the arrays to the host
        if wait:
            begun.result()
            return lambda: None
        return begun.result

    def run(self, begin: Callable[[], None], before_commit: Callable[[], None] | None, *, early: bool) -> None:
        """Writes the files and then, on process 0, the manifest; runs in the background.

        Args:
          begin: the function that `hold` returned.
          before_commit: called when the files are written.
          early: commit before the files are read for their checksums, which follow in a second manifest.
        """
        with self._early() as known:
            begin()
        if jax.process_index() != 0:
            return
        if before_commit:
            before_commit()
        if early or not self.checksums:
            files = manifest.survey(self.folder, checksums=False)
            manifest.write(self.folder, dataclasses.replace(self.draft, files=files))
        if self.checksums:
            files = manifest.survey(self.folder, checksums=True, early=known)
            manifest.write(self.folder, dataclasses.replace(self.draft, files=files))

    def _early(self) -> contextlib.AbstractContextManager[Early | None]:
        """Returns a context that computes checksums during the writing, for a local folder with a single writer."""
        if stores.is_url(self.folder) or not self.checksums or jax.process_count() > 1:
            return contextlib.nullcontext()
        parent = pathlib.Path(self.folder.parent)
        return Early(lambda: parent.glob(f"{self.folder.name}.orbax-checkpoint-tmp*"))


def on_cpu(leaf: Any) -> bool:
    """Returns whether an array is in host memory."""
    return not isinstance(leaf, jax.Array) or {d.platform for d in leaf.devices()} == {"cpu"}


def _copy(leaf: Any) -> Any:
    """Returns a copy in host memory that nothing else refers to; of one replica if the array is fully replicated."""
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    if {d.platform for d in leaf.devices()} != {"cpu"}:
        return np.asarray(leaf)
    one = leaf.addressable_data(0) if leaf.is_fully_replicated else leaf
    return jax.device_put(one, one.sharding, may_alias=False)
