"""Two-tower retrieval: a task from features of users and items, in-batch softmax with logQ, and full ranking."""

import functools
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxops.config.load import Loaded
from jaxops.config.types import ByPath
from jaxops.core.failures import UserError
from jaxops.core.step import Extra
from jaxops.data.ids import Ids
from jaxops.data.interactions.events import ColumnBatches, EntityBatches, EventSource, WithColumns
from jaxops.data.interactions.open import RecData, open_data
from jaxops.data.interactions.queries import QueryBatches, seen_width
from jaxops.families.rec.carry_rows import carry_rows
from jaxops.families.rec.config import RecConfig
from jaxops.families.rec.entities import (
    Encoded,
    context_columns,
    encode_features,
    feature_columns,
    feature_names,
    restored_features,
)
from jaxops.families.rec.ranking import (
    Catalogue,
    Ranking,
    about,
    baselines,
    inspected,
    notices_of,
    ranking_evaluation,
    undefined_of,
)
from jaxops.families.rec.repeats import target_weights
from jaxops.families.rec.serving import ServedRanking
from jaxops.families.rec.slices import slice_columns
from jaxops.families.rec.tables_config import features_of, match
from jaxops.families.rec.trained import recorded, trained_on
from jaxops.models.inputs import Input, TowerFeatures
from jaxops.models.two_tower import TwoTowerConfig
from jaxops.objectives.retrieval import InBatchSoftmax, count_items, log_frequency, no_frequencies
from jaxops.run.callables import objective_from
from jaxops.run.family import Given
from jaxops.run.saved_run import SavedRun
from jaxops.run.task import EvalBatches, Task, of_config

HISTORY = "history"
"""The feature of a user's earlier items: a bag of items that shares the items' ids."""


def build(loaded: Loaded[RecConfig], given: Given) -> Task:
    """Builds the task of `model: {kind: two_tower}`.

    Raises:
      UserError: the data lacks a feature, a feature has no table, or nothing reads a table.
    """
    config = loaded.config
    assert isinstance(config.model, TwoTowerConfig)
    if given.data is not None or isinstance(config.data, ByPath):
        raise UserError(
            f"data: {config.data.kind}: two_tower needs users and items with features: a file or a data set"
        )
    if given.model is not None:
        raise UserError("model: a model of your own ranks sequences or predicts clicks; two_tower has no place for one")
    data = open_data(config.data, sides=True)  # type: ignore[arg-type]
    inter, split = data.inter, data.split
    encoded = _encoded(config, data)
    seen_in_training = trained_on(inter, split)
    ranking = two_tower_ranking(config, encoded, inter.n_items, seen_in_training.items)
    weights = target_weights(inter, split, config.repeats, first=True)
    columns = {**ranking.columns, **slice_columns(config.evaluate.slices, data)}
    size, history, seen = config.batch.global_, config.model.history, seen_width(inter, split.valid, split.test)
    inspection = {**inspected(data), "features": encoded.digest()}

    def batches(part: Any, size: int) -> EvalBatches:
        return ColumnBatches(QueryBatches(inter, part, history, size, seen=seen), columns)

    parts = {
        name: functools.partial(batches, part)
        for name, part in (("valid", split.valid), ("test", split.test))
        if len(part)
    }
    trained = ranking.trained if config.untrained_items == "exclude" else None
    untrained = 0 if trained is None else int((~trained[1:]).sum())
    transform = {
        "item_ids": np.asarray(inter.item_ids.values),
        "user_ids": np.asarray(inter.user_ids.values),
        **seen_in_training.arrays(),
        **encoded.frozen([name for name in encoded.codes if name not in inter.contexts]),
    }
    return Task(
        **of_config(config, loaded.resolved, ranking.model),
        objective=objective_from(config.objective, given.objective, ranking.model, size),
        source=WithColumns(EventSource(inter, split, history, config.run.seed, weights), ranking.columns),
        evaluation=ranking_evaluation(ranking, config, parts),
        inspection=inspection,
        transform=transform,
        carry_rows=functools.partial(carry_rows, config, transform, encoded.specs, inputs=_by_position),
        baselines=functools.partial(baselines, data, config) if config.evaluate.baselines else None,
        block=(config.objective.block or size) if isinstance(config.objective, InBatchSoftmax) else 1,
        tables=encoded.specs,
        extras=_extras(config.objective, encoded) if given.objective is None else {},
        notices=notices_of(config, inspection, untrained),
        undefined=undefined_of(config, inspection),
        about=about(config, inspection, untrained > 0),
    )


def restore(saved: SavedRun) -> ServedRanking:
    """Restores the trained two-tower model of a run.

    Raises:
      UserError: the run folder lacks a part of its transform.
    """
    config, read = saved.config, saved.transform
    items, users = Ids.of(read("item_ids"), first=1), Ids.of(read("user_ids"), first=0)
    names = (*config.model.user, *config.model.item)
    encoded = restored_features(config, names, query_context(config), read)
    record = recorded(saved)
    ranking = two_tower_ranking(config, encoded, len(items), None if record is None else record.items)
    return ServedRanking(saved, ranking, items, users)


def two_tower_ranking(
    config: RecConfig, encoded: Encoded, n_items: int, trained: Bool[np.ndarray, " rows"] | None = None
) -> Ranking:
    """Builds the two towers for these features, in the form that evaluation and serving use.

    Args:
      config: the config of the run.
      encoded: the features.
      n_items: the size of the catalogue.
      trained: by item row, whether training saw it (None: not known). What it did not see has the random row of its id
        in its vector, and is recommended only where `untrained_items` allows it.
    """
    assert isinstance(config.model, TwoTowerConfig)
    features = TowerFeatures(*(_inputs(names, config, encoded) for names in (config.model.user, config.model.item)))
    model = config.model.build(features)
    entries = {**dict.fromkeys(config.model.user, "user"), **dict.fromkeys(config.model.item, "item"), HISTORY: "items"}
    entries |= dict.fromkeys(query_context(config), "event")
    columns = encoded.columns(entries)
    of_items = {name: column for name, column in columns.items() if column[0] == "item"}
    towers = lambda params: {name: value for name, value in params.items() if name != "catalogue"}
    return Ranking(
        model=model,
        n_items=n_items,
        length=config.model.history,
        queries=lambda params, batch: model.users(towers(params), batch, None),
        items=lambda params: params["catalogue"],
        columns=columns,
        context=dict.fromkeys(query_context(config), "id"),
        tables=encoded.specs,
        catalogue=Catalogue(
            n_items + 1,
            lambda size: ColumnBatches(EntityBatches("item", n_items + 1, size), of_items),
            lambda params, batch: model.items(params, batch, None),
        ),
        by_user=True,
        trained=trained if "item" in config.model.item else None,
    )


def query_context(config: RecConfig) -> tuple[str, ...]:
    """Returns the context columns that the user's tower reads; their values come with each query."""
    assert isinstance(config.model, TwoTowerConfig)
    return tuple(name for name in config.model.user if name in context_columns(config.data))


def _by_position(config: RecConfig) -> dict[str, tuple[str, ...]]:
    assert isinstance(config.model, TwoTowerConfig)
    return {"model.user": config.model.user, "model.item": config.model.item}


def _encoded(config: RecConfig, data: RecData) -> Encoded:
    """Encodes the features that both towers read."""
    model = config.model
    assert isinstance(model, TwoTowerConfig)
    context = data.inter.contexts
    found = feature_columns(data, (*model.user, *model.item))
    known = {**dict.fromkeys(feature_names(data), "a column"), HISTORY: "items"}
    wanted = dict.fromkeys(model.user, "model.user") | dict.fromkeys(model.item, "model.item")
    owner = match(config.tables, wanted, known)
    of_users = {"user", HISTORY, *data.user_features, *context}
    for path, names, wrong in (
        ("model.user", model.user, set(model.user) - of_users),
        ("model.item", model.item, set(model.item) & of_users),
    ):
        if wrong:
            side = [name for name in known if (name in of_users) == (path == "model.user")]
            raise UserError(
                f"{path}: {min(wrong, key=names.index)!r} is a column of the other side (there are: {', '.join(side)})"
            )
    encoded = encode_features(config.tables, owner, {**found, HISTORY: found["item"]})
    if HISTORY in encoded.codes:
        codes = encoded.codes[HISTORY].copy()
        codes[0] = -1  # item row 0 is padding: the user has fewer items than the bag holds
        encoded.codes[HISTORY] = codes
    encoded.add_nobody([name for name in model.user if name not in (HISTORY, *context)])
    return encoded


def _inputs(names: tuple[str, ...], config: RecConfig, encoded: Encoded) -> tuple[Input, ...]:
    table = {name: config.tables[owner] for name, owner in features_of(config.tables).items()}
    context = query_context(config)
    bag = {name: name == HISTORY or (name not in context and encoded.codes[name].ndim == 2) for name in names}
    return tuple(Input(name=name, dim=table[name].dim, bag=bag[name], pool=table[name].pool) for name in names)


def _extras(objective: Any, encoded: Encoded) -> dict[str, Extra]:
    if not isinstance(objective, InBatchSoftmax) or not objective.logq:
        return {}
    return {"frequencies": frequencies(int(encoded.codes["item"].max()) + 1, objective.decay)}


def frequencies(items: int, decay: float) -> Extra:
    """Returns the extra that counts in the state how often items occur; a step reads the counts before it."""
    return Extra(
        init=lambda params: no_frequencies(items),
        update=lambda value, params, sums, step, batch: count_items(value, batch["item"], decay),
        read=lambda value, batch: {"log_q": log_frequency(value, batch["item"], decay)},
    )
