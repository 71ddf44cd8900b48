"""A task: data, model, objective and evaluation as values that a family hands to the run."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jaxops.config.types import Every
from jaxops.core.accumulate import Objective
from jaxops.core.alarms import AlarmRules
from jaxops.core.journal import Journal
from jaxops.core.metric import Metric
from jaxops.core.sharding import Axes, Rule
from jaxops.core.state import Params, State
from jaxops.core.step import Extra, Step, TrainStep
from jaxops.core.weights import WeightSource
from jaxops.data.protocol import Source
from jaxops.run.config import RunConfig
from jaxops.run.weights import Weights
from jaxops.tables.spec import TableSpec

EvalBatches = Iterable[Mapping[str, np.ndarray]]
Poll = Callable[[], bool]
"""A function that long work calls in between; it returns true when the run is to stop."""


class Model(Protocol):
    """All that a run needs of a model.

    Attributes:
      rules: sharding rules of its parameters.
      shapes: the shapes and dtypes of its parameters.
      padding: by parameter, the part of it that is padding, for `jaxops shardings`.
    """

    rules: list[Rule]
    shapes: PyTree
    padding: dict[str, str]

    def init(self, key: Array) -> Params: ...


@dataclasses.dataclass(frozen=True)
class Measured:
    """The outcome of one evaluation of one part.

    Attributes:
      values: metrics by name; `ndcg@10[cold_item]` is a metric of one slice (or of another label).
      plots: arrays by name, for the summary and the report.
      samples: samples that the model wrote, one mapping of plain values each, for `samples.jsonl`.
    """

    values: dict[str, float]
    plots: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()


class CarriedRows(NamedTuple):
    """The counts of a table's rows after a warm start: taken from the other run, new here, and gone since."""

    taken: int
    new: int
    gone: int


CarryRows = Callable[[PyTree, Mapping[str, TableSpec], Any, str], tuple[PyTree, dict[str, CarriedRows]]]
"""Given the tables' state, its specs, a SavedRun and a pattern of `tables/NAME`: the state with the rows of that run
that have an id here, and by table how many those are."""
Evaluate = Callable[[Weights, str, int, Poll], Measured]
"""Evaluates weights on a part (`valid` or `test`) at a step; raises `core.evaluation.Interrupted` when polled true."""


class Evaluation(Protocol):
    """The way a task is evaluated.

    `run/batched.py` evaluates batches on the mesh. A family may have an evaluation of its own, with host work and text.
    """

    @property
    def parts(self) -> Collection[str]:
        """The parts that can be evaluated, out of `valid` and `test`."""
        ...

    def on(self, task: "Task", mesh: Mesh) -> Evaluate:
        """Returns the function that evaluates the task on this mesh; it is called inside `jax.set_mesh(mesh)`."""
        ...


@dataclasses.dataclass(frozen=True)
class NoEvaluation:
    """The evaluation of a task that has none."""

    parts: tuple[str, ...] = ()

    def on(self, task: "Task", mesh: Mesh) -> Evaluate:
        """Raises an AssertionError: it is never called, as there are no parts."""
        raise AssertionError("a task without evaluation was evaluated")


@dataclasses.dataclass
class StepParts:
    """The parts that a task with a step of its own builds it from.

    Attributes:
      update: the built TrainStep of the task's objective.
      fresh: makes the fresh state.
      mesh: the mesh of update and state.
      folder: the run folder, as a path or URL.
      journal: the answers of the host in this run (core/journal.py). The run opens it before the first step. So a step
        keeps `parts` and reads `parts.journal` when it is called.
    """

    update: TrainStep
    fresh: Callable[[], State]
    mesh: Mesh
    folder: Path | str
    journal: Journal = dataclasses.field(init=False)


@dataclasses.dataclass(frozen=True)
class About:
    """The description of a task for people, in the console and in reports; plain values, kept in the run folder.

    Attributes:
      labels: names for people, by the name of a model or baseline.
      model: the model's name for people.
      headline: the metric that a run is judged by, where its config chooses none.
      data: rows of (name, value) about the data.
      histogram: {"title", "label", "edges", "counts"} of some lengths, or nothing.
      curves: pairs of metrics of the evaluations, (across, up), that a report draws against each other.
      note: the way the figures were made, in a few words for a heading.
      notes: the same in whole sentences, for the report.
    """

    model: str = "model"
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    headline: str = ""
    data: Sequence[tuple[str, str]] = ()
    histogram: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    curves: Sequence[tuple[str, str]] = ()
    note: str = ""
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything that a run is made of, except machines, folders and time.

    Attributes:
      config: the family's frozen config.
      resolved: the same config as plain values.
      model: the model, with its fresh parameters and their shapes.
      objective: (params, batch, key) -> Sums.
      source: the training examples.
      rules: sharding rules of the parameters, the config's before the model's.
      logical: mesh axes by logical activation name; they override the defaults.
      loss_weights: weights of the terms named `loss/...`.
      evaluation: the parts of the evaluation and how they are measured.
      block: the number of neighbouring examples that an objective couples, which microbatching never splits.
      tables: specs of the embedding tables that batches read from.
      extras: further entries of the state, beside the moving average.
      frozen: patterns of parameters that are not trained, beside `optimizer.frozen`.
      reads: patterns of the frozen parameters that the objective reads (default: all). The update does not take the
        others as arguments.
      dtypes: (pattern, dtype) of parameters that are stored in another dtype than `precision.params`.
      start: returns the sources that a fresh state takes its weights from, renamed to its parameters (core/weights.py).
      copies: by the beginning of a path, the beginning of the path whose parameter it equals before the first step
        ({"reference/": ""}: a reference that begins as the policy does, whatever weights that takes).
      carry_rows: takes rows of tables over from another run, for `init_from`.
      row_ids: by path of a parameter that has a row for each id, the array of `transform` that holds those ids, of rows
        1, 2, ...; `init_from` gives such rows to the same ids.
      step: makes the step that the loop drives from the built TrainStep; default: that itself. A step of several
        programs advances `state.step` itself (core/turn.py).
      update_batch: given a number of examples, a batch as the objective's update reads it, where that is not the
        source's own (a policy's update reads rollouts, its source has prompts).
      baselines: {"most_popular": {"valid/hr@10": ...}}, computed when asked.
      inspection: what the data is, for `data.json`; its `split.sha256` tells other data apart.
      transform: what serving needs that is not a parameter (original ids), as named arrays.
      about: what people read of it.
      undefined: by part and metric, why the data leaves it undefined, whatever the model is.
      alarms: the rules that watch the run's metrics; None watches none.
      notices: lines that are said before training begins.
      models: the beginnings of the paths of models that lie in one state (`policy/`), whose memory is told apart.
    """

    config: Any
    resolved: dict[str, Any]
    model: Model
    objective: Objective
    source: Source
    rules: list[Rule]
    logical: Mapping[str, Axes] = dataclasses.field(default_factory=dict)
    loss_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    evaluation: Evaluation = NoEvaluation()
    block: int = 1
    tables: Mapping[str, TableSpec] = dataclasses.field(default_factory=dict)
    extras: Mapping[str, Extra] = dataclasses.field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    reads: tuple[str, ...] | None = None
    dtypes: Sequence[tuple[str, str]] = ()
    start: Callable[[], Sequence[WeightSource]] | None = None
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    carry_rows: CarryRows | None = None
    row_ids: Mapping[str, str] = dataclasses.field(default_factory=dict)
    step: Callable[[StepParts], Step] | None = None
    update_batch: Callable[[int], Mapping[str, Any]] | None = None
    baselines: Callable[[], dict[str, dict[str, float]]] | None = None
    inspection: dict[str, Any] = dataclasses.field(default_factory=dict)
    transform: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    about: About = About()
    undefined: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    alarms: AlarmRules | None = None
    notices: Sequence[str] = ()
    models: Sequence[str] = ()

    @property
    def steps(self) -> int:
        """The length of the run in steps: `run.steps`, or the steps that `run.epochs` take."""
        run, size = self.config.run, self.config.batch.global_
        return run.steps if run.steps is not None else -(-run.epochs * self.source.examples // size)

    def steps_between(self, every: Every) -> int | None:
        """Returns the number of steps that `every` stands for; None where it is a time by the clock."""
        return every.in_steps(self.source.examples / self.config.batch.global_)

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics that the config asks for, by name."""
        return self.config.metrics()


def of_config(config: RunConfig, resolved: dict[str, Any], model: Model) -> dict[str, Any]:
    """Returns the fields of a Task that follow from the common sections of a config."""
    return {
        "config": config,
        "resolved": resolved,
        "model": model,
        "rules": [(pattern, axes) for pattern, axes in config.sharding.rules] + model.rules,
        "logical": config.sharding.logical,
        "loss_weights": config.loss_weights,
    }
