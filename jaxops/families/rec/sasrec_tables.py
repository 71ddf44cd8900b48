"""SASRec on tables: of its items, and of what is known of them, of the user and of the events of the history.

Evaluation makes the vectors of the whole catalogue, no step does.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxops.core.accumulate import Objective
from jaxops.core.failures import UserError
from jaxops.data.interactions.events import ColumnBatches, EntityBatches, WithColumns, WithNegatives, require_small_rows
from jaxops.data.interactions.open import RecData, user_columns
from jaxops.data.interactions.spec import InteractionsFile
from jaxops.families.rec.config import RecConfig, SampledSoftmax
from jaxops.families.rec.entities import Encoded, encode, feature_columns, feature_names
from jaxops.families.rec.tables_config import features_of, match
from jaxops.models.sasrec import SASRec, SASRecConfig
from jaxops.objectives.ranking import sampled_softmax_on_tables
from jaxops.run.task import Catalogue, EvalBatches, Ranking, Task

ITEM, TARGET, NEGATIVE = "item", "target_item", "negative_item"
"""Features of the items' table: what was seen, what comes next, and what did not."""
PLACES = ("events", "users", "segment", "position")
"""Entries that batches of sequences have beside those of all interactions."""


def entries_of(config: RecConfig) -> dict[str, str]:
    """By input, the entry of a batch whose rows tell its own at each place of a sequence: of the items, of the `users`
    whose places they are, or of their `events`."""
    assert isinstance(config.model, SASRecConfig)
    users, context = {"user", *user_columns(config.data)}, event_context(config)
    where = lambda name: "events" if name in context else "users" if name in users else "items"
    return {name: where(name) for name in config.model.inputs}


def event_context(config: RecConfig) -> tuple[str, ...]:
    """The inputs that are context columns of the history's events."""
    assert isinstance(config.model, SASRecConfig)
    known = config.data.columns.context if isinstance(config.data, InteractionsFile) else ()
    return tuple(name for name in config.model.inputs if name in known)


def on_tables(task: Task, config: RecConfig, data: RecData) -> Task:
    """The task of a SASRec with `model.inputs`: its batches read tables, its item matrix is made by evaluation.

    Raises:
      UserError: inputs that do not begin with `item`; an input that the data lacks or that has no table; a table that
        nobody reads.
    """
    assert isinstance(config.model, SASRecConfig)
    inputs = config.model.inputs
    if inputs[0] != ITEM:
        raise UserError(f"model.inputs: expected {ITEM!r}, whose table is scored, to come first; got {inputs[0]!r}")
    inter = data.inter
    found = feature_columns(data, inputs, PLACES)
    known = dict.fromkeys(feature_names(data), "a column")
    owner = match(config.tables, dict.fromkeys(inputs, "model.inputs"), known)
    source, entries = task.source, entries_of(config)
    of_places = [name for name, entry in entries.items() if entry != "items"]
    if of_places:
        require_small_rows(inter)
    if isinstance(config.objective, SampledSoftmax):
        source = WithNegatives(source, inter.n_items, config.objective.negatives, config.run.seed)
        owner |= dict.fromkeys((TARGET, NEGATIVE), owner[ITEM])
        found |= dict.fromkeys((TARGET, NEGATIVE), found[ITEM])
        entries |= {TARGET: "targets", NEGATIVE: "negatives"}
    encoded = encode(config.tables, owner, found)
    encoded.add_nobody(of_places)
    columns = encoded.columns(entries)
    whose = {"user_ids": np.asarray(inter.user_ids.values)} if "users" in entries.values() else {}
    return dataclasses.replace(
        task,
        source=WithColumns(source, columns),
        evaluations={name: functools.partial(_columns, part, columns) for name, part in task.evaluations.items()},
        tables=encoded.specs,
        transform={
            **task.transform,
            **whose,
            **encoded.frozen([name for name in inputs if name not in event_context(config)]),
        },
        catalogue=sasrec_ranking(config, inter.n_items, encoded).catalogue,
    )


def build_sasrec(config: RecConfig, n_items: int) -> SASRec:
    """The model of the config; bags of its inputs are pooled as their tables say."""
    assert isinstance(config.model, SASRecConfig)
    owner = features_of(config.tables)
    return SASRec(
        config.model, n_items, {name: config.tables[owner[name]].pool for name in config.model.inputs if name in owner}
    )


def sasrec_ranking(config: RecConfig, n_items: int, encoded: Encoded | None = None) -> Ranking:
    """SASRec as it is asked: with its item matrix or, where its inputs are `encoded`, with that table's rows."""
    assert isinstance(config.model, SASRecConfig)
    model = build_sasrec(config, n_items)
    queries = lambda params, batch: model.encode(params, batch, None)[:, -1]
    asked = Ranking(model, n_items, config.model.length, queries, model.item_vectors)
    if encoded is None:
        return asked
    columns = encoded.columns(entries_of(config))
    of_items = {ITEM: columns[ITEM]}
    catalogue = Catalogue(
        n_items + 1,
        lambda size: ColumnBatches(EntityBatches("items", n_items + 1, size), of_items),
        lambda params, batch: batch["rows"][ITEM],
    )
    context = dict.fromkeys(event_context(config), "events")
    return dataclasses.replace(asked, columns=columns, context=context, tables=encoded.specs, catalogue=catalogue)


def _columns(part: Callable[[int], EvalBatches], columns: Any, size: int) -> EvalBatches:
    return ColumnBatches(part(size), columns)


def objective_on_tables(config: RecConfig, model: Any) -> Objective:
    """Sampled softmax, whose negatives a host draws."""
    assert isinstance(config.objective, SampledSoftmax)
    return sampled_softmax_on_tables(model)
