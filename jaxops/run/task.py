"""A task: what a family hands to the loop: data, model, objective and evaluation, as values without behaviour."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, PyTree

from jaxops.core.accumulate import Objective
from jaxops.core.sharding import Axes, Rule
from jaxops.core.state import Params
from jaxops.core.step import Extra
from jaxops.core.sums import Sums
from jaxops.data.protocol import Source
from jaxops.tables.spec import TableSpec

EvalBatches = Iterable[Mapping[str, np.ndarray]]


class Model(Protocol):
    """What a task needs of a model: fresh parameters, their shapes, and where they may lie."""

    rules: list[Rule]
    shapes: PyTree
    padding: dict[str, str]
    """By parameter: what of it is padding, for `jaxops shardings`."""

    def init(self, key: Array) -> Params: ...


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Vectors of all items, made by a pass over them; who scores finds them as `params["catalogue"]` [rows, dim].

    Attributes:
      batches: given a size, the items' features by row 0, 1, ... (what is beyond `rows` in the last is dropped).
      vectors: (params, batch) -> [batch, dim].
    """

    rows: int
    batches: Callable[[int], EvalBatches]
    vectors: Callable[[Params, Mapping[str, Any]], Array]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """A model whose scores are products of a user's vector with those of the items: what evaluation and serving ask.

    Attributes:
      length: how many of the latest items a query holds, `items` [batch, length].
      queries: (params, batch) -> [batch, dim].
      items: params -> [rows, dim]; row i is item i, 1 <= i <= n_items.
      columns: features of a batch: the entry whose rows they are read by, and their codes by row.
      context: columns of events that a query brings along, by name the entry whose rows they are read by: `id`, the
        circumstances that are asked in, or `events`, those of each event of the history.
    """

    model: Any
    n_items: int
    length: int
    queries: Callable[[Params, Mapping[str, Any]], Array]
    items: Callable[[Params], Array]
    columns: Mapping[str, tuple[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    context: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tables: Mapping[str, TableSpec] = dataclasses.field(default_factory=dict)
    catalogue: Catalogue | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything that a run is made of but machines, folders and time.

    Attributes:
      config: the family's frozen config; `resolved` is the same as plain values.
      evaluations: for `valid` and `test`, given a batch size, the batches (all of that size).
      metrics: (params, batch) -> Sums of one evaluation batch.
      block: examples that an objective couples and microbatching must not part.
      tables: specs of the embedding tables that batches read from; `metrics` finds rows in its batch as well.
      plots: metrics that are arrays, for the summary and the report.
      extras: further entries of the state, beside the moving average.
      baselines: {"most_popular": {"valid/hr@10": ...}}, computed when asked.
      inspection: what the data is, for the report and `data.json`.
      transform: what serving needs that is not a parameter (original ids), as named arrays.
    """

    config: Any
    resolved: dict[str, Any]
    model: Model
    objective: Objective
    source: Source
    evaluations: Mapping[str, Callable[[int], EvalBatches]]
    metrics: Callable[[Params, Mapping[str, Any]], Sums]
    rules: list[Rule]
    logical: Mapping[str, Axes]
    loss_weights: Mapping[str, float]
    inspection: dict[str, Any]
    transform: Mapping[str, np.ndarray]
    baselines: Callable[[], dict[str, dict[str, float]]] | None = None
    block: int = 1
    tables: Mapping[str, TableSpec] = dataclasses.field(default_factory=dict)
    extras: Mapping[str, Extra] = dataclasses.field(default_factory=dict)
    catalogue: Catalogue | None = None
    plots: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """The length of the run in steps: `run.steps`, or what `run.epochs` amount to."""
        run, size = self.config.run, self.config.batch.global_
        return run.steps if run.steps is not None else -(-run.epochs * self.source.examples // size)
