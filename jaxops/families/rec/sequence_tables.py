"""Sequence models that read tables: of items and their features, of the user, and of the history's events.

Evaluation computes the vectors of the whole catalogue; a training step never does.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxops.core.failures import UserError
from jaxops.data.interactions.events import (
    ColumnBatches,
    EntityBatches,
    WithColumns,
    WithNegatives,
    require_small_rows,
)
from jaxops.data.interactions.open import RecData, user_columns
from jaxops.families.rec.carry_rows import carry_rows
from jaxops.families.rec.config import RecConfig
from jaxops.families.rec.entities import Encoded, context_columns, encode_features, feature_columns, feature_names
from jaxops.families.rec.entities import restored_features as restored
from jaxops.families.rec.ranking import Catalogue, Ranking, ranking_evaluation
from jaxops.families.rec.tables_config import match
from jaxops.models.sasrec import SASRecConfig
from jaxops.objectives.ranking import SampledSoftmax
from jaxops.run.batched import BatchedEvaluation
from jaxops.run.task import EvalBatches, Task

ITEM, TARGET, NEGATIVE = "item", "target_item", "negative_item"
"""Features that read the items' table: items of the history, target items, and sampled negatives."""
PLACES = ("events", "users", "segment", "position")
"""Entries that sequence batches have beside those of all interaction batches."""


def table_inputs(config: RecConfig) -> tuple[str, ...]:
    """Returns the features that the model reads from tables; none where the item matrix is a parameter."""
    return config.model.inputs if isinstance(config.model, SASRecConfig) else ()


def event_context(config: RecConfig) -> tuple[str, ...]:
    """Returns the inputs that are context columns of the history's events."""
    return tuple(name for name in table_inputs(config) if name in context_columns(config.data))


def entries_of(config: RecConfig) -> dict[str, str]:
    """Returns by input the batch entry that holds, at each position of a sequence, the row to look the input up.

    The entry is `items` for inputs of items, `users` for those of users, and `events` for those of events.
    """
    users, context = {"user", *user_columns(config.data)}, event_context(config)
    where = lambda name: "events" if name in context else "users" if name in users else "items"
    return {name: where(name) for name in table_inputs(config)}


def read_inputs_from_tables(task: Task, ranking: Ranking, config: RecConfig, data: RecData) -> Task:
    """Returns the task of a model with `model.inputs`, whose batches read tables.

    Its evaluation computes the item matrix.

    Args:
      task: the task without tables.
      ranking: the ranking of the model.
      config: the run's config.
      data: the opened data.

    Raises:
      UserError: the inputs do not begin with `item`, the data lacks an input, an input has no table, or nothing reads a
        table.
    """
    inputs = table_inputs(config)
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
    encoded = encode_features(config.tables, owner, found)
    encoded.add_nobody(of_places)
    columns = encoded.columns(entries)
    whose = {"user_ids": np.asarray(inter.user_ids.values)} if "users" in entries.values() else {}
    frozen = encoded.frozen([name for name in inputs if name not in event_context(config)])
    transform = {**task.transform, **whose, **frozen}
    assert isinstance(task.evaluation, BatchedEvaluation)
    batches = {name: functools.partial(_columns, part, columns) for name, part in task.evaluation.batches.items()}
    return dataclasses.replace(
        task,
        source=WithColumns(source, columns),
        evaluation=ranking_evaluation(with_tables(ranking, config, encoded), config, batches),
        tables=encoded.specs,
        transform=transform,
        inspection={**task.inspection, "features": encoded.digest()},
        carry_rows=functools.partial(carry_rows, config, transform, encoded.specs),
    )


def with_tables(ranking: Ranking, config: RecConfig, encoded: Encoded) -> Ranking:
    """Returns the ranking of a model with these encoded inputs; its item vectors are the rows of the items' table."""
    entries = entries_of(config)
    columns = encoded.columns(entries)
    of_items = {ITEM: columns[ITEM]}
    rows = ranking.n_items + 1
    catalogue = Catalogue(
        rows,
        lambda size: ColumnBatches(EntityBatches("items", rows, size), of_items),
        lambda params, batch: batch["rows"][ITEM],
    )
    return dataclasses.replace(
        ranking,
        columns=columns,
        context=dict.fromkeys(event_context(config), "events"),
        tables=encoded.specs,
        catalogue=catalogue,
        by_user="users" in entries.values(),
    )


def restored_inputs(config: RecConfig, read: Callable[[str], np.ndarray]) -> Encoded:
    """Restores the frozen features of a trained model's inputs; `read` returns an array of the transform by name."""
    return restored(config, table_inputs(config), event_context(config), read)


def _columns(part: Callable[[int], EvalBatches], columns: Any, size: int) -> EvalBatches:
    return ColumnBatches(part(size), columns)
