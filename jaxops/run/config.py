"""RunConfig: the sections of a config that every family has, with their checks. Each family's config inherits it."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from jaxops.config.short import short_repr
from jaxops.config.types import ByPath, Every, Factory
from jaxops.core import stores
from jaxops.core.failures import UserError
from jaxops.core.home import expand_home
from jaxops.core.mesh import BATCH_AXES, MeshConfig
from jaxops.core.metric import Metric
from jaxops.core.optimizer import AdamW, Optimizer

Positive = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """The size of a step's batch.

    Attributes:
      global_: examples of one step over all devices.
      microbatch: examples that are differentiated at a time; `auto` takes as many as fit into memory.
      pack: whether several short sequences share a row of model.length. One row is then one example. `best_fit` fills
        rows; with true they may stay half empty where most histories are short, but are those of earlier runs.
    """

    global_: Positive = 256
    microbatch: Positive | Literal["auto"] = "auto"
    pack: bool | Literal["best_fit"] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtypes of stored parameters and of the computation; totals, counts and norms are always float32."""

    params: Dtype = "float32"
    compute: Dtype = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Stops the run after `patience` evaluations without a better `metric` on validation."""

    metric: str
    patience: Positive = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluates now and then on validation, and at the end on validation and test with the kept parameters.

    `every` is a number of steps, `1epoch`, `100 or 1epoch` (the shorter of the two, so that small data are evaluated
    too), or `10min` (looked at every run.log_every steps).
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
    """The times of saves, and which checkpoints are kept.

    A run saves at `every`, as in `evaluate`. It keeps the latest `keep`, one every `keep_every` steps, and the best by
    the metric `best` on validation. If the run folder is deleted or moved while the run trains, the next save goes to a
    run folder in `rescue`, a local folder on another disk, and the run ends; without it the run just ends.
    """

    every: Every = Every(seconds=600)
    keep: Positive = 3
    keep_every: Positive | None = None
    best: str | None = None
    rescue: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorBoard:
    """TensorBoard events in the run folder."""

    kind: Literal["tensorboard"] = "tensorboard"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases (`pip install 'jaxops[wandb]'`); a resumed run continues the same W&B run."""

    kind: Literal["wandb"] = "wandb"
    project: str = "jaxops"
    entity: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """A profiler trace of `steps` steps after step `start`, written into the run folder (TensorBoard opens it)."""

    start: Annotated[int, Field(ge=0)] = 10
    steps: Positive = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSection:
    """The run's name and folder, its length (epochs or steps: the one written later holds), its seed and loggers."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("epochs", "steps"),)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] = "run"
    dir: str = "runs"
    epochs: Positive | None = None
    steps: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    log_every: Positive = 50
    loggers: tuple[TensorBoard | Wandb | Annotated[ByPath, Factory(leading=0)], ...] = (TensorBoard(),)
    profile: Profile | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """Starts a run from the parameters of another run.

    Attributes:
      run: the other run's folder.
      match: a regular expression; only parameters whose path matches are taken.
      step: the step of the checkpoint. The default is the best one that the run keeps, else its latest.
    """

    run: str
    match: str = ".*"
    step: Positive | None = None

    def problems(self) -> list[tuple[str, str]]:
        """Returns (dotted path, message) where the pattern is not a regular expression."""
        try:
            re.compile(self.match)
        except re.error as error:
            return [("match", f"{self.match!r} is not a regular expression: {error}")]
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spike:
    """The definition of a leap of the loss: `zscore` standard deviations above the last `windows` windows.

    A window is run.log_every steps.
    """

    zscore: Annotated[float, Field(gt=0)] = 8.0
    windows: Annotated[int, Field(ge=2)] = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollback:
    """Recovery of a run: it goes back to its last good checkpoint and skips the bad batch, at most `most` times.

    A non-finite step triggers it under `nonfinite: rollback`. A leap of the loss triggers it where `spike` is given.
    """

    most: Positive = 3
    spike: Spike | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharding:
    """Sharding rules of the user.

    Attributes:
      rules: (pattern of parameter paths, mesh axis of each dimension), tried before the model's own.
      logical: mesh axes by logical name, for activations.
    """

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
"""Dotted paths that a resumed run may change, with everything below them. Any other change makes it another run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The config of a run of any family.

    A family's config adds its own sections (data, model, objective). They are written before these. Its `repr` shows
    what differs from the defaults.
    """

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
    size_of_batch: ClassVar[str] = "batch.global"
    """The path of the field that says how many examples a step has, for messages."""
    always_shown: ClassVar[tuple[str, ...]] = ("task",)

    def __init_subclass__(cls) -> None:
        """Gives a family's config the short repr too: its dataclass decorator would write one of every field."""
        super().__init_subclass__()
        if "__repr__" not in vars(cls):
            cls.__repr__ = short_repr  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return short_repr(self)

    def metric(self, name: str) -> Metric:
        """Returns the metric of this name.

        Raises:
          UserError: the family has no such metric; the message names the nearest right one.
        """
        return Metric(name)

    def metrics(self) -> dict[str, Metric]:
        """Returns the metrics of `evaluate.metrics` by name, in their order."""
        return {name: self.metric(name) for name in self.evaluate.metrics}

    def problems(self) -> list[tuple[str, str]]:
        """Returns (dotted path, message) of everything that cannot work on any machine."""
        found = []
        if (rescue := self.checkpoint.rescue) is not None and stores.is_url(rescue):
            found.append(("checkpoint.rescue", f"expected a local folder, got {rescue}"))
        places = {"run.dir": self.run.dir, **({"init_from.run": self.init_from.run} if self.init_from else {})}
        places |= {"checkpoint.rescue": rescue} if rescue else {}
        for name, place in places.items():
            try:
                _ = stores.parse_url(place) if stores.is_url(place) else expand_home(place)
            except UserError as error:
                found.append((name, str(error)))
        if rescue is not None and _same_place(rescue, self.run.dir):
            found.append(("checkpoint.rescue", f"is run.dir ({self.run.dir}) itself: name a folder on another disk"))
        if (self.run.epochs is None) == (self.run.steps is None):
            found.append(("run", "say how long: exactly one of run.epochs and run.steps"))
        found += self.microbatch_problems()
        found += self.mesh_problems(dataclasses.asdict(self.mesh))
        return found + self._metric_problems()

    def microbatch_problems(self) -> list[tuple[str, str]]:
        """Returns (dotted path, message) where the size of a microbatch does not divide what an update reads."""
        batch = self.batch
        if isinstance(batch.microbatch, int) and batch.global_ % batch.microbatch:
            return [("batch.microbatch", f"{batch.microbatch} does not divide batch.global {batch.global_}")]
        return []

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
        """Returns (dotted path, message) of everything that cannot work on a mesh of these sizes.

        An axis of -1 counts as 1 here; it is checked again once the devices are known.
        """
        found = []
        shards = math.prod(max(sizes[axis], 1) for axis in BATCH_AXES)
        for path, value in ((self.size_of_batch, self.batch.global_), ("batch.microbatch", self.batch.microbatch)):
            if isinstance(value, int) and value % shards:
                found.append((path, f"{value} is no multiple of the mesh's batch shards (at least {shards})"))
        return found


def _same_place(one: str, other: str) -> bool:
    """Returns whether two paths name one folder; a home folder that does not exist is reported elsewhere."""
    try:
        return not stores.is_url(other) and os.path.abspath(expand_home(one)) == os.path.abspath(expand_home(other))
    except UserError:
        return False


def common_sections() -> tuple[str, ...]:
    """Returns the names of RunConfig's fields without `task`, in the order in which they are written."""
    return tuple(field.name for field in dataclasses.fields(RunConfig) if field.name != "task")
