"""Models that rank items for users, whatever they are: what evaluation and serving ask of one."""

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
"""What a ranker has to beat, with names for people."""
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
    """Vectors of all items, made by a pass over them; a scorer finds them as `params["catalogue"]` [rows, dim].

    Attributes:
      batches: given a size, the items' features by row 0, 1, ... (what is beyond `rows` in the last is dropped).
      vectors: (params, batch) -> [batch, dim].
    """

    rows: int
    batches: Callable[[int], EvalBatches]
    vectors: Callable[[Params, Mapping[str, Any]], Array]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """A model whose scores are products of a user's vector with those of the items.

    Attributes:
      length: how many of the latest items a query holds, `items` [batch, length].
      queries: (params, batch) -> [batch, dim].
      items: params -> [rows, dim]; row i is item i, 1 <= i <= n_items.
      columns: features of a batch: the entry whose rows they are read by, and their codes by row.
      context: columns of events that a query brings along, by name the entry whose rows they are read by: `id`, the
        circumstances that are asked in, or `events`, those of each event of the history.
      by_user: the model reads the row of the user who asks.
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
        """The score of every item for each query, float32 out of the product itself: rounded scores would tie."""
        users, items = self.queries(params, batch), self.items(params)
        return jnp.einsum("ud,id->ui", users, items, preferred_element_type=jnp.float32)


def with_catalogue(catalogue: Catalogue, passes: Passes, weights: Weights) -> Weights:
    """The weights with the vectors of all items beside them, as `params["catalogue"]`."""
    parts = passes.over("catalogue", catalogue.vectors, weights, catalogue.batches(passes.size))
    vectors = jnp.concatenate(list(parts))[: catalogue.rows]
    return Weights({**weights.params, "catalogue": vectors}, weights.tables)


def ranking_evaluation(
    ranking: Ranking, metrics: tuple[str, ...], batches: Mapping[str, Callable[[int], EvalBatches]]
) -> BatchedEvaluation:
    """The evaluation of a ranker over the whole catalogue, and over the slices that its batches carry."""

    def sums(params: Params, batch: Mapping[str, Array]) -> Sums:
        scores = ranking.scores(params, batch)
        return with_slices(lambda part: evaluate_scores(scores, part, metrics, n_items=ranking.n_items), batch)

    catalogue = ranking.catalogue
    return BatchedEvaluation(
        batches, sums, prepare=None if catalogue is None else functools.partial(with_catalogue, catalogue)
    )


def baselines(data: RecData, evaluate: Evaluate) -> dict[str, dict[str, float]]:
    """What most-popular and item-kNN reach on the same queries, as {"item_knn": {"valid/hr@10": ...}}."""
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
    """What people read of a ranker; of data of the user's own nothing is known."""
    return About(
        model=getattr(type(config.model), "label", config.model.kind),
        labels=BASELINES,
        headline="ndcg@10",
        data=describe(inspection) if inspection else (),
        histogram=histogram_of(inspection),
        note=NOTE,
        notes=[RANKED, SAMPLED_RANKED] if any(map(is_sampled, config.evaluate.metrics)) else [RANKED],
    )
