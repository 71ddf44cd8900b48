"""The recommendation family: interactions, a sequence model, a ranking loss, evaluation on the whole catalogue."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxops.config.types import ByPath
from jaxops.core.accumulate import Objective
from jaxops.core.failures import UserError, nearest
from jaxops.core.state import Params
from jaxops.core.sums import Sums
from jaxops.data.config import RecData, open_data
from jaxops.data.inspect import inspect
from jaxops.data.packing import PackedSource
from jaxops.data.queries import QueryBatches, seen_width
from jaxops.data.windows import SequenceSource
from jaxops.evaluate.baselines import evaluate_baseline
from jaxops.evaluate.ranking import evaluate_scores
from jaxops.models.sasrec import SASRec
from jaxops.objectives import ranking
from jaxops.tasks.config import Bce, Gbce, RecConfig, SampledSoftmax, Softmax
from jaxops.tasks.seams import require_callable
from jaxops.tasks.task import EvalBatches, Task

BASELINES = ("most_popular", "item_knn")
ITEMS = ("items", "targets", "target", "seen")
"""The entries of a batch that hold item rows."""


def build_objective(config: Any, model: SASRec) -> Objective:
    """The objective that the config names, for this model.

    Raises:
      UserError: the user's factory returned nothing that can be called like an objective.
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
    require_callable(f"objective {config.fn}: what the factory returned", objective, "params", "batch", "key")
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
    windows = PackedSource if config.batch.pack else SequenceSource
    source = windows(inter, split, length, config.run.seed)
    seen = seen_width(split.valid, split.test)
    queries = {"valid": split.valid, "test": split.test}
    evaluations: dict[str, Callable[[int], EvalBatches]] = {
        name: functools.partial(QueryBatches, inter, part, length, seen=seen)
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
    _check_stop(config, evaluations)
    return task


def _check_stop(config: RecConfig, evaluations: Mapping[str, Any]) -> None:
    for path, value in (("evaluate.stop", config.evaluate.stop), ("checkpoint.best", config.checkpoint.best)):
        if value is not None and "valid" not in evaluations:
            raise UserError(f"{path}: there are no validation queries to go by; set {path}=null")


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
    for name in ("n_items", "examples"):
        value = getattr(source, name)
        if not isinstance(value, int | np.integer) or value < 1:
            raise UserError(f"data {config.data.fn}: {name}: expected a positive integer, got {value!r}")
    require_callable(f"data {config.data.fn}: batch", source.batch, "cursor", "size")
    _check_batch(source, config)
    model = SASRec(config.model, int(source.n_items))
    evaluations: dict[str, Callable[[int], EvalBatches]] = {
        name: getattr(source, name) for name in ("valid", "test") if hasattr(source, name)
    }
    _check_stop(config, evaluations)
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
    """Looks at the first batches of a user's source before anything is compiled."""
    assert isinstance(config.data, ByPath)
    size, length, name = config.batch.global_, config.model.length, f"data {config.data.fn}"
    shapes: dict[str, tuple[int | None, ...]]
    shapes = {"id": (size,), "items": (size, length), "targets": (size, length), "weight": (size, length)}
    _check_arrays(f"{name}: batch(0, {size})", source.batch(0, size), shapes, source.n_items)
    size = config.evaluate.batch
    shapes = {"id": (size,), "items": (size, length), "target": (size,), "seen": (size, None), "weight": (size,)}
    for part in (part for part in ("valid", "test") if hasattr(source, part)):
        require_callable(f"{name}: {part}", getattr(source, part), "size")
        first = next(iter(getattr(source, part)(size)), None)
        if first is None:
            raise UserError(f"{name}: {part}({size}) gave no batch; leave {part} out where there is none")
        _check_arrays(f"{name}: {part}({size}): its first batch", first, shapes, source.n_items)


def _check_arrays(what: str, batch: Any, shapes: Mapping[str, tuple[int | None, ...]], n_items: int) -> None:
    """Names, shapes (None: any size), kinds and the range of items."""
    if not isinstance(batch, Mapping):
        raise UserError(f"{what}: expected a dict of arrays ({', '.join(shapes)}), got {type(batch).__name__}")
    wrong = []
    for name, shape in shapes.items():
        if name not in batch:
            wrong.append(f"no {name!r}{nearest(name, batch)}")
            continue
        array = np.asarray(batch[name])
        fits = array.ndim == len(shape) and all(b in (None, a) for a, b in zip(array.shape, shape, strict=True))
        integers = name != "weight"
        if not fits or array.dtype.kind not in ("iu" if integers else "f"):
            wanted = f"{'int32' if integers else 'float32'} {str(shape).replace('None', '*')}"
            wrong.append(f"{name}: expected {wanted}, got {array.dtype} {array.shape}")
        elif name in ITEMS and array.size and not 0 <= array.min() <= array.max() <= n_items:
            wrong.append(f"{name}: expected 0 (padding) to n_items = {n_items}, got {array.min()} to {array.max()}")
    if wrong:
        raise UserError(f"{what}: {'; '.join(wrong)}")


def with_objective(task: Task, objective: Objective) -> Task:
    """The same task with another objective."""
    return dataclasses.replace(task, objective=objective)


def example_batch(task: Task) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one global training batch."""
    batch = task.source.batch(0, task.config.batch.global_)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
