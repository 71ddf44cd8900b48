"""The two baselines that a recommender must beat, most-popular and item-kNN, with the models' metrics and rank rule.

Plain numpy and scipy.sparse on the host: no mesh, no training, and never a dense items x items matrix.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int, Int64

from jaxops.core.failures import UserError, nearest
from jaxops.evaluate.ranking import COVERAGE, UNRANKED, Repeats, parse_metric

BLOCK_CELLS = 2**23
"""Number of scores held at once: 64 MiB of float64."""

Block = slice
Scorer = Callable[[Block], Float[np.ndarray, "block vocab"]]


def evaluate_baseline(
    name: str,
    items: Int[np.ndarray, " events"],
    offsets: Int64[np.ndarray, " users_plus_1"],
    train_end: Int64[np.ndarray, " users"],
    user: Int[np.ndarray, " queries"],
    history: Int64[np.ndarray, " queries"],
    target: Int[np.ndarray, " queries"],
    metrics: Sequence[str],
    *,
    n_items: int,
    slices: Mapping[str, Bool[np.ndarray, " queries"]] | None = None,
    repeats: Repeats = "exclude",
) -> dict[str, float]:
    """Evaluates `most_popular` or `item_knn` on the whole catalogue.

    A query asks where `target` ranks after the first `history` events of `user`. Metrics named `sampled_...` are left
    out: a baseline is quoted on the whole catalogue.

    Args:
      name: `most_popular` or `item_knn`.
      items: the items of all events, 1..n_items, grouped by user and in order of time.
      offsets: user u has the events `offsets[u]` to `offsets[u + 1]`.
      train_end: how many of each user's events, from the first on, are trained on.
      user: the user of each query.
      history: how many of that user's events come before the query.
      target: the item of each query.
      metrics: names of metrics, such as `ndcg@10`.
      n_items: the number of items in the catalogue.
      slices: masks over the queries, by name.
      repeats: `exclude` leaves seen items out of the ranking, and queries whose target was seen out of the metrics;
        `allow` ranks all items alike.

    Raises:
      UserError: the baseline or a metric is unknown.
    """
    if name not in BASELINES:
        raise UserError(f"unknown baseline '{name}'{nearest(name, BASELINES)}; known are {', '.join(BASELINES)}")
    parsed = [metric for metric in map(parse_metric, metrics) if not metric.sampled]
    train = prefixes(items, offsets, np.arange(len(train_end)), train_end, n_items=n_items)
    seen = prefixes(items, offsets, user, history, n_items=n_items)
    score = BASELINES[name](train, seen)
    hidden = seen if repeats == "exclude" else sp.csr_array(seen.shape)
    ranks = ranks_of(score, hidden, target, n_items=n_items)
    fresh = hidden[np.arange(len(target)), target] == 0 if len(target) else np.ones(0, bool)
    parts = {"": np.ones(len(ranks), bool)} | {f"[{name}]": mask for name, mask in (slices or {}).items()}
    masks = np.stack(list(parts.values()))
    counted = masks & fresh
    sizes = counted.sum(1)
    out: dict[str, float] = {}
    for metric in parsed:
        if metric.kind == COVERAGE:
            found = coverage(score, hidden, metric.k, masks, n_items=n_items)
        else:
            gains = metric.gain(ranks).astype(np.float64)
            found = counted @ gains / np.maximum(sizes, 1)
            found = np.where(sizes > 0, found, np.nan)
        out |= {f"{metric.name}{part}": float(value) for part, value in zip(parts, found, strict=True)}
    return out


def prefixes(
    items: Int[np.ndarray, " events"],
    offsets: Int64[np.ndarray, " users_plus_1"],
    user: Int[np.ndarray, " rows"],
    length: Int64[np.ndarray, " rows"],
    *,
    n_items: int,
) -> sp.csr_array:
    """Returns a sparse [rows, n_items + 1] matrix: a 1.0 for each of the first `length[r]` events of `user[r]`.

    Repeated items stay separate entries.

    Args:
      items: item of each event, 1..n_items.
      offsets: where each user's events begin, and where the last user's end.
      user: user of each row.
      length: number of events in each row.
      n_items: size of the catalogue.
    """
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(length, dtype=np.int64)])
    position = np.arange(bounds[-1]) + np.repeat(offsets[user] - bounds[:-1], length)
    events = np.asarray(items[position], np.int64)
    return sp.csr_array((np.ones(len(events)), events, bounds), shape=(len(user), n_items + 1))


def most_popular(train: sp.csr_array, seen: sp.csr_array) -> Scorer:
    """Scores each item by its number of train events, for every user alike."""
    counts = np.bincount(train.indices, minlength=train.shape[1]).astype(np.float64)
    return lambda block: np.tile(counts, (seen[block].shape[0], 1))


def item_knn(train: sp.csr_array, seen: sp.csr_array, *, neighbours: int = 100, shrinkage: float = 10.0) -> Scorer:
    """Scores each item by the sum of its similarities to the events of the history.

    Similarity is the cosine of the items' binary user vectors, damped for rare pairs: n_ij / (sqrt(n_i n_j) +
    shrinkage). Each item keeps only its `neighbours` most similar items (equal ones by index), never itself. Deshpande
    and Karypis 2004, "Item-based top-N recommendation algorithms".

    Args:
      train: train events, [users, n_items + 1].
      seen: history of each query, [queries, n_items + 1].
      neighbours: number of similar items that each item keeps.
      shrinkage: constant that damps rare pairs.
    """
    similar = item_similarity(train, neighbours=neighbours, shrinkage=shrinkage)
    return lambda block: (seen[block] @ similar).toarray()


def item_similarity(train: sp.csr_array, *, neighbours: int, shrinkage: float) -> sp.csr_array:
    """Returns a sparse [vocab, vocab] matrix whose row i holds the similarities of item i's nearest items."""
    binary = train.copy()
    binary.sum_duplicates()
    binary.data[:] = 1.0
    by_item = binary.T.tocsr()
    norms = np.sqrt(np.diff(by_item.indptr))
    vocab = binary.shape[1]
    size = min(max(1, BLOCK_CELLS // vocab), 2**15)
    blocks = []
    for start in range(0, vocab, size):
        shared = sp.csr_array(by_item[start : start + size] @ binary)
        shared.sort_indices()
        pairs = shared.tocoo()
        row, column = pairs.row, pairs.col
        similarity = pairs.data / (norms[row + start] * norms[column] + shrinkage)
        similarity[row + start == column] = -1.0
        # Sorts by row, similarity and column: stable sorts, least significant key first (numpy sorts int16 by radix).
        order = np.argsort(-similarity, kind="stable")
        order = order[np.argsort(row[order].astype(np.int16), kind="stable")]
        row, column, similarity = row[order] + start, column[order], similarity[order]
        place = np.arange(len(row)) - np.searchsorted(row, row)
        near = (place < neighbours) & (similarity > 0)
        blocks.append((row[near], column[near], similarity[near]))
    row, column, similarity = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return sp.coo_array((similarity, (row, column)), shape=(vocab, vocab)).tocsr()


def ranks_of(
    score: Scorer, seen: sp.csr_array, target: Int[np.ndarray, " queries"], *, n_items: int
) -> Int64[np.ndarray, " queries"]:
    """Computes `ranking.target_ranks` on the host, block by block, in float64; a test holds the two equal.

    Args:
      score: scores of a block of queries.
      seen: history of each query, [queries, n_items + 1].
      target: item of each query whose rank is asked for.
      n_items: size of the catalogue.
    """
    ranks = np.empty(len(target), np.int64)
    size = max(1, BLOCK_CELLS // (n_items + 1))
    item = np.arange(n_items + 1)
    for start in range(0, len(target), size):
        block = slice(start, min(start + size, len(target)))
        scores, wanted = score(block), target[block, None]
        row = np.arange(len(wanted))[:, None]
        own = scores[row, np.clip(wanted, 0, n_items)]
        _hide(scores, seen[block])
        ahead: Bool[np.ndarray, "block vocab"] = (scores > own) | ((scores == own) & (item < wanted))
        valid = np.isfinite(own) & (wanted >= 1) & (wanted <= n_items)
        ranks[block] = np.where(valid, ahead.sum(1, keepdims=True), UNRANKED)[:, 0]
    return ranks


def coverage(
    score: Scorer, seen: sp.csr_array, k: int, masks: Bool[np.ndarray, "parts queries"], *, n_items: int
) -> Float[np.ndarray, " parts"]:
    """Returns the share of the catalogue among the `k` best unseen items of any query, for each part of the queries.

    `ranking.coverage_sums` is the same on devices.

    Args:
      score: scores of a block of queries.
      seen: history of each query, [queries, n_items + 1].
      k: number of items recommended to each query.
      masks: the queries of each part.
      n_items: size of the catalogue.
    """
    size = max(1, BLOCK_CELLS // (n_items + 1))
    found = np.zeros((len(masks), n_items + 1), bool)
    k = min(k, n_items)
    for start in range(0, seen.shape[0], size):
        block = slice(start, min(start + size, seen.shape[0]))
        scores = score(block)
        _hide(scores, seen[block])
        least = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
        better, level = scores > least, (scores == least) & np.isfinite(scores)
        room = k - better.sum(1, keepdims=True)  # equal scores by index, as in the ranks
        best = better | (level & (np.cumsum(level, axis=1) <= room))
        for part, mask in enumerate(masks[:, block]):
            found[part] |= best[mask].any(0)
    return found.sum(1) / n_items


def _hide(scores: Float[np.ndarray, "block vocab"], seen: sp.csr_array) -> None:
    """Sets the scores of padding and of seen items to -inf, so that they are never recommended."""
    past = seen.tocoo()
    scores[:, 0] = -np.inf
    scores[past.row, past.col] = -np.inf


BASELINES: dict[str, Callable[[sp.csr_array, sp.csr_array], Scorer]] = {
    "most_popular": most_popular,
    "item_knn": item_knn,
}
