"""Evaluation of a run: validation while it trains, early stopping, and what is remembered of both."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxops.core.evaluation import Evaluator, evaluated_params, on_batches
from jaxops.core.mesh import batch_sharding, batch_shards, serialise_dispatch
from jaxops.core.rows import local_batches
from jaxops.core.state import Params, State
from jaxops.tables.tables import EmbeddingTables
from jaxops.tasks.config import EarlyStop
from jaxops.tasks.progress import Progress
from jaxops.tasks.task import Catalogue, EvalBatches, Task

NO_HISTORY = {"metric": None, "best": None, "best_step": None, "since": 0, "at": 0}
"""What early stopping remembers: the best value so far, evaluations since, and the last step that counted."""


class Weights(NamedTuple):
    """What is evaluated of a state: its parameters (the moving average where there is one), and rows by table."""

    params: Params
    tables: dict[str, dict[str, Array]]

    @staticmethod
    def of(state: State) -> "Weights":
        """Those of a state of training."""
        tables = {name: {"rows": table["rows"]} for name, table in state.tables.items()}
        return Weights(evaluated_params(state), tables)


class Measure:
    """A task's metrics on a mesh; compiled once, at the first batch. Call it inside `jax.set_mesh(mesh)`."""

    def __init__(self, task: Task, mesh: Mesh, tables: EmbeddingTables | None):
        self._task, self._mesh, self._tables = task, mesh, tables
        self._dtype = jnp.dtype(task.config.precision.compute)
        shards = batch_shards(mesh)
        self._size = -(-task.config.evaluate.batch // shards) * shards
        self._readers: dict[str, EmbeddingTables] = {}
        self._evaluator: Evaluator | None = None
        self._vectors: Callable[..., Array] | None = None

    @property
    def fresh(self) -> bool:
        """Whether nothing was evaluated yet: the first call compiles."""
        return self._evaluator is None

    def __call__(self, weights: Weights, part: str, poll: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """All that the task measures of `valid` or `test`.

        Raises:
          Interrupted: `poll` said stop.
        """
        params = weights.params
        if self._task.catalogue is not None:
            params = {**params, "catalogue": self._catalogue(weights, self._task.catalogue)}
        batches, reader = self._planned("queries", self._task.evaluations[part](self._size))
        if self._evaluator is None:
            self._evaluator = Evaluator(self._task.metrics, self._mesh, self._dtype, self._task.logical, reader)
        return self._evaluator(params, batches, poll, weights.tables)

    def _planned(self, kind: str, batches: EvalBatches) -> tuple[Iterator[Mapping[str, Any]], EmbeddingTables | None]:
        """The batches with plans, and the tables that can read them; one plan's shapes for all of a kind."""
        if self._tables is None:
            return local_batches(batches, self._mesh, self._size), None
        if kind not in self._readers:
            self._readers[kind] = self._tables.reading(next(iter(batches)))
        reader = self._readers[kind]
        return local_batches(batches, self._mesh, self._size, reader.plan), reader

    def _catalogue(self, weights: Weights, catalogue: Catalogue) -> Array:
        batches, reader = self._planned("catalogue", catalogue.batches(self._size))
        if self._vectors is None:
            run = on_batches(catalogue.vectors, self._mesh, P(), self._dtype, self._task.logical, reader)
            self._vectors = jax.jit(run, in_shardings=(None, None, batch_sharding(self._mesh)))
        parts = []
        for batch in batches:
            parts.append(self._vectors(weights.params, weights.tables, batch))
            if serialise_dispatch(self._mesh):
                jax.block_until_ready(parts[-1])
        return jnp.concatenate(parts)[: catalogue.rows]


class Validation:
    """Evaluates a task's parts, and keeps count of evaluations without a better value on validation.

    `history` goes into every checkpoint, so that the count survives an interruption.
    """

    def __init__(
        self,
        task: Task,
        mesh: Mesh,
        tables: EmbeddingTables | None,
        progress: Progress,
        phase: Callable[[str], Any],
    ):
        self._task, self._config, self._progress, self._phase = task, task.config, progress, phase
        self._measure = Measure(task, mesh, tables)
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
            found = self._measure(weights, part, poll)
        values = {name: found[name] for name in self._config.evaluate.metrics}
        self.plots |= {f"{part}/{name}": plain_lists(found[name]) for name in self._task.plots}
        self._progress.evaluated(step, part, values, note)
        return {f"{part}/{name}": value for name, value in values.items()}

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
