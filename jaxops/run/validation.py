"""Evaluation of a run: validation while it trains, early stopping, and what is remembered of both."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxops.core.evaluation import Evaluator
from jaxops.families.rec.config import EarlyStop
from jaxops.run.passes import Passes, Weights
from jaxops.run.progress import Progress
from jaxops.run.task import Task

NO_HISTORY = {"metric": None, "best": None, "best_step": None, "since": 0, "at": 0}
"""What early stopping remembers: the best value so far, evaluations since, and the last step that counted."""


class Measured(NamedTuple):
    """Metrics of a part, `ndcg@10[cold_item]` those of a slice (or of another label); and the task's plots."""

    values: dict[str, float]
    plots: dict[str, np.ndarray]


class Measure:
    """A task's metrics on a mesh; compiled once, at the first batch. Call it inside `jax.set_mesh(mesh)`."""

    def __init__(self, task: Task, mesh: Mesh):
        self._task, self.passes = task, Passes.of(task.config, task.tables, mesh, task.config.evaluate.batch)
        self._evaluator: Evaluator | None = None

    @property
    def fresh(self) -> bool:
        """Whether nothing was evaluated yet: the first call compiles."""
        return self._evaluator is None

    def __call__(self, weights: Weights, part: str, poll: Callable[[], bool] = lambda: False) -> Measured:
        """`valid` or `test` of these weights, settled.

        Raises:
          Interrupted: `poll` said stop.
        """
        params = weights.params
        if self._task.catalogue is not None:
            params = {**params, "catalogue": self.passes.catalogue(weights, self._task.catalogue)}
        passes = self.passes
        batches, reader = passes.planned("queries", self._task.evaluations[part](passes.size))
        if self._evaluator is None:
            self._evaluator = Evaluator(self._task.metrics, passes.mesh, passes.dtype, passes.logical, reader)
        found = self._evaluator(params, batches, poll, weights.tables)
        wanted = dict.fromkeys(self._task.config.evaluate.metrics)
        parts = {name: found[name] for name in found if name.partition("[")[0] in wanted and "[" in name}
        return Measured(
            {name: found[name] for name in wanted} | parts, {name: found[name] for name in self._task.plots}
        )


class Validation:
    """Evaluates a task's parts, and keeps count of evaluations without a better value on validation.

    `history` goes into every checkpoint, so that the count survives an interruption.
    """

    def __init__(
        self,
        task: Task,
        mesh: Mesh,
        progress: Progress,
        phase: Callable[[str], Any],
    ):
        self._task, self._config, self._progress, self._phase = task, task.config, progress, phase
        self._measure = Measure(task, mesh)
        self.history: dict[str, Any] = dict(NO_HISTORY)
        self.values: dict[str, float] = {}
        self.plots: dict[str, Any] = {}
        self.step = -1

    @property
    def on(self) -> bool:
        """Whether there is anything to validate on."""
        return "valid" in self._task.evaluations

    def evaluate(
        self, weights: Weights, part: str, step: int, poll: Callable[[], bool], note: str = ""
    ) -> dict[str, float]:
        """`valid/...` or `test/...` of these weights.

        Raises:
          Interrupted: `poll` said stop.
        """
        if self._measure.fresh:
            self._progress.compiling("evaluate_step")
        with self._within(f"evaluate {part}"):
            found = self._measure(self._measure.passes.settled(weights), part, poll)
        self.plots |= {f"{part}/{name}": plain_lists(values) for name, values in found.plots.items()}
        whole = {name: value for name, value in found.values.items() if "[" not in name}
        self._progress.evaluated(step, part, whole, note)
        return {f"{part}/{name}": value for name, value in found.values.items()}

    @contextlib.contextmanager
    def _within(self, phase: str) -> Iterator[None]:
        before = self._phase(phase)
        yield
        self._phase(before)

    def count(self, step: int, values: Mapping[str, float]) -> str | None:
        """Takes note of an evaluation; the reason to stop, if this one is one too many."""
        self.values, self.step = dict(values), step
        stop, best = self._config.evaluate.stop, self._config.checkpoint.best
        metric = stop.metric if stop else best or self._config.evaluate.metrics[0]
        value, history = values[f"valid/{metric}"], self.history
        if history["metric"] != metric:
            history |= {**NO_HISTORY, "metric": metric}
        if history["best"] is None or value > history["best"]:
            history |= {"best": value, "best_step": step, "since": 0}
        elif step > history["at"]:  # a step that is evaluated again does not count twice
            history["since"] += 1
        history["at"] = step
        return self.spent()

    def spent(self) -> str | None:
        """The reason to stop early, where there is one."""
        stop, history = self._config.evaluate.stop, self.history
        if stop is None or history["metric"] != stop.metric or history["since"] < stop.patience:
            return None
        return stopped(stop)

    def owed(self, step: int) -> bool:
        """Whether the run was interrupted after `step` and before the evaluation that was due there."""
        due = self.on and step % self._config.evaluate.every == 0
        return 0 < step < self._task.steps and due and self.history["at"] < step


def plain_lists(values: np.ndarray) -> Any:
    """Nested lists with null where there is no number, as JSON has them."""
    known = values.astype(object)
    known[np.isnan(values)] = None
    return known.tolist()


def stopped(stop: EarlyStop) -> str:
    """Why a run ended early, in its summary."""
    return f"no better valid/{stop.metric} in {stop.patience} evaluations"
