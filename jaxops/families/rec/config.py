"""RunConfig: one frozen dataclass a task family, and the checks that need more than one section."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from jaxops.config.types import ByPath, Every, Factory
from jaxops.core import stores
from jaxops.core.failures import UserError
from jaxops.core.mesh import BATCH_AXES, MeshConfig
from jaxops.core.optimizer import AdamW, Optimizer
from jaxops.data.clicks.spec import ClickDataConfig, ClicksFile, Criteo, MovieLensClicks
from jaxops.data.interactions.spec import InteractionsConfig
from jaxops.evaluate.clicks import NOT_BY_SIZE, parse_click_metric
from jaxops.evaluate.ranking import parse_metric
from jaxops.families.rec.tables_config import TableConfig
from jaxops.models.dcn import DCNv2Config
from jaxops.models.dlrm import DLRMConfig
from jaxops.models.linear import LinearConfig
from jaxops.models.sasrec import SASRecConfig
from jaxops.models.two_tower import TwoTowerConfig

Positive = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax:
    """Cross-entropy over the whole catalogue."""

    kind: Literal["softmax"] = "softmax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledSoftmax:
    """Softmax against uniform negatives that the step shares, with sampling correction."""

    kind: Literal["sampled_softmax"] = "sampled_softmax"
    negatives: Positive = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bce:
    """Binary cross-entropy with negatives drawn per position (SASRec as published)."""

    kind: Literal["bce"] = "bce"
    negatives: Positive = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gbce:
    """Generalised BCE (gSASRec), calibrated by `t` in [0, 1]."""

    kind: Literal["gbce"] = "gbce"
    negatives: Positive = 256
    t: Annotated[float, Field(ge=0, le=1)] = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class InBatchSoftmax:
    """Two-tower retrieval: each example's item against those of its `block` of neighbours.

    `block: null` is the whole batch, over all devices; it cannot be cut into microbatches.

    `logq` takes off log of how often an item comes up, estimated on the way with counts that fade by `decay` a step.
    """

    kind: Literal["in_batch_softmax"] = "in_batch_softmax"
    temperature: Annotated[float, Field(gt=0)] = 0.05
    logq: bool = True
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    block: Annotated[int, Field(ge=2)] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clicks:
    """Binary cross-entropy of each label that the data has; several are weighted by `loss_weights`."""

    kind: Literal["clicks"] = "clicks"


RecObjective = Softmax | SampledSoftmax | Bce | Gbce | InBatchSoftmax | Clicks | Annotated[ByPath, Factory(leading=1)]
RecDataConfig = InteractionsConfig | ClickDataConfig
RecModel = SASRecConfig | TwoTowerConfig | DLRMConfig | DCNv2Config | LinearConfig
CLICK_MODELS = (DLRMConfig, DCNv2Config, LinearConfig)


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

    metric: str = "ndcg@10"
    patience: Positive = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Every `every` steps on validation; at the end on validation and test, with the best checkpoint if one is kept.

    `slices`: the same metrics of cold_user, warm_user, cold_item, warm_item (what training never saw, or did) and of
    each value of a column of users, items or clicks.
    """

    every: Positive = 500
    metrics: tuple[str, ...] = ("hr@10", "ndcg@10", "mrr@10")
    slices: tuple[str, ...] = ()
    batch: Positive = 512
    baselines: bool = True
    stop: EarlyStop | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save and what to keep: the latest `keep`, every `keep_every` steps, the best by `best` on validation."""

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
class Run:
    """The run's name and folder, its length (epochs or steps), its seed, and where metrics go."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecConfig:
    """A recommender run."""

    task: Literal["rec"] = "rec"
    data: RecDataConfig | Annotated[ByPath, Factory(leading=0)]
    model: RecModel = SASRecConfig()
    tables: Mapping[str, TableConfig] = dataclasses.field(default_factory=dict)
    objective: RecObjective = Softmax()
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
    run: Run = Run()

    def problems(self) -> list[tuple[str, str]]:
        """What does not go together, whatever the machine (dotted path, message)."""
        found = []
        batch = self.batch
        if "://" in self.run.dir:
            try:
                stores.parse(self.run.dir)
            except UserError as error:
                found.append(("run.dir", str(error)))
        if (self.run.epochs is None) == (self.run.steps is None):
            found.append(("run", "say how long: exactly one of run.epochs and run.steps"))
        if isinstance(batch.microbatch, int) and batch.global_ % batch.microbatch:
            found.append(("batch.microbatch", f"{batch.microbatch} does not divide batch.global {batch.global_}"))
        found += self.mesh_problems(dataclasses.asdict(self.mesh))
        found += family_problems(self)
        for path, name in (
            ("checkpoint.best", self.checkpoint.best),
            ("evaluate.stop.metric", self.evaluate.stop.metric if self.evaluate.stop else None),
        ):
            if name is not None and name not in self.evaluate.metrics:
                found.append((path, f"{name!r} is not in evaluate.metrics ({', '.join(self.evaluate.metrics)})"))
        return found

    def mesh_problems(self, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
        """What does not go on a mesh of these sizes; an axis of -1 is judged once the devices are known."""
        found = []
        shards = math.prod(max(sizes[axis], 1) for axis in BATCH_AXES)
        for path, value in (("batch.global", self.batch.global_), ("batch.microbatch", self.batch.microbatch)):
            if isinstance(value, int) and value % shards:
                found.append((path, f"{value} is no multiple of the mesh's batch shards (at least {shards})"))
        heads = self.model.heads if isinstance(self.model, SASRecConfig) else 0
        if sizes["tensor"] > 1 and heads % sizes["tensor"]:
            found.append(("mesh.tensor", f"{sizes['tensor']} does not divide model.heads {heads}"))
        if sizes["sequence"] > 1:
            found.append(("mesh.sequence", f"{self.model.kind} has no sequence parallelism: leave it at 1"))
        return found


def family_problems(config: RecConfig) -> list[tuple[str, str]]:
    """Whether model, objective, data, tables and metrics belong together (dotted path, message)."""
    found = []
    model, objective, data = config.model, config.objective, config.data
    clicks = isinstance(data, ClicksFile | Criteo | MovieLensClicks)
    parse = parse_click_metric if isinstance(model, CLICK_MODELS) else parse_metric
    for index, metric in enumerate(config.evaluate.metrics):
        try:
            parse(metric)
        except UserError as error:
            found.append((f"evaluate.metrics.{index}", str(error)))
    if isinstance(model, CLICK_MODELS):
        if not isinstance(objective, Clicks | ByPath):
            found.append(
                ("objective", f"{model.kind} predicts clicks: expected {{kind: clicks}}, got {objective.kind}")
            )
        if not clicks:
            found.append(
                ("data", f"{model.kind} learns from clicks: expected kind clicks, criteo or movielens_100k_clicks")
            )
        worse = [name for name in _judged(config) if name in NOT_BY_SIZE]
        found += [("evaluate", f"{name!r} is not better when larger: stop and keep by auc or gauc") for name in worse]
        return found
    if isinstance(data, ClicksFile | Criteo | MovieLensClicks):
        found.append(("data", f"{model.kind} learns from interactions: {data.kind} is for dlrm, dcnv2 and linear"))
    if isinstance(model, TwoTowerConfig):
        if not isinstance(objective, InBatchSoftmax | ByPath):
            found.append(("objective", f"two_tower: expected {{kind: in_batch_softmax}}, got {objective.kind}"))
        if isinstance(objective, InBatchSoftmax) and objective.block and config.batch.global_ % objective.block:
            found.append(("objective.block", f"{objective.block} does not divide batch.global {config.batch.global_}"))
        if not model.user or not model.item:
            found.append(("model", "two_tower: name the features of both towers, `user: [...]` and `item: [...]`"))
    elif model.inputs:
        if not isinstance(objective, SampledSoftmax | ByPath):
            found.append(("objective", f"sasrec on tables: expected {{kind: sampled_softmax}}, got {objective.kind}"))
        for name in model.inputs:
            for table, one in config.tables.items():
                if name in (one.features or (table,)) and one.pool != "mean":
                    found.append((f"tables.{table}.pool", "sasrec takes the mean of a bag: sum is for other models"))
                if name in (one.features or (table,)) and one.dim != model.dim:
                    found.append(
                        (
                            f"tables.{table}.dim",
                            f"{one.dim}: model.inputs are added up, so all are model.dim {model.dim}",
                        )
                    )
    elif config.tables:
        found.append(("tables", "sasrec reads no table unless model.inputs names them (the items' first)"))
    if isinstance(model, SASRecConfig) and isinstance(objective, InBatchSoftmax | Clicks):
        found.append(("objective", f"sasrec: expected softmax, sampled_softmax, bce or gbce, got {objective.kind}"))
    return found


def _judged(config: RecConfig) -> set[str]:
    stop = config.evaluate.stop
    return {name for name in (config.checkpoint.best, stop.metric if stop else None) if name}


SCHEMAS: Mapping[str, type] = {"rec": RecConfig}
"""The schema of each `task`."""

MAY_CHANGE_ON_RESUME = (
    "mesh",
    "run.steps",
    "run.epochs",
    "run.log_every",
    "run.loggers",
    "run.profile",
    "run.dir",
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
