"""The recommendation family: interactions, a sequence model, a ranking loss, evaluation on the whole catalogue."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from jaxops.config.types import ByPath
from jaxops.core.accumulate import Objective
from jaxops.core.failures import UserError
from jaxops.core.state import Params
from jaxops.core.sums import Sums
from jaxops.data.interactions.inspect import inspect
from jaxops.data.interactions.open import RecData, open_data
from jaxops.data.interactions.packing import PackedSource
from jaxops.data.interactions.queries import QueryBatches, seen_width
from jaxops.data.interactions.windows import SequenceSource
from jaxops.evaluate.baselines import evaluate_baseline
from jaxops.evaluate.grouped import with_slices
from jaxops.evaluate.ranking import evaluate_scores
from jaxops.families.rec.clicks import build_clicks
from jaxops.families.rec.config import CLICK_MODELS, Bce, Evaluate, Gbce, RecConfig, SampledSoftmax, Softmax
from jaxops.families.rec.own_source import Opened, open_own
from jaxops.families.rec.retrieval import build_retrieval
from jaxops.families.rec.sasrec_tables import build_sasrec, entries_of, objective_on_tables, on_tables
from jaxops.families.rec.slices import slice_columns, slice_masks, with_slice_columns
from jaxops.models.sasrec import SASRec, SASRecConfig
from jaxops.models.two_tower import TwoTowerConfig
from jaxops.objectives import ranking
from jaxops.run.callables import require_callable
from jaxops.run.task import EvalBatches, Task

BASELINES = ("most_popular", "item_knn")


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
    if isinstance(config.model, CLICK_MODELS):
        return build_clicks(config, resolved, objective)
    if isinstance(config.model, TwoTowerConfig):
        return _retrieval(config, resolved, objective)
    assert isinstance(config.model, SASRecConfig)
    inputs = config.model.inputs
    if inputs and isinstance(config.data, ByPath):
        raise UserError(f"model.inputs: {config.data.fn} has no columns to read tables by; leave inputs out")
    if config.evaluate.slices and isinstance(config.data, ByPath):
        raise UserError(f"evaluate.slices: {config.data.fn} has no users and columns to slice by; leave slices out")
    sides = bool(inputs or config.evaluate.slices)
    data = None if isinstance(config.data, ByPath) else open_data(config.data, sides=sides)  # type: ignore[arg-type]
    opened = open_own(config) if data is None else _open(config, data)
    for path, value in (("evaluate.stop", config.evaluate.stop), ("checkpoint.best", config.checkpoint.best)):
        if value is not None and "valid" not in opened.evaluations:
            raise UserError(f"{path}: there are no validation queries to go by; set {path}=null")
    model = build_sasrec(config, opened.n_items)
    made = _objective(config, model) if objective is None else objective(model)
    require_callable("objective: what the factory returned", made, "params", "batch", "key")
    task = Task(
        config=config,
        resolved=resolved,
        model=model,
        objective=made,
        source=opened.source,
        evaluations=opened.evaluations,
        metrics=_metrics(config, model),
        rules=[(pattern, axes) for pattern, axes in config.sharding.rules] + model.rules,
        logical=config.sharding.logical,
        loss_weights=config.loss_weights,
        inspection=opened.inspection,
        transform={"item_ids": opened.item_ids},
        baselines=opened.baselines,
    )
    return on_tables(task, config, data) if inputs and data is not None else task


def _objective(config: RecConfig, model: SASRec) -> Objective:
    if model.config.inputs and not isinstance(config.objective, ByPath):
        return objective_on_tables(config, model)
    return build_objective(config.objective, model)


def _retrieval(config: RecConfig, resolved: dict[str, Any], objective: Callable[[Any], Objective] | None) -> Task:
    if isinstance(config.data, ByPath):
        raise UserError(f"data: {config.data.fn}: two_tower needs users and items with features: a file or a data set")
    data = open_data(config.data, sides=True)  # type: ignore[arg-type]
    baselines = functools.partial(_baselines, data, config.evaluate) if config.evaluate.baselines else None
    return build_retrieval(config, data, inspect(data), baselines, resolved, objective)


def _open(config: RecConfig, data: RecData) -> Opened:
    assert isinstance(config.model, SASRecConfig)
    inter, split, length = data.inter, data.split, config.model.length
    windows = PackedSource if config.batch.pack else SequenceSource
    places = any(entry != "items" for entry in entries_of(config).values())
    seen = seen_width(split.valid, split.test)
    slices = slice_columns(config.evaluate.slices, data)
    evaluations: dict[str, Callable[[int], EvalBatches]] = {
        name: with_slice_columns(functools.partial(QueryBatches, inter, part, length, seen=seen, places=places), slices)
        for name, part in (("valid", split.valid), ("test", split.test))
        if len(part)
    }
    return Opened(
        n_items=inter.n_items,
        source=windows(inter, split, length, config.run.seed, places=places),
        evaluations=evaluations,
        inspection=inspect(data),
        item_ids=np.asarray(inter.item_ids.values),
        baselines=functools.partial(_baselines, data, config.evaluate) if config.evaluate.baselines else None,
    )


def _metrics(config: RecConfig, model: SASRec) -> Callable[[Params, Mapping[str, Any]], Sums]:
    def metrics(params: Params, batch: Mapping[str, Array]) -> Sums:
        scores = model.logits(params, model.encode(params, batch, None)[:, -1])
        sums = lambda batch: evaluate_scores(scores, batch, config.evaluate.metrics, n_items=model.n_items)
        return with_slices(sums, batch)

    return metrics


def _baselines(data: RecData, evaluate: Evaluate) -> dict[str, dict[str, float]]:
    inter, split = data.inter, data.split
    slices = slice_columns(evaluate.slices, data)
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
                evaluate.metrics,
                n_items=inter.n_items,
                slices=slice_masks(slices, inter, queries),
            )
            out[name] |= {f"{part}/{metric}": value for metric, value in values.items()}
    return out
