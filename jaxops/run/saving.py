"""The saves of a run: when they are due, what is stored beside the state, and how the run resumes from them."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxops.core import distributed
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import UserError
from jaxops.core.state import State, updates_from_step, without_updates
from jaxops.run.task import Task
from jaxops.run.training import abstract
from jaxops.run.weights import Weights, placed_like, read_weights

FORMAT = 1
"""The version of the metadata in a checkpoint."""


class Position(NamedTuple):
    """The point that a run continues from: the state, its step, and the cursor of the next example."""

    state: State
    step: int
    cursor: int


class Saving:
    """Saves and restores the checkpoints of one run.

    Args:
      task: the task that runs.
      mesh: the mesh of the state.
      checkpoints: the checkpoints of the run folder.
      fresh: makes the fresh state, whose structure a restore takes.
      history: returns what else a checkpoint stores for the run; `restore` returns it again.
    """

    def __init__(
        self,
        task: Task,
        mesh: Mesh,
        checkpoints: Checkpoints,
        fresh: Callable[[], State],
        history: Callable[[], Mapping[str, Any]],
    ):
        self._task, self._config, self._mesh = task, task.config, mesh
        self._checkpoints, self._fresh, self._history = checkpoints, fresh, history
        self._at = time.monotonic()
        self.last = -1
        self._scored = False

    @property
    def every(self) -> int:
        """Steps between two looks at whether a save is due."""
        return self._task.steps_between(self._config.checkpoint.every) or self._config.run.log_every

    def due(self) -> bool:
        """Returns whether a save is due. Where the config counts seconds, the clock of process 0 decides for all."""
        limit = self._config.checkpoint.every.seconds
        if limit is None:
            return True
        return bool(distributed.run_on_primary("save", lambda: time.monotonic() - self._at >= limit))

    def save(
        self, at: Position, metrics: Mapping[str, float] | None, *, wait: bool = False, again: bool = False
    ) -> None:
        """Saves the state, unless this step is saved already.

        A step that was saved before its evaluation is saved again, so that retention of the best sees its metrics.

        Args:
          at: the state with its step and cursor.
          metrics: the metrics of this very step, if it was evaluated.
          wait: true to return after the save is complete.
          again: true to save even if this step is saved already.
        """
        self._at = time.monotonic()
        scored = self._config.checkpoint.best is not None and metrics is not None and not self._scored
        if at.step != self.last or scored or again:
            meta = {
                "format": FORMAT,
                "cursor": at.cursor,
                "seed": self._config.run.seed,
                "config": self._task.resolved,
                "history": dict(self._history()),
            }
            self._checkpoints.save(at.step, at.state, meta, metrics)
            self.last, self._scored = at.step, metrics is not None
        if wait:
            self._checkpoints.wait()

    def check(self) -> None:
        """Raises the error of a save that failed, without waiting for a save under way."""
        self._checkpoints.check()

    def restore(self, warn: Callable[[str], None]) -> tuple[Position, Mapping[str, Any]] | None:
        """Restores the newest good checkpoint and returns it with its history; None where nothing was saved yet.

        Raises:
          UserError: every checkpoint is damaged, or the newest good one was not saved by a run.
        """
        latest = self._checkpoints.latest_good(warn)
        if latest is None:
            return None
        cursor, history = _position(self._checkpoints.meta(latest), latest)
        wanted = abstract(self._fresh, self._mesh)
        if any(leaf.path == "updates" for leaf in self._checkpoints.describe(latest)):
            state = self._checkpoints.restore(latest, wanted)
        else:  # saved before updates were counted apart from steps
            state = updates_from_step(self._checkpoints.restore(latest, without_updates(wanted)))
        self._checkpoints.complete(latest)
        self.last, self._scored = latest, bool(self._checkpoints.metrics(latest))
        return Position(state, latest, cursor), history

    def oldest(self) -> int | None:
        """Returns the oldest step that is saved, or None; it does not wait for a save under way."""
        return self._checkpoints.oldest()

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the metrics that were saved with a step."""
        return self._checkpoints.metrics(step)

    def best(self) -> int | None:
        """Returns the best step on validation, or None where the config keeps no best."""
        return self._checkpoints.best() if self._config.checkpoint.best else None

    def weights_of(self, step: int, like: Weights) -> Weights:
        """Returns the weights of a checkpoint that evaluation reads, sharded as `like` is."""
        return placed_like(read_weights(self._checkpoints, step), like)


def _position(meta: Mapping[str, Any], step: int) -> tuple[int, Mapping[str, Any]]:
    """Returns the cursor and the history of a checkpoint, which `Saving.save` stored in its metadata."""
    cursor, history = meta.get("cursor"), meta.get("history")
    if not isinstance(cursor, int) or cursor < 0 or not isinstance(history, Mapping):
        raise UserError(
            f"checkpoint {step} does not say where its run goes on (no cursor or history in its metadata): it was not"
            " saved by a run, and cannot be resumed; init_from takes its parameters over"
        )
    return cursor, history
