"""Models that rank items for users, in the form that evaluation and serving use, whatever the model is."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxops.core.state import Params
from jaxops.core.sums import Sums
from jaxops.data.interactions.inspect import describe, histogram_of
from jaxops.data.interactions.open import RecData
from jaxops.evaluate.baselines import evaluate_baseline
from jaxops.evaluate.grouped import with_slices
from jaxops.evaluate.ranking import evaluate_scores, is_sampled
from jaxops.families.rec.config import RecConfig
from jaxops.families.rec.slices import slice_columns, slice_masks
from jaxops.run.batched import BatchedEvaluation
from jaxops.run.config import Evaluate
from jaxops.run.passes import Passes
from jaxops.run.task import About, EvalBatches
from jaxops.run.weights import Weights
from jaxops.tables.spec import TableSpec

BASELINES = {"most_popular": "Most popular", "item_knn": "Item-kNN"}
"""The baselines that a ranker is compared with, with names for people."""
RANKED = (
    "Each target is ranked against the whole catalogue without the items its user has already seen; equal scores are"
    " ordered by item."
)
SAMPLED_RANKED = (
    "Columns marked sampled rank against 100 random items only: they are far higher, and can order models differently."
)
NOTE = "ranked over the whole catalogue, seen items removed"


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
      queries: (params, batch) -> vectors of users [batch, dim].
      items: params -> vectors of items [rows, dim]; row i is item i, 1 <= i <= n_items.
      columns: by feature, the batch entry with the rows to look it up, and its codes by row.
      context: context columns whose values come with a query, each with the batch entry with the rows to look it up:
        `id` for a column of the prediction, `events` for one of each event of the history.
      tables: the embedding tables by name.
      catalogue: the pass over all items, for a model whose item vectors are not a parameter.
      by_user: true where the model reads the user's row.
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
    ranking: Ranking, metrics: tuple[str, ...], batches: Mapping[str, Callable[[int], EvalBatches]]
) -> BatchedEvaluation:
    """Returns the evaluation of a ranker over the whole catalogue, on all queries and on the slices in its batches."""

    def sums(params: Params, batch: Mapping[str, Array]) -> Sums:
        scores = ranking.scores(params, batch)
        return with_slices(lambda part: evaluate_scores(scores, part, metrics, n_items=ranking.n_items), batch)

    catalogue = ranking.catalogue
    return BatchedEvaluation(
        batches, sums, prepare=None if catalogue is None else functools.partial(with_catalogue, catalogue)
    )


def baselines(data: RecData, evaluate: Evaluate) -> dict[str, dict[str, float]]:
    """Computes the metrics of most-popular and item-kNN on the same queries: {"item_knn": {"valid/hr@10": ...}}."""
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


def about(config: RecConfig, inspection: dict[str, Any]) -> About:
    """Returns the description of a ranker for people; `inspection` is empty for data of the user's own."""
    return About(
        model=getattr(type(config.model), "label", config.model.kind),
        labels=BASELINES,
        headline="ndcg@10",
        data=describe(inspection) if inspection else (),
        histogram=histogram_of(inspection),
        note=NOTE,
        notes=[RANKED, SAMPLED_RANKED] if any(map(is_sampled, config.evaluate.metrics)) else [RANKED],
    )
