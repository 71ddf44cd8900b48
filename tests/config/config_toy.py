"""A schema with one of everything that the engine reads: what the tests of jaxops.config stand on."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxops.config.types import ByPath, Duration, Every, Factory

FIVE_SECONDS, THOUSAND_STEPS, TEN_MINUTES = Duration(5.0), Every(steps=1000), Every(seconds=600.0)
Positive = Annotated[int, Field(gt=0)]


@dataclasses.dataclass(frozen=True)
class SasRec:
    kind: Literal["sasrec"] = "sasrec"
    dim: Positive = 64
    heads: int = 2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.dim % self.heads:
            yield "heads", f"dim {self.dim} is not divisible by {self.heads} heads"


@dataclasses.dataclass(frozen=True)
class Hstu:
    kind: Literal["hstu"] = "hstu"
    layers: int = 4
    dim: int = 256


@dataclasses.dataclass(frozen=True)
class AdamW:
    kind: Literal["adamw"] = "adamw"
    lr: float = 1e-3
    clip: Annotated[float, Field(gt=0)] | None = None
    betas: tuple[float, float] = (0.9, 0.999)


@dataclasses.dataclass(frozen=True)
class Sgd:
    kind: Literal["sgd", "momentum"] = "sgd"
    lr: float = 0.1


@dataclasses.dataclass(frozen=True)
class Softmax:
    kind: Literal["softmax"] = "softmax"
    negatives: int | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    global_: Positive = 128
    microbatch: Positive | Literal["auto"] = "auto"


@dataclasses.dataclass(frozen=True)
class Reward:
    fn: ByPath
    weight: float = 1.0
    timeout: Duration = FIVE_SECONDS


@dataclasses.dataclass(frozen=True)
class Run:
    run: str
    clip: float = 0.0


@dataclasses.dataclass(frozen=True)
class Table:
    rows: int | Literal["auto"]
    dim: int = 8


@dataclasses.dataclass(frozen=True)
class Evaluate:
    every: Every = THOUSAND_STEPS
    metrics: Annotated[tuple[str | ByPath, ...], Field(min_length=1)] = ("ndcg@10",)
    stop: Literal["never", "early"] = "never"


@dataclasses.dataclass(frozen=True)
class TensorBoard:
    kind: Literal["tensorboard"] = "tensorboard"


@dataclasses.dataclass(frozen=True)
class Wandb:
    project: str
    kind: Literal["wandb"] = "wandb"
    offline: bool = False


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: Every = TEN_MINUTES
    keep: int = 3


@dataclasses.dataclass(frozen=True)
class Toy:
    path: str
    task: Literal["toy"] = "toy"
    model: SasRec | Hstu = SasRec()
    optimizer: AdamW | Sgd = AdamW(lr=2e-3)
    objective: Annotated[Softmax | ByPath, Factory(leading=1, note="a factory fn(model, ...)")] = Softmax()
    batch: Batch = Batch()
    tables: dict[str, Table] = dataclasses.field(default_factory=dict)
    rewards: tuple[Reward | Run, ...] = ()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    loggers: tuple[TensorBoard | Wandb, ...] = (TensorBoard(),)
    name: str | None = None
    seed: int = 1
    lambda_: float = 0.95
    folder: Path = Path("runs")
    since: str = ""
    verbose: bool = False
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def problems(self) -> Iterator[tuple[str, str]]:
        if isinstance(self.batch.microbatch, int) and self.batch.global_ % self.batch.microbatch:
            yield "batch.global_", f"{self.batch.global_} is not a multiple of batch.microbatch"


@dataclasses.dataclass(frozen=True)
class Other:
    """A second task; it has no `task` field of its own."""

    steps: int = 10
