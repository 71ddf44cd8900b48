"""Two-tower retrieval put together: features of users and items, in-batch softmax with logQ, full ranking."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxops.config.types import ByPath
from jaxops.core.accumulate import Objective
from jaxops.core.failures import UserError
from jaxops.core.state import Params
from jaxops.core.step import Extra
from jaxops.core.sums import Sums
from jaxops.data.interactions.events import ColumnBatches, EntityBatches, EventSource, WithColumns
from jaxops.data.interactions.open import RecData
from jaxops.data.interactions.queries import QueryBatches, seen_width
from jaxops.data.interactions.spec import InteractionsFile
from jaxops.evaluate.grouped import with_slices
from jaxops.evaluate.ranking import evaluate_scores
from jaxops.families.rec.config import InBatchSoftmax, RecConfig
from jaxops.families.rec.entities import Encoded, encode, feature_columns, feature_names
from jaxops.families.rec.slices import slice_columns
from jaxops.families.rec.tables_config import features_of, match
from jaxops.models.inputs import Input
from jaxops.models.two_tower import TwoTower, TwoTowerConfig
from jaxops.objectives.retrieval import count_items, in_batch_softmax, log_frequency, no_frequencies
from jaxops.run.callables import require_callable
from jaxops.run.task import Catalogue, EvalBatches, Ranking, Task

HISTORY = "history"
"""The feature that holds what a user did before: a bag of items, which shares the items' ids."""


def build_retrieval(
    config: RecConfig,
    data: RecData,
    inspection: dict[str, Any],
    baselines: Callable[[], dict[str, dict[str, float]]] | None,
    resolved: dict[str, Any],
    objective: Callable[[Any], Objective] | None,
) -> Task:
    """The task of `model: {kind: two_tower}`.

    Raises:
      UserError: a feature that the data lacks, that has no table, or a table that nobody reads.
    """
    assert isinstance(config.model, TwoTowerConfig)
    inter, split = data.inter, data.split
    encoded = _encoded(config, data)
    ranking = two_tower_ranking(config, encoded, inter.n_items)
    model, columns = ranking.model, ranking.columns
    slices = slice_columns(config.evaluate.slices, data)
    extras, made = _objective(config, model, encoded, objective)
    size, history, seen = config.batch.global_, config.model.history, seen_width(split.valid, split.test)

    def batches(part: Any, size: int) -> EvalBatches:
        return ColumnBatches(QueryBatches(inter, part, history, size, seen=seen), {**columns, **slices})

    return Task(
        config=config,
        resolved=resolved,
        model=model,
        objective=made,
        source=WithColumns(EventSource(inter, split, history, config.run.seed), columns),
        evaluations={
            name: functools.partial(batches, part)
            for name, part in (("valid", split.valid), ("test", split.test))
            if len(part)
        },
        metrics=_metrics(config, ranking),
        rules=[(pattern, axes) for pattern, axes in config.sharding.rules] + model.rules,
        logical=config.sharding.logical,
        loss_weights=config.loss_weights,
        inspection=inspection,
        transform={
            "item_ids": np.asarray(inter.item_ids.values),
            "user_ids": np.asarray(inter.user_ids.values),
            **encoded.frozen([name for name in encoded.codes if name not in inter.contexts]),
        },
        baselines=baselines,
        block=(config.objective.block or size) if isinstance(config.objective, InBatchSoftmax) else 1,
        tables=encoded.specs,
        extras=extras,
        catalogue=ranking.catalogue,
    )


def two_tower_ranking(config: RecConfig, encoded: Encoded, n_items: int) -> Ranking:
    """Both towers for these features."""
    assert isinstance(config.model, TwoTowerConfig)
    model = TwoTower(
        config.model, *(_inputs(names, config, encoded) for names in (config.model.user, config.model.item))
    )
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
    )


def query_context(config: RecConfig) -> tuple[str, ...]:
    """The context columns that the user's tower reads: a query brings them along."""
    assert isinstance(config.model, TwoTowerConfig)
    known = config.data.columns.context if isinstance(config.data, InteractionsFile) else ()
    return tuple(name for name in config.model.user if name in known)


def _encoded(config: RecConfig, data: RecData) -> Encoded:
    """Codes and specs of the features that both towers read."""
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
    encoded = encode(config.tables, owner, {**found, HISTORY: found["item"]})
    if HISTORY in encoded.codes:
        codes = encoded.codes[HISTORY].copy()
        codes[0] = -1  # fewer items than fit the bag
        encoded.codes[HISTORY] = codes
    encoded.add_nobody([name for name in model.user if name not in (HISTORY, *context)])
    return encoded


def _inputs(names: tuple[str, ...], config: RecConfig, encoded: Encoded) -> list[Input]:
    table = {name: config.tables[owner] for name, owner in features_of(config.tables).items()}
    context = query_context(config)
    bag = {name: name == HISTORY or (name not in context and encoded.codes[name].ndim == 2) for name in names}
    return [Input(name=name, dim=table[name].dim, bag=bag[name], pool=table[name].pool) for name in names]


def _objective(
    config: RecConfig, model: TwoTower, encoded: Encoded, given: Callable[[Any], Objective] | None
) -> tuple[dict[str, Extra], Objective]:
    chosen, extras = config.objective, dict[str, Extra]()
    if given is not None or isinstance(chosen, ByPath):
        made = given(model) if given is not None else chosen.call(model)  # type: ignore[union-attr]
        require_callable("objective: what the factory returned", made, "params", "batch", "key")
        return extras, made
    assert isinstance(chosen, InBatchSoftmax)
    if chosen.logq:
        extras["frequencies"] = frequencies(int(encoded.codes["item"].max()) + 1, chosen.decay)
    return extras, in_batch_softmax(model, chosen.block or config.batch.global_, temperature=chosen.temperature)


def frequencies(items: int, decay: float) -> Extra:
    """How often items come up, counted in the state; a step reads what was known before it."""
    return Extra(
        init=lambda params: no_frequencies(items),
        update=lambda value, params, sums, step, batch: count_items(value, batch["item"], decay),
        read=lambda value, batch: {"log_q": log_frequency(value, batch["item"], decay)},
    )


def _metrics(config: RecConfig, ranking: Ranking) -> Callable[[Params, Mapping[str, Any]], Sums]:
    def metrics(params: Params, batch: Mapping[str, Array]) -> Sums:
        users, items = ranking.queries(params, batch), ranking.items(params)
        scores = jnp.einsum("ud,id->ui", users, items, preferred_element_type=jnp.float32)
        sums = lambda batch: evaluate_scores(scores, batch, config.evaluate.metrics, n_items=ranking.n_items)
        return with_slices(sums, batch)

    return metrics
