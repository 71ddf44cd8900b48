"""A run of any family as its folder holds it: config, frozen transform, and the weights of one checkpoint."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxops.config.load import Loaded
from jaxops.core.mesh import make_mesh
from jaxops.core.weights import Rename, WeightSource, from_checkpoint
from jaxops.run.checkpoints import open_checkpoints
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.passes import Passes
from jaxops.run.weights import Weights, read_weights, served_part
from jaxops.tables.spec import TableSpec


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """Everything that a run has stored of its model and that a family needs to serve it.

    Attributes:
      folder: the run folder.
      loaded: its config; nothing that it names by import path was imported.
      step: the step of the checkpoint.
    """

    folder: RunFolder
    loaded: Loaded[Any]
    step: int

    @functools.cached_property
    def weights(self) -> Weights:
        """The weights that are served, as numpy arrays; they are read at first use.

        Raises:
          UserError: a file of the checkpoint is missing or truncated.
        """
        with open_checkpoints(self.config, self.folder.checkpoints) as checkpoints:
            return read_weights(checkpoints, self.step)

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
          UserError: the file is missing or broken.
        """
        return self.folder.transform(name)

    @property
    def note(self) -> str:
        """A few words for people that say how the run's figures were made."""
        return str(self.folder.about().get("note", ""))

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
