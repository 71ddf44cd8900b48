"""Ranks of held-out items: exact over the whole catalogue, ties by item index; sampled only in metrics named so.

Items are numbered 1..n_items. Column 0 of the scores is padding, and columns above n_items are vocabulary padding.
Everything here is pure and per example, so any cut of the evaluation set into batches merges to the same numbers.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxops.core.failures import UserError, nearest
from jaxops.core.metric import Metric, label_of
from jaxops.core.sums import Sum, Sums

A = TypeVar("A", Array, np.ndarray)

Repeats = Literal["exclude", "allow"]
"""Whether a user may be recommended what they have had before."""
UNRANKED = np.iinfo(np.int32).max
"""The rank of a target that cannot be ranked: a miss at every K."""
KINDS = ("hr", "recall", "ndcg", "mrr")
COVERAGE = "coverage"
"""Coverage measures the recommendations of all examples together; the other kinds measure the rank of each target."""
SAMPLED = "sampled_"
SAMPLED_NEGATIVES = 100
_NAME = re.compile(rf"(?:({SAMPLED})?({'|'.join(KINDS)})|({COVERAGE}))@([1-9][0-9]*)")
SAMPLED_SEED = 20
"""Sampled negatives depend only on this seed and the example's id, so two models are compared on the same ones."""


@dataclasses.dataclass(frozen=True)
class RankMetric:
    """One parsed metric name: `ndcg@10`, or `sampled_ndcg@10` for the rank among 100 random negatives."""

    name: str
    kind: str
    k: int
    sampled: bool

    def gain(self, ranks: Int[A, " batch"]) -> Float[A, " batch"]:
        """Returns what each example adds to the mean, in [0, 1], from its 0-based rank; zero from rank k on.

        With a single relevant item, recall equals the hit rate and the ideal DCG is one (Järvelin and Kekäläinen 2002).
        Coverage does not depend on the target's rank, so its gain is NaN.
        """
        xp = jnp if isinstance(ranks, jax.Array) else np
        place = ranks.astype(xp.float32) + 1.0
        if self.kind == COVERAGE:
            return xp.full_like(place, xp.nan)
        gains = {"hr": xp.ones_like(place), "ndcg": 1.0 / xp.log2(place + 1.0), "mrr": 1.0 / place}
        return xp.where(ranks < self.k, gains.get(self.kind, gains["hr"]), xp.zeros_like(place))


def parse_metric(name: str) -> RankMetric:
    """Reads `hr@K`, `recall@K`, `ndcg@K`, `mrr@K`, each also with `sampled_` in front, and `coverage@K`.

    Raises:
      UserError: the name is unknown; the message gives the nearest right one.
    """
    match = _NAME.fullmatch(name)
    if match:
        return RankMetric(name, match[2] or match[3], int(match[4]), match[1] is not None)
    digits = re.search(r"[1-9][0-9]*", name)
    k = digits[0] if digits else "10"
    known = [f"{prefix}{kind}@{k}" for prefix in ("", SAMPLED) for kind in KINDS] + [f"{COVERAGE}@{k}"]
    raise UserError(
        f"unknown metric '{name}'{nearest(name.lower(), known)}; known are hr@K, recall@K, ndcg@K and mrr@K "
        f"over the whole catalogue (K a whole number, 1 or more), the same with {SAMPLED} in front, "
        f"which rank among {SAMPLED_NEGATIVES} random items only, and {COVERAGE}@K, the share of the catalogue "
        "that anyone is recommended"
    )


def ranking_metric(name: str) -> Metric:
    """Returns the ranking metric of this name; higher is better for all of them.

    Raises:
      UserError: `parse_metric` does not know the name.
    """
    parsed = parse_metric(name)
    sampled = " (sampled)" if parsed.sampled else ""
    return Metric(name, "higher", label_of(name.removeprefix(SAMPLED)) + sampled)


def is_sampled(name: str) -> bool:
    """Returns True for a metric that ranks among sampled items only."""
    return name.startswith(SAMPLED)


def target_ranks(
    scores: Float[Array, "batch vocab"],
    target: Int[Array, " batch"],
    seen: Int[Array, "batch seen"],
    *,
    n_items: int,
) -> Int32[Array, " batch"]:
    """Returns the 0-based rank of each target among all items that its user has not seen.

    The order is that of a stable descending argsort: equal scores are ranked by item index. Seen items (0 is padding,
    repeats allowed) are left out, except the target itself. A target whose score is not finite, or that is no item of
    the catalogue, is `UNRANKED`. A rival whose score is NaN counts as ahead: a broken model cannot win by its NaNs.

    Args:
      scores: scores of all items.
      target: item whose rank is asked for.
      seen: items that the user has seen.
      n_items: size of the catalogue.
    """
    # The barrier rounds once for all readers: else XLA may recompute the scores in each fusion and split exact ties.
    scores = jax.lax.optimization_barrier(scores)
    target = target[:, None].astype(jnp.int32)
    own = _score_of(scores, target)
    items = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    rival = (items >= 1) & (items <= n_items) & (items != target)
    ahead = jnp.sum(rival & _ahead(scores, items, own, target), axis=1, dtype=jnp.int32)
    seen, distinct = _distinct(seen, n_items)
    removed = distinct & (seen != target) & _ahead(_score_of(scores, seen), seen, own, target)
    rank = ahead - jnp.sum(removed, axis=1, dtype=jnp.int32)
    valid = jnp.isfinite(own) & (target >= 1) & (target <= n_items)
    return jnp.where(valid[:, 0], rank, jnp.int32(UNRANKED))


def sampled_ranks(
    scores: Float[Array, "batch vocab"],
    target: Int[Array, " batch"],
    seen: Int[Array, "batch seen"],
    ids: Int[Array, " batch"],
    *,
    n_items: int,
) -> Int32[Array, " batch"]:
    """Returns the 0-based rank of each target among 100 unseen items, drawn uniformly with replacement.

    Use it only for comparison with papers that report it (SASRec, Kang and McAuley 2018): it can order models
    differently from the whole catalogue (Krichene and Rendle 2020). The draw depends only on the example's id.

    Args:
      scores: scores of all items.
      target: item whose rank is asked for.
      seen: items that the user has seen.
      ids: id of each example.
      n_items: size of the catalogue.
    """
    scores = jax.lax.optimization_barrier(scores)
    target = target[:, None].astype(jnp.int32)
    excluded, distinct = _distinct(jnp.concatenate([seen.astype(jnp.int32), target], axis=1), n_items)
    free = n_items - jnp.sum(distinct, axis=1, keepdims=True, dtype=jnp.int32)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(SAMPLED_SEED), i))(ids)
    shape = (SAMPLED_NEGATIVES,)
    draw = jax.vmap(lambda key, n: jax.random.randint(key, shape, 0, n))(keys, jnp.maximum(free[:, 0], 1))
    # The u-th free item (u from 0) is 1 + u + the number of excluded e_0 < e_1 < ... with e_j - j <= 1 + u.
    gap = excluded - (jnp.cumsum(distinct, axis=1, dtype=jnp.int32) - 1)
    skipped = distinct[:, None, :] & (gap[:, None, :] <= draw[:, :, None] + 1)
    negative = draw + 1 + jnp.sum(skipped, axis=2, dtype=jnp.int32)
    own = _score_of(scores, target)
    ahead = (free > 0) & _ahead(_score_of(scores, negative), negative, own, target)
    valid = jnp.isfinite(own) & (target >= 1) & (target <= n_items)
    return jnp.where(valid[:, 0], jnp.sum(ahead, axis=1, dtype=jnp.int32), jnp.int32(UNRANKED))


def ranking_sums(
    ranks: Int[Array, " batch"],
    weight: Float[Array, " batch"],
    metrics: Sequence[str],
    sampled: Int[Array, " batch"] | None = None,
) -> Sums:
    """Returns a mergeable weighted mean for each metric name.

    Args:
      ranks: rank of each target in the whole catalogue.
      weight: weight of each example, 0 for padding.
      metrics: names of metrics.
      sampled: rank of each target among sampled items, for the names with `sampled_`.

    Raises:
      UserError: a name is unknown.
      ValueError: a sampled name has no sampled ranks, or a name is coverage, which ranks do not give.
    """
    sums: Sums = {}
    for metric in map(parse_metric, metrics):
        if metric.kind == COVERAGE:
            raise ValueError(f"'{metric.name}' needs scores, not ranks: see coverage_sums")
        if metric.sampled and sampled is None:
            raise ValueError(f"'{metric.name}' needs sampled ranks")
        chosen = sampled if metric.sampled and sampled is not None else ranks
        sums[metric.name] = Sum.of(metric.gain(chosen), weight)
    return sums


def coverage_sums(
    scores: Float[Array, "batch vocab"],
    seen: Int[Array, "batch seen"],
    weight: Float[Array, " batch"],
    metrics: Sequence[str],
    *,
    n_items: int,
) -> Sums:
    """Returns `coverage@K`: the share of the catalogue among the K best unseen items (`top_k_unseen`) of any example.

    Examples of weight zero are recommended nothing; other weights count alike. Ge et al. 2010, "Beyond accuracy", call
    it catalogue coverage. The sums merge: they count how often each item was recommended.

    Args:
      scores: scores of all items.
      seen: items that the user has seen.
      weight: weight of each example, 0 for padding.
      metrics: names of coverage metrics.
      n_items: size of the catalogue.

    Raises:
      UserError: a name is unknown.
    """
    ks = {metric.name: metric.k for metric in map(parse_metric, metrics)}
    _, items = top_k_unseen(scores, seen, min(max(ks.values()), scores.shape[1]), n_items)
    items = jnp.where(weight[:, None] > 0, items, 0)
    none = jnp.zeros(n_items + 1, jnp.float32)
    sums: Sums = {}
    for name, k in ks.items():
        times = none.at[items[:, :k]].add(1.0)[1:]
        sums[name] = Sum(times, jnp.ones_like(times), _share_above_zero)
    return sums


def _share_above_zero(times: Float[np.ndarray, " items"]) -> float:
    return float(np.mean(times > 0)) if times.size else float("nan")


def evaluate_scores(
    scores: Float[Array, "batch vocab"],
    batch: Mapping[str, Array],
    metrics: Sequence[str],
    *,
    n_items: int,
    repeats: Repeats = "exclude",
) -> Sums:
    """Returns the ranking metrics of one evaluation batch, which holds `target`, `seen`, `id` and `weight`.

    Args:
      scores: scores of all items.
      batch: the evaluation batch.
      metrics: names of metrics, in the order of the result.
      n_items: size of the catalogue.

    With `repeats: exclude` what a user has seen is not recommended, so a query whose target they have seen counts for
    nothing; with `allow` seen items are ranked like all others.

    Args:
      scores: of each query and item.
      batch: the queries.
      metrics: their names.
      n_items: the size of the catalogue.
      repeats: as in the run's config.

    Raises:
      UserError: a metric name is unknown.
    """
    parsed = [parse_metric(name) for name in metrics]
    target, seen, everyone = batch["target"], batch["seen"], batch["weight"]
    if repeats == "allow":
        seen = jnp.zeros((seen.shape[0], 1), seen.dtype)
    known = jnp.any((seen == target[:, None]) & (target[:, None] > 0), axis=1)
    weight = jnp.where(known, jnp.zeros_like(everyone), everyone)
    ranked = [metric.name for metric in parsed if metric.kind != COVERAGE]
    covered = [metric.name for metric in parsed if metric.kind == COVERAGE]
    sums = coverage_sums(scores, seen, everyone, covered, n_items=n_items) if covered else {}
    if ranked:
        ranks = target_ranks(scores, target, seen, n_items=n_items)
        sampled = None
        if any(metric.sampled for metric in parsed):
            sampled = sampled_ranks(scores, target, seen, batch["id"], n_items=n_items)
        sums |= ranking_sums(ranks, weight, ranked, sampled)
    return {name: sums[name] for name in metrics}


def top_k_unseen(
    scores: Float[Array, "batch vocab"], seen: Int[Array, "batch seen"], k: int, n_items: int
) -> tuple[Float[Array, "batch k"], Int32[Array, "batch k"]]:
    """Returns the scores and the k best items that each user has not seen, best first, equal scores by item index.

    Items whose score is not finite are never returned. Where fewer than k are left, the row ends in item 0, score -inf.

    Args:
      scores: scores of all items.
      seen: items that the user has seen; 0 is padding.
      k: number of items.
      n_items: size of the catalogue.
    """
    vocab = scores.shape[1]
    items = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    allowed = (items >= 1) & (items <= n_items) & jnp.isfinite(scores)
    scores = jnp.where(scores == 0, jnp.zeros_like(scores), scores)  # lax.top_k orders -0.0 behind 0.0
    scores = jnp.where(allowed, scores, -jnp.inf)
    rows = jax.lax.broadcasted_iota(jnp.int32, seen.shape, 0)
    scores = scores.at[rows, seen].set(-jnp.inf)
    best, found = jax.lax.top_k(scores, min(k, vocab))
    found = jnp.where(best > -jnp.inf, found, 0)
    missing = ((0, 0), (0, k - found.shape[1]))
    return jnp.pad(best, missing, constant_values=-jnp.inf), jnp.pad(found, missing)


def _score_of(scores: Float[Array, "batch vocab"], items: Int[Array, "batch n"]) -> Float[Array, "batch n"]:
    """Returns the score of each item, NaN for an item outside the scores."""
    return jnp.take_along_axis(scores, items, axis=1, mode="fill", fill_value=jnp.nan)


def _ahead(
    scores: Float[Array, "batch n"],
    items: Int[Array, "batch n"],
    own: Float[Array, "batch 1"],
    target: Int[Array, "batch 1"],
) -> Bool[Array, "batch n"]:
    """Returns True where an item stands before the target in a stable descending argsort."""
    return (scores > own) | jnp.isnan(scores) | ((scores == own) & (items < target))


def _distinct(items: Int[Array, "batch n"], n_items: int) -> tuple[Int32[Array, "batch n"], Bool[Array, "batch n"]]:
    """Sorts each row and marks the entries that are the first of their value and an item of the catalogue."""
    items = jnp.sort(items.astype(jnp.int32), axis=1)
    first = jnp.diff(items, axis=1, prepend=jnp.int32(0)) != 0
    return items, first & (items >= 1) & (items <= n_items)
