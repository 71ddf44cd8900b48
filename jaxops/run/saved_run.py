"""A run out of its folder, whatever its family: config, frozen transform, and the weights of one checkpoint."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxops.config.load import Loaded
from jaxops.core.mesh import make_mesh
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.passes import Passes
from jaxops.run.weights import Weights
from jaxops.tables.spec import TableSpec


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """What a run has left of its model: everything that a family needs to serve it.

    Attributes:
      folder: the run folder.
      loaded: its config, of which nothing was imported.
      step: of the checkpoint.
      weights: what is served, as numpy arrays.
    """

    folder: RunFolder
    loaded: Loaded[Any]
    step: int
    weights: Weights

    @property
    def config(self) -> Any:
        """The run's frozen config."""
        return self.loaded.config

    def transform(self, name: str) -> np.ndarray:
        """One array of the frozen transform.

        Raises:
          UserError: the file is missing or broken.
        """
        return self.folder.transform(name)

    @property
    def note(self) -> str:
        """How the run's figures were made, for people."""
        return str(self.folder.about().get("note", ""))

    @functools.cached_property
    def mesh(self) -> Mesh:
        """A mesh of all devices that are here."""
        return make_mesh(data=-1)

    def passes(self, specs: Mapping[str, TableSpec], size: int) -> Passes:
        """Passes of the model over batches of this size, on the devices that are here."""
        return Passes.of(self.config, specs, self.mesh, size)

    def placed(self, passes: Passes) -> Weights:
        """The weights on the mesh of the passes."""
        with jax.set_mesh(self.mesh):
            return passes.weights(self.weights.params, self.weights.tables)
