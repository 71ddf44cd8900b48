"""Sequence models: a task from interactions, SASRec or a user's own model, a ranking loss, and full ranking."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxops.config.load import Loaded
from jaxops.config.types import ByPath
from jaxops.core.failures import UserError
from jaxops.core.sharding import named_leaves
from jaxops.data.ids import Ids
from jaxops.data.interactions.open import RecData, open_data
from jaxops.data.interactions.packing import PackedSource
from jaxops.data.interactions.queries import QueryBatches, seen_width
from jaxops.data.interactions.windows import SequenceSource
from jaxops.data.packing import best_fit, longest_that_fits
from jaxops.data.protocol import Source
from jaxops.families.rec.config import RecConfig
from jaxops.families.rec.own_model import require_parts
from jaxops.families.rec.own_sequences import Opened, open_own
from jaxops.families.rec.ranking import (
    Ranking,
    about,
    baselines,
    inspected,
    notices_of,
    ranking_evaluation,
    undefined_of,
)
from jaxops.families.rec.repeats import target_weights
from jaxops.families.rec.sequence_tables import (
    entries_of,
    read_inputs_from_tables,
    restored_inputs,
    table_inputs,
    with_tables,
)
from jaxops.families.rec.serving import ServedRanking
from jaxops.families.rec.slices import slice_columns, with_slice_columns
from jaxops.families.rec.tables_config import features_of
from jaxops.families.rec.trained import trained_on
from jaxops.models.inputs import ItemSequences
from jaxops.run.callables import objective_from
from jaxops.run.family import Given
from jaxops.run.saved_run import SavedRun
from jaxops.run.task import EvalBatches, Task, of_config


def build(loaded: Loaded[RecConfig], given: Given) -> Task:
    """Builds the task of a sequence model.

    Raises:
      UserError: the data cannot be opened, or does not fit the config.
    """
    config = loaded.config
    inputs = table_inputs(config)
    own_data = given.data is not None or isinstance(config.data, ByPath)
    if own_data and inputs:
        raise UserError(f"model.inputs: {config.data.kind} has no columns to read tables by; leave inputs out")
    if own_data and config.evaluate.slices:
        raise UserError(f"evaluate.slices: {config.data.kind} has no users and columns to slice by; leave slices out")
    if own_data:
        source = given.data() if given.data is not None else config.data.call()  # type: ignore[union-attr]
        data, opened = None, open_own(source, config, functools.partial(build_sequence_model, config, given))
    else:
        data = open_data(config.data, sides=bool(inputs or config.evaluate.slices))  # type: ignore[arg-type]
        opened = _open(config, data, build_sequence_model(config, given, data.inter.n_items))
    for path, value in (("evaluate.stop", config.evaluate.stop), ("checkpoint.best", config.checkpoint.best)):
        if value is not None and "valid" not in opened.batches:
            raise UserError(f"{path}: there are no validation queries to go by; set {path}=null")
    ranking = ranking_of(opened.model)
    seen = trained_on(data.inter, data.split).arrays() if data else {}
    task = Task(
        **of_config(config, loaded.resolved, opened.model),
        objective=objective_from(config.objective, given.objective, opened.model),
        source=opened.source,
        evaluation=ranking_evaluation(ranking, config, opened.batches),
        inspection=opened.inspection,
        notices=notices_of(config, opened.inspection) if data else (),
        undefined=undefined_of(config, opened.inspection) if data else {},
        transform={"item_ids": opened.item_ids, **seen},
        row_ids=dict.fromkeys(item_parameters(opened.model) if config.init_from else (), "item_ids"),
        baselines=functools.partial(baselines, data, config) if data and config.evaluate.baselines else None,
        about=about(config, opened.inspection if data else {}),
    )
    return read_inputs_from_tables(task, ranking, config, data) if inputs and data is not None else task


def build_sequence_model(config: RecConfig, given: Given, n_items: int) -> Any:
    """Builds the model that the config or Python names, for a catalogue of `n_items` items.

    Raises:
      UserError: a user's factory returned something that is not a sequence model.
    """
    owner = features_of(config.tables)
    pools = {name: config.tables[owner[name]].pool for name in table_inputs(config) if name in owner}
    data = ItemSequences(n_items, pools)
    chosen: Any = config.model
    if given.model is None and not isinstance(chosen, ByPath):
        return chosen.build(data)
    model = given.model(data) if given.model is not None else chosen.call(data)
    methods = {"encode": ("params", "batch", "key"), "item_vectors": ("params",)}
    return require_parts(model, "a sequence model", methods, numbers=("length",), n_items=n_items)


def item_parameters(model: Any) -> tuple[str, ...]:
    """Paths of the parameters that have a row for each item: `model.item_rows`, where the model says so.

    Of a model that does not, those with as many rows as its item vectors have.
    """
    if hasattr(model, "item_rows"):
        return tuple(model.item_rows)
    rows = jax.eval_shape(model.item_vectors, model.shapes).shape[0]
    return tuple(path for path, leaf in named_leaves(model.shapes) if leaf.shape[:1] == (rows,))


def ranking_of(model: Any) -> Ranking:
    """Returns a sequence model as evaluation and serving use it; the state at the last position is the query vector."""
    queries = lambda params, batch: model.encode(params, batch, None)[:, -1]
    return Ranking(model, model.n_items, model.length, queries, model.item_vectors)


def restore(saved: SavedRun) -> ServedRanking:
    """Restores the trained sequence model of a run.

    Raises:
      UserError: the run folder lacks a part of its transform.
    """
    config = saved.config
    items, users = Ids.of(saved.transform("item_ids"), first=1), None
    model = build_sequence_model(config, Given(), len(items))
    ranking = ranking_of(model)
    if table_inputs(config):
        ranking = with_tables(ranking, config, restored_inputs(config, saved.transform))
        if ranking.by_user:
            users = Ids.of(saved.transform("user_ids"), first=0)
    return ServedRanking(saved, ranking, items, users)


def _open(config: RecConfig, data: RecData, model: Any) -> Opened:
    inter, split, length = data.inter, data.split, model.length
    windows: Callable[..., Source] = SequenceSource
    if config.batch.pack:
        pack = best_fit if config.batch.pack == "best_fit" else longest_that_fits
        windows = functools.partial(PackedSource, pack=pack)
    event_rows = any(entry != "items" for entry in entries_of(config).values())
    weights = target_weights(inter, split, config.repeats, first=False)
    seen = seen_width(inter, split.valid, split.test)
    slices = slice_columns(config.evaluate.slices, data)
    batches: dict[str, Callable[[int], EvalBatches]] = {
        name: with_slice_columns(
            functools.partial(QueryBatches, inter, part, length, seen=seen, event_rows=event_rows), slices
        )
        for name, part in (("valid", split.valid), ("test", split.test))
        if len(part)
    }
    return Opened(
        model=model,
        source=windows(inter, split, length, config.run.seed, event_rows=event_rows, weights=weights),
        batches=batches,
        inspection=inspected(data),
        item_ids=np.asarray(inter.item_ids.values),
    )
