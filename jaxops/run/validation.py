"""The evaluation of a run: validation while it trains, early stopping, and the history that both need."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxops.core import distributed
from jaxops.core.failures import UserError
from jaxops.run.config import EarlyStop
from jaxops.run.progress import Progress
from jaxops.run.task import Evaluate, Task
from jaxops.run.weights import Weights

NO_HISTORY = {"metric": None, "best": None, "best_step": None, "since": 0, "at": 0}
"""The empty history of early stopping: metric, best value and its step, evaluations since, and last step counted."""


class Validation:
    """Evaluates a task's parts, and counts the evaluations without a better value on validation.

    `history` goes into every checkpoint, so that the count survives an interruption.

    Args:
      task: the task to evaluate.
      mesh: the mesh to evaluate on.
      progress: the console.
      phase: reports the phase that the run is in and returns the one before.
    """

    def __init__(
        self,
        task: Task,
        mesh: Mesh,
        progress: Progress,
        phase: Callable[[str], Any],
    ):
        self._task, self._config, self._progress, self._phase = task, task.config, progress, phase
        self._mesh = mesh
        self._evaluate: Evaluate | None = None
        self.history: dict[str, Any] = dict(NO_HISTORY)
        self.values: dict[str, float] = {}
        self.plots: dict[str, Any] = {}
        self.samples: list[dict[str, Any]] = []
        self.step, self._at = -1, time.monotonic()

    @property
    def on(self) -> bool:
        """True where the task has a validation part."""
        return "valid" in self._task.evaluation.parts

    def evaluate(
        self, weights: Weights, part: str, step: int, poll: Callable[[], bool], note: str = ""
    ) -> dict[str, float]:
        """Returns the metrics of these weights on one part, named `valid/...` or `test/...`.

        Args:
          weights: the weights, placed on the mesh.
          part: `valid` or `test`.
          step: the step of the weights, for the console.
          poll: returns true when the evaluation is to stop.
          note: some words for the console.

        Raises:
          Interrupted: `poll` said stop.
        """
        if self._evaluate is None:
            self._progress.compiling("evaluate_step")
            self._evaluate = self._task.evaluation.on(self._task, self._mesh)
        with self._within(f"evaluate {part}"):
            found = self._evaluate(weights, part, step, poll)
        self.plots |= {f"{part}/{name}": plain_lists(values) for name, values in found.plots.items()}
        self.samples = [{"part": part, **sample} for sample in found.samples]
        whole = {name: value for name, value in found.values.items() if "[" not in name}
        self._progress.evaluated(step, part, whole, note)
        return {f"{part}/{name}": value for name, value in found.values.items()}

    @contextlib.contextmanager
    def _within(self, phase: str) -> Iterator[None]:
        before = self._phase(phase)
        yield
        self._phase(before)

    @property
    def every(self) -> int:
        """The number of steps between two calls of `due`."""
        return self._task.steps_between(self._config.evaluate.every) or self._config.run.log_every

    def due(self) -> bool:
        """Returns true where an evaluation is due, asked every `every` steps.

        Where the config gives a time between evaluations, the clock of process 0 decides for all processes.
        """
        limit = self._config.evaluate.every.seconds
        if limit is None:
            return True
        return bool(distributed.run_on_primary("evaluate", lambda: time.monotonic() - self._at >= limit))

    def record(self, step: int, values: Mapping[str, float]) -> str | None:
        """Takes note of an evaluation; returns the reason to stop early, None where there is none."""
        self.values, self.step, self._at = dict(values), step, time.monotonic()
        stop, best = self._config.evaluate.stop, self._config.checkpoint.best
        metric = stop.metric if stop else best or next(iter(self._config.evaluate.metrics), None)
        history = self.history
        if history["metric"] != metric:
            history |= {**NO_HISTORY, "metric": metric}
        value = values.get(f"valid/{metric}", math.nan)
        if metric is not None and self._config.metric(metric).improves(value, history["best"]):
            history |= {"best": value, "best_step": step, "since": 0}
        elif step > history["at"]:  # a step that is evaluated again does not count twice
            history["since"] += 1
        history["at"] = step
        return self.stop_reason()

    def stop_reason(self) -> str | None:
        """Returns the reason to stop early, or None."""
        stop, history = self._config.evaluate.stop, self.history
        if stop is None or history["metric"] != stop.metric or history["since"] < stop.patience:
            return None
        return stop_reason(stop)

    def missed_evaluation(self, step: int) -> bool:
        """True where the run was interrupted after `step` and before the evaluation that was due there."""
        steps = self._task.steps_between(self._config.evaluate.every)
        due = self.on and steps is not None and step % steps == 0
        return 0 < step < self._task.steps and due and self.history["at"] < step


def undefined_metrics(task: Task) -> list[str]:
    """Returns a line for each metric of the config that the data leave undefined, with the reason."""
    wanted, by_part = task.config.evaluate.metrics, task.undefined.items()
    return [
        f"{part}/{metric} is undefined: {why[metric]}" for part, why in by_part for metric in wanted if metric in why
    ]


def undefined_notices(task: Task) -> list[str]:
    """Returns the lines of `undefined_metrics`, and one more where `checkpoint.best` names such a metric.

    Raises:
      UserError: `evaluate.stop` names such a metric. It never improves, so it would stop any run.
    """
    found = undefined_metrics(task)
    missing, stop, best = task.undefined.get("valid", {}), task.config.evaluate.stop, task.config.checkpoint.best
    usable = [name for name, metric in task.metrics.items() if metric.chooses and name not in missing]
    instead = f"take {' or '.join(usable)}" if usable else "none of evaluate.metrics is defined there"
    if stop is not None and stop.metric in missing:
        raise UserError(
            f"evaluate.stop.metric: {stop.metric} is undefined on validation ({missing[stop.metric]}): nothing can be"
            f" stopped by it; {instead}, or set evaluate.stop=null"
        )
    if best is not None and best in missing:
        found.append(
            f"checkpoint.best: {best} is undefined on validation, so no checkpoint is the best by it and the latest is"
            f" evaluated and served; {instead}"
        )
    return found


def plain_lists(values: np.ndarray) -> Any:
    """Converts an array to nested lists for JSON, with None in place of NaN."""
    known = values.astype(object)
    known[np.isnan(values)] = None
    return known.tolist()


def stop_reason(stop: EarlyStop) -> str:
    """Returns the text by which a summary says that a run was stopped early."""
    return f"no better valid/{stop.metric} in {stop.patience} evaluations"


def short_epochs(task: Task) -> list[str]:
    """Returns a line where a batch is larger than an epoch: the run then has fewer steps than epochs."""
    size, examples = task.config.batch.global_, task.source.examples
    if size <= examples or task.config.run.epochs is None:
        return []
    return [
        f"batch.global: {size} examples, but an epoch has {examples:,}, so {task.config.run.epochs} epochs are"
        f" {task.steps} steps: a smaller batch makes more"
    ]
