"""A run out of its folder, whatever its family: config, frozen transform, and the weights of one checkpoint."""

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
from jaxops.core.secret_text import printable
from jaxops.core.weights import Rename, WeightSource, from_checkpoint
from jaxops.run.checkpoints import open_checkpoints
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.own_code import check_code
from jaxops.run.passes import Passes
from jaxops.run.trust import Trust
from jaxops.run.weights import Weights, read_weights, served_part
from jaxops.tables.spec import TableSpec


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """What a run has left of its model: everything that a family needs to serve it.

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
        """What is served, as numpy arrays; read when it is first asked for.

        Raises:
          UserError: a file of the checkpoint is missing or truncated.
        """
        with open_checkpoints(self.config, self.folder.checkpoints) as checkpoints:
            return read_weights(checkpoints, self.step)

    @contextlib.contextmanager
    def source(self, match: str = "", rename: Sequence[Rename] = ()) -> Iterator[WeightSource]:
        """The parameters that are served, as a source of weights: each device reads its own slices.

        Args:
          match: only paths are taken in which this pattern is found.
          rename: rules from paths here to paths of what is to be filled.

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
        """One array of the frozen transform.

        Raises:
          UserError: the file is missing or broken.
        """
        return self.folder.transform(name)

    @property
    def note(self) -> str:
        """How the run's figures were made, for people."""
        return printable(str(self.folder.about().get("note", "")))

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
