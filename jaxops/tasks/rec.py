"""The recommendation family: interactions, a sequence model, a ranking loss, evaluation on the whole catalogue."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxops.config.types import ByPath
from jaxops.core.accumulate import Objective
from jaxops.core.failures import UserError
from jaxops.core.state import Params
from jaxops.core.sums import Sums
from jaxops.data.config import RecData, open_data
from jaxops.data.inspect import inspect
from jaxops.data.queries import QueryBatches, seen_width
from jaxops.data.windows import SequenceSource
from jaxops.evaluate.baselines import evaluate_baseline
from jaxops.evaluate.ranking import evaluate_scores
from jaxops.models.sasrec import SASRec
from jaxops.objectives import ranking
from jaxops.tasks.config import Bce, Gbce, RecConfig, SampledSoftmax, Softmax
from jaxops.tasks.task import EvalBatches, Task

BASELINES = ("most_popular", "item_knn")


def build_objective(config: Any, model: SASRec) -> Objective:
    """The objective that the config names, for this model.

    Raises:
      UserError: the user's factory raised, or returned nothing callable.
    """
    if isinstance(config, Softmax):
        return ranking.softmax(model)
    if isinstance(config, SampledSoftmax):
        return ranking.sampled_softmax(model, config.negatives)
    if isinstance(config, Bce):
        return ranking.bce(model, config.negatives)
    if isinstance(config, Gbce):
        return ranking.gbce_loss(model, config.negatives, config.t)
    assert isinstance(config, ByPath)
    objective = config.call(model)
    if not callable(objective):
        raise UserError(
            f"objective {config.fn}: the factory must return a function (params, batch, key) -> Sums,"
            f" it returned {type(objective).__name__}"
        )
    return objective


def build_rec(
    config: RecConfig, resolved: dict[str, Any], objective: Callable[[SASRec], Objective] | None = None
) -> Task:
    """Opens the data and puts the family together; `objective` (a factory) replaces the config's.

    Raises:
      UserError: the data cannot be opened, or does not fit the config.
    """
    if isinstance(config.data, ByPath):
        return _own_source(config, resolved, objective)
    data = open_data(config.data)
    inter, split = data.inter, data.split
    length = config.model.length
    model = SASRec(config.model, inter.n_items)
    source = SequenceSource(inter, split, length, config.run.seed)
    seen = seen_width(split.valid, split.test)
    queries = {"valid": split.valid, "test": split.test}
    evaluations = {
        name: lambda size, part=part: QueryBatches(inter, part, length, size, seen=seen)
        for name, part in queries.items()
        if len(part)
    }
    task = Task(
        config=config,
        resolved=resolved,
        model=model,
        objective=(objective or (lambda m: build_objective(config.objective, m)))(model),
        source=source,
        evaluations=evaluations,
        metrics=_metrics(config, model),
        rules=[(pattern, axes) for pattern, axes in config.sharding.rules] + model.rules,
        logical=config.sharding.logical,
        loss_weights=config.loss_weights,
        inspection=inspect(data),
        transform={"item_ids": np.asarray(inter.item_ids.values)},
        baselines=(lambda: _baselines(data, config.evaluate.metrics)) if config.evaluate.baselines else None,
    )
    if config.evaluate.stop and "valid" not in evaluations:
        raise UserError("evaluate.stop: the split has no validation queries to stop by")
    return task


def _metrics(config: RecConfig, model: SASRec) -> Callable[[Params, Mapping[str, Any]], Sums]:
    def metrics(params: Params, batch: Mapping[str, Array]) -> Sums:
        hidden = model.encode(params, batch, None)[:, -1]
        return evaluate_scores(model.logits(params, hidden), batch, config.evaluate.metrics, n_items=model.n_items)

    return metrics


def _baselines(data: RecData, metrics: tuple[str, ...]) -> dict[str, dict[str, float]]:
    inter, split = data.inter, data.split
    out: dict[str, dict[str, float]] = {}
    for name in BASELINES:
        out[name] = {}
        for part, queries in (("valid", split.valid), ("test", split.test)):
            if not len(queries):
                continue
            values = evaluate_baseline(
                name,
                inter.item,
                inter.offsets,
                split.train_end,
                queries.user,
                queries.history,
                queries.target,
                metrics,
                n_items=inter.n_items,
            )
            out[name] |= {f"{part}/{metric}": value for metric, value in values.items()}
    return out


def _own_source(
    config: RecConfig, resolved: dict[str, Any], objective: Callable[[SASRec], Objective] | None
) -> Task:
    """A user's source by import path: `n_items`, `examples`, `batch(cursor, size)`; `valid` and `test` optional.

    `valid` and `test` are functions of a batch size that return evaluation batches (data/queries.py says what is in
    one).
    """
    assert isinstance(config.data, ByPath)
    source = config.data.call()
    missing = [name for name in ("n_items", "examples", "batch") if not hasattr(source, name)]
    if missing:
        raise UserError(
            f"data {config.data.fn}: what the factory returned ({type(source).__name__}) has no {', '.join(missing)};"
            f" a source has n_items, examples and batch(cursor, size)"
        )
    _check_batch(source, config)
    model = SASRec(config.model, int(source.n_items))
    evaluations: dict[str, Callable[[int], EvalBatches]] = {
        name: getattr(source, name) for name in ("valid", "test") if hasattr(source, name)
    }
    return Task(
        config=config,
        resolved=resolved,
        model=model,
        objective=(objective or (lambda m: build_objective(config.objective, m)))(model),
        source=source,
        evaluations=evaluations,
        metrics=_metrics(config, model),
        rules=[(pattern, axes) for pattern, axes in config.sharding.rules] + model.rules,
        logical=config.sharding.logical,
        loss_weights=config.loss_weights,
        inspection={"source": config.data.fn, "examples": int(source.examples), "items": int(source.n_items)},
        transform={"item_ids": np.arange(1, int(source.n_items) + 1)},
    )


def _check_batch(source: Any, config: RecConfig) -> None:
    """Looks at the first batch of a user's source before anything is compiled."""
    size, length = config.batch.global_, config.model.length
    batch = source.batch(0, size)
    want = {"id": (size,), "items": (size, length), "targets": (size, length), "weight": (size, length)}
    wrong = [
        f"{name}: expected {shape}, got {np.shape(batch[name]) if name in batch else 'nothing'}"
        for name, shape in want.items()
        if name not in batch or np.shape(batch[name]) != shape
    ]
    if wrong:
        raise UserError(f"data {config.data.fn}: batch(0, {size}): {'; '.join(wrong)}")
    top = max(int(np.max(batch["items"])), int(np.max(batch["targets"])))
    if top > source.n_items or min(int(np.min(batch["items"])), int(np.min(batch["targets"]))) < 0:
        raise UserError(f"data {config.data.fn}: items must be 0 (padding) to n_items = {source.n_items}, got {top}")


def with_objective(task: Task, objective: Objective) -> Task:
    """The same task with another objective."""
    return dataclasses.replace(task, objective=objective)


def example_batch(task: Task) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one global training batch."""
    batch = task.source.batch(0, task.config.batch.global_)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
