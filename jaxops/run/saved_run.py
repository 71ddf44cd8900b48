"""A run of any family as its folder holds it: config, frozen transform, and the weights of one checkpoint."""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxops.config.load import Loaded
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.checkpoint_folder import some
from jaxops.core.failures import UserError
from jaxops.core.manifest import SavedArray
from jaxops.core.mesh import make_mesh
from jaxops.core.secret_text import printable
from jaxops.core.sharding import named_leaves
from jaxops.core.state import Params
from jaxops.core.weights import Rename, WeightSource, from_checkpoint
from jaxops.run.checkpoints import open_checkpoints
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.own_code import check_code
from jaxops.run.passes import Passes
from jaxops.run.trust import Trust
from jaxops.run.weights import SERVED_SLOTS, Weights, read_params, read_weights, served_part
from jaxops.tables.spec import TableSpec


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """Everything that a run has stored of its model and that a family needs to serve it.

    Attributes:
      folder: the run folder.
      loaded: its config, of which nothing was imported.
      step: of the checkpoint.
      trust: what its config may have imported.
      accept_code: take other code than the run was trained with.
      left_out: what the config of somebody else's run says of places to write to, which is not followed.
    """

    folder: RunFolder
    loaded: Loaded[Any]
    step: int
    trust: Trust
    accept_code: bool = False
    left_out: tuple[str, ...] = ()

    def check_code(self) -> None:
        """Holds what was imported for this run so far against the code that it was trained with.

        Raises:
          UserError: it has changed, and `accept_code` was not given.
        """
        check_code(self.folder, sorted(self.trust.used), self.accept_code)

    @functools.cached_property
    def weights(self) -> Weights:
        """The weights that are served, as numpy arrays; they are read at first use.

        Raises:
          UserError: a file of the checkpoint is missing or truncated.
        """
        with open_checkpoints(self.config, self.folder.checkpoints) as checkpoints:
            self._require_memory(checkpoints)
            return read_weights(checkpoints, self.step)

    def params_below(self, below: str) -> Params:
        """Reads a part of the parameters that are served, and nothing else: numpy arrays by the rest of their paths.

        Args:
          below: what the paths of the part begin with, such as `policy/`.

        Raises:
          UserError: there is no such part, or a file of the checkpoint is missing or truncated.
        """
        with open_checkpoints(self.config, self.folder.checkpoints) as checkpoints:
            self._require_memory(checkpoints, below)
            return read_params(checkpoints, self.step, below)

    def entries(self) -> int:
        """Returns how many numbers the checkpoint holds, by its manifest.

        Raises:
          UserError: the manifest is damaged.
        """
        with open_checkpoints(self.config, self.folder.checkpoints) as checkpoints:
            return sum(math.prod(leaf.shape) for leaf in checkpoints.describe(self.step))

    def expect(self, shapes: Any, tables: Mapping[str, TableSpec], below: str = "") -> None:
        """Refuses a checkpoint that is not of this model, by its manifest alone.

        Args:
          shapes: the parameters as a tree of abstract arrays.
          tables: the specs of its tables.
          below: what the paths of these parameters begin with in the checkpoint; others are not looked at.

        Raises:
          UserError: a parameter is missing, unknown or of another shape.
        """
        with open_checkpoints(self.config, self.folder.checkpoints) as checkpoints:
            arrays, rows = self._served(checkpoints, below)
        expected = {path: tuple(leaf.shape) for path, leaf in named_leaves(shapes)}
        wrong = [
            f"{below}{path}: {list(arrays[path].shape) if path in arrays else 'nothing'} there, {list(shape)} expected"
            for path, shape in expected.items()
            if path not in arrays or tuple(arrays[path].shape) != shape
        ]
        wrong += [f"{below}{path}: the model has no such parameter" for path in arrays if path not in expected]
        # rows are padded for a mesh, and so is the width of small tables
        most = 2 * sum(spec.rows * spec.dim for spec in tables.values()) + (1 << 16)
        wrong += [
            f"{leaf.path}: {list(leaf.shape)}, more than all tables of the model"
            for leaf in rows
            if math.prod(leaf.shape) > most
        ]
        if wrong:
            raise UserError(f"{self._checkpoint} is not of the model that its config describes: {some(wrong, 4)}")

    def _require_memory(self, checkpoints: Checkpoints, below: str = "") -> None:
        """Refuses a checkpoint whose part `below` is larger than this machine's memory, by its manifest alone.

        Raises:
          UserError: it is.
        """
        arrays, rows = self._served(checkpoints, below)
        wanted, here = sum(leaf.bytes for leaf in [*arrays.values(), *rows]), memory_here()
        if here and wanted > here:
            raise UserError(
                f"{self._checkpoint} asks for {wanted / 2**30:,.1f} GiB of memory, and this machine has"
                f" {here / 2**30:,.1f} GiB"
            )

    def _served(self, checkpoints: Checkpoints, below: str) -> tuple[dict[str, SavedArray], list[SavedArray]]:
        """Returns what the manifest says of the parameters below a prefix, by path, and of the rows of tables."""
        served, leaves = served_part(checkpoints, self.step), checkpoints.describe(self.step)
        inside = lambda prefix: {
            leaf.path.removeprefix(prefix): leaf for leaf in leaves if leaf.path.startswith(prefix)
        }
        rows = [leaf for path, leaf in inside("tables/").items() if path.rpartition("/")[2] in SERVED_SLOTS]
        return inside(f"{served}/{below}") | inside(f"frozen/{below}"), [] if below else rows

    @property
    def _checkpoint(self) -> str:
        return f"checkpoint {self.step} of {self.folder.where}"

    @contextlib.contextmanager
    def source(self, match: str = "", rename: Sequence[Rename] = ()) -> Iterator[WeightSource]:
        """Yields the parameters that are served as a source of weights, from which each device reads its own slices.

        Args:
          match: a regular expression; only parameters whose path contains a match are taken.
          rename: rules from paths of this run to paths of the state to be filled.

        Raises:
          UserError: the manifest of the checkpoint is damaged.
        """
        with open_checkpoints(self.config, self.folder.checkpoints) as checkpoints:
            inside = (served_part(checkpoints, self.step), "frozen")
            yield from_checkpoint(checkpoints, self.step, rename, match, self.folder.where, inside)

    @property
    def config(self) -> Any:
        """The run's frozen config."""
        return self.loaded.config

    def transform(self, name: str) -> np.ndarray:
        """Returns one array of the frozen transform, by name.

        Raises:
          UserError: the file is missing, broken, or not what the run wrote.
        """
        return self.folder.transform(name)

    @property
    def note(self) -> str:
        """A sentence for people on how the run's figures were made."""
        return printable(str(self.folder.about().get("note", "")))

    @functools.cached_property
    def mesh(self) -> Mesh:
        """A mesh over all devices of this machine, all on the data axis."""
        return make_mesh(data=-1)

    def passes(self, specs: Mapping[str, TableSpec], size: int) -> Passes:
        """Returns passes of the model over batches of this size, on the devices of this machine."""
        return Passes.of(self.config, specs, self.mesh, size)

    def placed(self, passes: Passes) -> Weights:
        """Places the weights on the mesh of the passes."""
        with jax.set_mesh(self.mesh):
            return passes.weights(self.weights.params, self.weights.tables)


def memory_here() -> int:
    """Bytes of memory of this machine, 0 where that cannot be found out."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0
