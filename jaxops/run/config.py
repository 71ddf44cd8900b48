"""RunConfig: the sections of a config that every family has, with their checks; a family's own config inherits it."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from jaxops.config.types import ByPath, Every, Factory
from jaxops.core import stores
from jaxops.core.failures import UserError
from jaxops.core.mesh import BATCH_AXES, MeshConfig
from jaxops.core.metric import Metric
from jaxops.core.optimizer import AdamW, Optimizer

Positive = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples a step over all devices; `microbatch` examples at a time (auto: as many as fit).

    With `pack` several short sequences share a row of model.length, and a row is an example.
    """

    global_: Positive = 256
    microbatch: Positive | Literal["auto"] = "auto"
    pack: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Dtype of the stored parameters and of the computation; totals, counts and norms are float32."""

    params: Dtype = "float32"
    compute: Dtype = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Stop after `patience` evaluations without a better `metric` on validation."""

    metric: str
    patience: Positive = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluates now and then on validation, and at the end on validation and test with the kept parameters.

    `every` is a number of steps, `1epoch`, or `10min` (looked at every run.log_every steps).
    `slices` are parts of the data that have the same metrics too; `baselines` are computed where the family has any.
    """

    every: Every = Every(steps=500)
    metrics: tuple[str, ...] = ()
    slices: tuple[str, ...] = ()
    batch: Positive = 512
    baselines: bool = True
    stop: EarlyStop | None = None

    def __post_init__(self) -> None:
        if isinstance(self.every, int):  # from Python, where a number of steps is a number
            object.__setattr__(self, "every", Every(steps=self.every))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save and what to keep: the latest `keep`, every `keep_every` steps, the best by `best` on validation.

    `every` is as in `evaluate`.
    """

    every: Every = Every(seconds=600)
    keep: Positive = 3
    keep_every: Positive | None = None
    best: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorBoard:
    """TensorBoard events in the run folder."""

    kind: Literal["tensorboard"] = "tensorboard"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases (`pip install 'jaxops[wandb]'`); a resumed run goes on in the same W&B run."""

    kind: Literal["wandb"] = "wandb"
    project: str = "jaxops"
    entity: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """A profiler trace of `steps` steps after step `start`, in the run folder (TensorBoard opens it)."""

    start: Annotated[int, Field(ge=0)] = 10
    steps: Positive = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSection:
    """The run's name and folder, its length (epochs or steps: the one written later holds), its seed and loggers."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("epochs", "steps"),)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    dir: str = "runs"
    epochs: Positive | None = None
    steps: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    log_every: Positive = 50
    loggers: tuple[TensorBoard | Wandb | Annotated[ByPath, Factory(leading=0)], ...] = (TensorBoard(),)
    profile: Profile | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """Start from the parameters of another run: those whose path matches; its best checkpoint, else its latest."""

    run: str
    match: str = ".*"
    step: Positive | None = None

    def problems(self) -> list[tuple[str, str]]:
        """A pattern that is none (dotted path, message)."""
        try:
            re.compile(self.match)
        except re.error as error:
            return [("match", f"{self.match!r} is not a regular expression: {error}")]
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spike:
    """The loss of a window of run.log_every steps, `zscore` standard deviations above the `windows` before it."""

    zscore: Annotated[float, Field(gt=0)] = 8.0
    windows: Annotated[int, Field(ge=2)] = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollback:
    """Back to the last good checkpoint and past the bad batch, `most` times in a run.

    What sets it off: a non-finite step where `nonfinite: rollback`, and a leap of the loss where `spike` is given.
    """

    most: Positive = 3
    spike: Spike | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharding:
    """Rules tried before the model's own ([pattern, [axis of each dimension]]), and logical activation names."""

    rules: tuple[tuple[str, tuple[str | tuple[str, ...] | None, ...]], ...] = ()
    logical: Mapping[str, str | tuple[str, ...] | None] = dataclasses.field(default_factory=dict)


MAY_CHANGE_ON_RESUME = (
    "mesh",
    "run.steps",
    "run.epochs",
    "run.log_every",
    "run.loggers",
    "run.profile",
    "run.dir",
    "data.cache",
    "evaluate.every",
    "evaluate.batch",
    "evaluate.baselines",
    "evaluate.stop",
    "evaluate.slices",
    "checkpoint",
    "batch.microbatch",
    "nonfinite",
    "rollback",
    "sharding",
)
"""Dotted paths (and all below them) that a resumed run may change; anything else makes it another run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run of any family; a family's config adds its own sections (data, model, objective), written first."""

    task: str
    loss_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    optimizer: Optimizer = AdamW()
    batch: Batch = Batch()
    mesh: MeshConfig = MeshConfig(data=-1)
    precision: Precision = Precision()
    sharding: Sharding = Sharding()
    nonfinite: Literal["raise", "skip", "rollback"] = "raise"
    rollback: Rollback = Rollback()
    init_from: InitFrom | None = None
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    run: RunSection = RunSection()

    may_change_on_resume: ClassVar[tuple[str, ...]] = MAY_CHANGE_ON_RESUME

    def metric(self, name: str) -> Metric:
        """The metric of this name.

        Raises:
          UserError: the family has no such metric; the message names the nearest right one.
        """
        return Metric(name)

    def metrics(self) -> dict[str, Metric]:
        """The metrics of `evaluate.metrics` by name, in their order."""
        return {name: self.metric(name) for name in self.evaluate.metrics}

    def problems(self) -> list[tuple[str, str]]:
        """Everything that does not go together, whatever the machine (dotted path, message)."""
        found = []
        batch = self.batch
        if "://" in self.run.dir:
            try:
                stores.parse_url(self.run.dir)
            except UserError as error:
                found.append(("run.dir", str(error)))
        if (self.run.epochs is None) == (self.run.steps is None):
            found.append(("run", "say how long: exactly one of run.epochs and run.steps"))
        if isinstance(batch.microbatch, int) and batch.global_ % batch.microbatch:
            found.append(("batch.microbatch", f"{batch.microbatch} does not divide batch.global {batch.global_}"))
        found += self.mesh_problems(dataclasses.asdict(self.mesh))
        return found + self._metric_problems()

    def _metric_problems(self) -> list[tuple[str, str]]:
        found = []
        known: dict[str, Metric] = {}
        for index, name in enumerate(self.evaluate.metrics):
            try:
                known[name] = self.metric(name)
            except UserError as error:
                found.append((f"evaluate.metrics.{index}", str(error)))
        stop = self.evaluate.stop
        judges = [("checkpoint.best", self.checkpoint.best), ("evaluate.stop.metric", stop.metric if stop else None)]
        for path, judge in judges:
            if judge is None:
                continue
            if judge not in self.evaluate.metrics:
                found.append((path, f"{judge!r} is not in evaluate.metrics ({', '.join(self.evaluate.metrics)})"))
            elif judge in known and not known[judge].chooses:
                usable = ", ".join(other for other, metric in known.items() if metric.chooses) or "none of them"
                found.append((path, f"{judge!r} has no better direction: it cannot choose (of those named: {usable})"))
        return found

    def mesh_problems(self, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
        """Everything that does not go on a mesh of these sizes; an axis of -1 is judged once the devices are known."""
        found = []
        shards = math.prod(max(sizes[axis], 1) for axis in BATCH_AXES)
        for path, value in (("batch.global", self.batch.global_), ("batch.microbatch", self.batch.microbatch)):
            if isinstance(value, int) and value % shards:
                found.append((path, f"{value} is no multiple of the mesh's batch shards (at least {shards})"))
        return found


def common_sections() -> tuple[str, ...]:
    """The names of RunConfig's fields without `task`, in the order in which they are written."""
    return tuple(field.name for field in dataclasses.fields(RunConfig) if field.name != "task")
