"""The last save of a run whose folder was deleted or moved: elsewhere, where the config names a place for it.

Without one the run stops at the first line or save that it cannot write. With one it goes on to the next save, which
makes a run folder with one checkpoint there. Tested in tests/run/test_rescue.py.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from jaxops.core import distributed
from jaxops.core.failures import RunFailed, UserError
from jaxops.core.state import State
from jaxops.run.checkpoints import open_checkpoints
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.saving import Position, Saving
from jaxops.run.summary import about_of
from jaxops.run.task import Task

PATIENCE = 2.0
"""Seconds without a change after which a folder that lost some of its files is taken to keep the rest."""
LONGEST = 300.0
"""Seconds after which nobody waits any longer for a folder to be gone."""


class Rescue:
    """The place of `checkpoint.rescue` for one run in `folder`, if the config names one.

    Args:
      task: the task that runs.
      mesh: the mesh of its state.
      folder: the folder of the run.
      warn: it is told that the folder is gone, once.
    """

    def __init__(self, task: Task, mesh: Mesh, folder: RunFolder, warn: Callable[[str], None]):
        self._task, self._mesh, self._folder, self._warn = task, mesh, folder, warn
        root = task.config.checkpoint.rescue
        self._place = None if root is None else RunFolder(os.path.join(root, task.config.run.name))
        self._told = False

    def require_free(self) -> None:
        """Refuses a place that holds something already, before the run begins.

        Raises:
          UserError: there is a folder of the run's name.
        """
        if self._place is not None and os.path.lexists(self._place.path):
            raise UserError(
                f"checkpoint.rescue: {self._place.where} is there already: a run whose folder is lost would make it."
                " Move it away, go on in it (run.dir), or set another place"
            )

    @contextlib.contextmanager
    def tolerated(self) -> Iterator[None]:
        """A context for records of the run: their errors pass by where the folder is gone and there is a rescue."""
        try:
            yield
        except RunFailed:
            if self._place is None or (gone := self._gone_soon()) is None:
                raise
            if not self._told:
                self._warn(f"{gone}: the run goes on to its next save, which goes to {self._place.where}")
            self._told = True

    def require_folder(
        self,
        at: Position,
        metrics: Mapping[str, float] | None,
        fresh: Callable[[], State],
        history: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Checks before a save that the run folder is there; all processes call it.

        Args:
          at: the state, which is saved elsewhere if the folder is gone.
          metrics: what `Saving.save` takes with it.
          fresh: as `Saving` takes it.
          history: as `Saving` takes it.

        Raises:
          RunFailed: the folder is gone; the message says where the state was saved, if it was.
        """
        if self._place is None:
            if distributed.is_primary() and (gone := self._gone()):
                raise RunFailed(
                    f"{gone}: what is saved from here on could not be found again, so the run stops"
                    " (checkpoint.rescue names a place for a last save)"
                )
            return
        gone = distributed.run_on_primary("look for the run folder", self._gone_or_going)
        if gone is None:
            return
        place = self._place
        try:
            distributed.run_on_primary("make the rescue folder", self._make)
            with open_checkpoints(self._task.config, place.checkpoints) as checkpoints:
                Saving(self._task, self._mesh, checkpoints, fresh, history).save(at, metrics, wait=True)
        except RunFailed as error:
            raise RunFailed(f"{gone}; it could not be saved elsewhere either: {error}", shared=True) from error
        root = place.path.parent
        raise RunFailed(
            f"{gone}. Step {at.step} was saved in {place.where}: the same command with run.dir={root} and"
            " checkpoint.rescue=null goes on from there; the lines and checkpoints before it are lost",
            shared=True,
        )

    def _make(self) -> None:
        assert self._place is not None
        self._place.create(self._task.resolved, self._task.transform, self._task.inspection)
        self._place.write_about(about_of(self._task))

    def _gone_or_going(self) -> str | None:
        """Says that the folder is gone, or is being deleted: a checkpoint saved there would go with the rest."""
        return self._gone() if self._folder.metrics.exists() else self._gone_soon()

    def _gone_soon(self) -> str | None:
        """Says that the folder is gone, after waiting for a deletion under way, which takes files one by one."""
        began = changed = time.monotonic()
        left = self._left()
        while (gone := self._gone()) is None and time.monotonic() - changed < PATIENCE:
            if time.monotonic() - began > LONGEST:
                break
            time.sleep(PATIENCE / 40)
            if (now := self._left()) < left:
                left, changed = now, time.monotonic()
        return gone

    def _left(self) -> int:
        """Returns the number of files in the folder."""
        return sum(len(files) for _, _, files in os.walk(self._folder.path))

    def _gone(self) -> str | None:
        if self._folder.is_there():
            return None
        return (
            f"run folder {self._folder.path} was deleted or moved while the run was training (its config.yaml is gone)"
        )
