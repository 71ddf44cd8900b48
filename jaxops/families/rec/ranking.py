"""Models that rank items for users, in the form that evaluation and serving use, whatever the model is."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxops.core.state import Params
from jaxops.core.sums import Sums
from jaxops.data.interactions.inspect import describe, histogram_of, inspect
from jaxops.data.interactions.open import RecData
from jaxops.data.slices import SLICE
from jaxops.evaluate.baselines import evaluate_baseline
from jaxops.evaluate.grouped import sliced, with_slices
from jaxops.evaluate.ranking import COVERAGE, Repeats, evaluate_scores, is_sampled
from jaxops.families.rec.config import RecConfig
from jaxops.families.rec.repeats import count_repeats, describe_repeats, repeats_notices
from jaxops.families.rec.slices import slice_columns, slice_masks
from jaxops.run.batched import BatchedEvaluation
from jaxops.run.passes import Passes
from jaxops.run.task import About, EvalBatches
from jaxops.run.weights import Weights
from jaxops.tables.spec import TableSpec

BASELINES = {"most_popular": "Most popular", "item_knn": "Item-kNN"}
"""What a ranker has to beat, with names for people."""
RANKED: Mapping[Repeats, str] = {
    "exclude": (
        "Each target is ranked against the whole catalogue without the items its user has already seen; a target that"
        " they have seen themselves is left out. Equal scores are ordered by item."
    ),
    "allow": (
        "Each target is ranked against the whole catalogue, with the items its user has already seen; equal scores are"
        " ordered by item."
    ),
}
TRAINED_ALONE = (
    "Items that training never saw are not recommended, so as a target they are a miss; the slice cold_item ranks them"
    " among all."
)
SAMPLED_RANKED = (
    "Columns marked sampled rank against 100 random items only: they are far higher, and can order models differently."
)
NOTE: Mapping[Repeats, str] = {
    "exclude": "ranked over the whole catalogue, seen items removed",
    "allow": "ranked over the whole catalogue, seen items among it",
}
COLD_ITEM = f"{SLICE}cold_item"


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Vectors of all items, made by a pass over the items; scorers read them from `params["catalogue"]` [rows, dim].

    Attributes:
      rows: the number of item rows.
      batches: a function from a batch size to batches of the items' features, in the order of rows. Entries of the last
        batch beyond `rows` are dropped.
      vectors: (params, batch) -> vectors [batch, dim].
    """

    rows: int
    batches: Callable[[int], EvalBatches]
    vectors: Callable[[Params, Mapping[str, Any]], Array]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """A model whose scores are products of a user's vector with the vectors of items.

    Attributes:
      model: the model itself.
      n_items: the number of items.
      length: how many of the latest items a query holds, `items` [batch, length].
      queries: (params, batch) -> [batch, dim].
      items: params -> [rows, dim]; row i is item i, 1 <= i <= n_items.
      columns: features of a batch: the entry whose rows they are read by, and their codes by row.
      context: columns of events that a query brings along, by name the entry whose rows they are read by: `id`, the
        circumstances that are asked in, or `events`, those of each event of the history.
      by_user: the model reads the row of the user who asks.
      trained: by item row, whether training saw the item, where the vectors of others are random.
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
    by_user: bool = False
    trained: Bool[np.ndarray, " rows"] | None = None

    def scores(self, params: Params, batch: Mapping[str, Any]) -> Float[Array, "batch rows"]:
        """Returns the score of every item for each query. The product itself is float32, since rounded scores tie."""
        users, items = self.queries(params, batch), self.items(params)
        return jnp.einsum("ud,id->ui", users, items, preferred_element_type=jnp.float32)


def with_catalogue(catalogue: Catalogue, passes: Passes, weights: Weights) -> Weights:
    """Computes the vectors of all items and returns the weights with them as `params["catalogue"]`."""
    parts = passes.over("catalogue", catalogue.vectors, weights, catalogue.batches(passes.size))
    vectors = jnp.concatenate(list(parts))[: catalogue.rows]
    return Weights({**weights.params, "catalogue": vectors}, weights.tables)


def ranking_evaluation(
    ranking: Ranking, config: RecConfig, batches: Mapping[str, Callable[[int], EvalBatches]]
) -> BatchedEvaluation:
    """Builds the evaluation of a ranker over the whole catalogue, and over the slices that its batches carry.

    What is not recommended is not ranked: items that a user has seen, by `repeats`, and items that training never saw,
    where `untrained_items` leaves them out. Only the slice of cold items ranks those among all others.
    """
    metrics = config.evaluate.metrics
    trained = ranking.trained if config.untrained_items == "exclude" else None

    def judged(scores: Array, part: Mapping[str, Array]) -> Sums:
        return evaluate_scores(scores, part, metrics, n_items=ranking.n_items, repeats=config.repeats)

    def sums(params: Params, batch: Mapping[str, Array]) -> Sums:
        scores = ranking.scores(params, batch)
        if trained is None:
            return with_slices(functools.partial(judged, scores), batch)
        ranked = jnp.where(trained[None], scores[:, : len(trained)], -jnp.inf)
        found = with_slices(functools.partial(judged, ranked), {n: x for n, x in batch.items() if n != COLD_ITEM})
        if COLD_ITEM in batch:
            cold = {COLD_ITEM.removeprefix(SLICE): batch[COLD_ITEM]}
            found |= sliced(lambda weight: judged(scores, {**batch, "weight": weight}), cold, batch["weight"])
        return found

    catalogue = ranking.catalogue
    return BatchedEvaluation(
        batches, sums, prepare=None if catalogue is None else functools.partial(with_catalogue, catalogue)
    )


def baselines(data: RecData, config: RecConfig) -> dict[str, dict[str, float]]:
    """Evaluates most-popular and item-kNN on the same queries; returns {"item_knn": {"valid/hr@10": ...}}."""
    inter, split, evaluate = data.inter, data.split, config.evaluate
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
                repeats=config.repeats,
            )
            out[name] |= {f"{part}/{metric}": value for metric, value in values.items()}
    return out


def inspected(data: RecData) -> dict[str, Any]:
    """Returns the summary that `inspect` gives of the data, with the number of repeats."""
    return {**inspect(data), "repeats": count_repeats(data)}


def described(inspection: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the outcome of `inspected` as (what, how much) rows for a table."""
    *rows, digest = describe(inspection)
    return [*rows, ("repeats", describe_repeats(inspection["repeats"], inspection["split"])), digest]


def undefined_of(config: RecConfig, inspection: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Returns the metrics that no model can have, as {part: {metric: reason}}.

    Metrics of ranks are undefined on a part where every target is a repeat and repeats are excluded.
    """
    found: dict[str, dict[str, str]] = {}
    for part in ("valid", "test"):
        count = inspection["split"][part]
        if config.repeats == "exclude" and count and inspection["repeats"][part] == count:
            why = f"all {count:,} targets are items that their users have had before (repeats: exclude)"
            ranks = [name for name in config.evaluate.metrics if not name.startswith(COVERAGE)]
            found[part] = dict.fromkeys(ranks, why)
    return found


def notices_of(config: RecConfig, inspection: dict[str, Any], untrained: int = 0) -> tuple[str, ...]:
    """Returns lines to show before training: about repeats, and about `untrained` items, which are not recommended."""
    found = repeats_notices(inspection["repeats"], inspection["split"], config.repeats)
    if untrained:
        found.append(
            f"untrained_items: exclude: {untrained:,} of {inspection['items']:,} items have no training event: they are"
            " not recommended, and as a target they are a miss (untrained_items=allow ranks them by their random rows)"
        )
    return tuple(found)


def about(config: RecConfig, inspection: dict[str, Any], trained_alone: bool = False) -> About:
    """Returns the texts about a ranker and its data that reports show; without an inspection none about the data."""
    notes = [RANKED[config.repeats]]
    notes += [SAMPLED_RANKED] if any(map(is_sampled, config.evaluate.metrics)) else []
    notes += [TRAINED_ALONE] if trained_alone else []
    return About(
        model=getattr(type(config.model), "label", config.model.kind),
        labels=BASELINES,
        data=described(inspection) if inspection else (),
        histogram=histogram_of(inspection),
        note=NOTE[config.repeats],
        notes=notes,
    )
