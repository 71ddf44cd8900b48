"""Metrics within groups and on parts of the examples: exact AUC by user, and any metric by slice.

Tested in tests/evaluate/test_grouped.py, against numpy in float64.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxops.core.failures import UserError
from jaxops.core.sums import Max, Sum, Sums
from jaxops.data.slices import SLICE

Values = Float[np.ndarray, " _"] | Int[np.ndarray, " _"] | Bool[np.ndarray, " _"]
"""One value for each example; the length is left open, so that an error of ours reports lengths that differ."""


def group_auc_sums(
    logits: Float[Array, " batch"],
    ids: Int[Array, " batch"],
    weight: Float[Array, " batch"],
    n: int,
    finalizer: Callable[[np.ndarray], float],
) -> Sum:
    """Collects the logit of every evaluation example, so that `finalizer` gets all of them, float64 [n], on the host.

    An order needs all scores at once. `2 n` float32 on each device hold them, however the data is cut into batches. An
    example that was not evaluated is NaN; one whose logit is not finite is infinite.

    Args:
      logits: logits of this batch.
      ids: which examples these are, 0..n-1; others are left out.
      weight: 0 for examples that are left out (padding, examples outside a slice); other weights count alike.
      n: number of examples in the evaluation.
      finalizer: a function that equals itself from call to call (it is part of a compiled program).
    """
    there = (weight > 0) & (ids >= 0)
    at = jnp.where(there, ids, n)  # an index beyond the last is dropped
    kept = jnp.where(jnp.isfinite(logits), logits, jnp.inf).astype(jnp.float32)
    zeros = jnp.zeros(n, jnp.float32)
    return Sum(zeros.at[at].add(kept, mode="drop"), zeros.at[at].add(1.0, mode="drop"), finalizer)


class GroupAuc:
    """AUC within each group (user, session), averaged with the groups' impressions as weights.

    This is "GAUC" of Zhu et al. 2017, "Optimized cost per click in Taobao display advertising", and Zhou et al. 2018,
    "Deep interest network". It measures the order of each user's own items, which AUC over all examples mixes with
    telling users apart. It is exact; equal logits count half.
    """

    def __init__(self, labels: Values, groups: Shaped[np.ndarray, " _"], weights: Values | None = None):
        """Keeps the labels, groups and weights of the evaluation examples 0..n-1 on the host.

        Args:
          labels: 1 for a click, 0 for none, NaN where that is not known (left out).
          groups: ids of any kind.
          weights: weight of each example; default 1. A group's weight is the sum of its examples' weights.

        Raises:
          UserError: the lengths differ, a label is neither 0 nor 1, or a weight is negative or not finite.
        """
        self._labels = np.asarray(labels, np.float64)
        self._weights = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
        if not len(labels) == len(groups) == len(self._weights):
            lengths = f"{len(labels)} labels, {len(groups)} groups, {len(self._weights)} weights"
            raise UserError(f"gauc: one of each for every example is needed, but there are {lengths}")
        other = ~(np.isin(self._labels, (0, 1)) | np.isnan(self._labels))
        if other.any():
            raise UserError(f"gauc: labels are 0 or 1 (NaN where unknown), but one is {self._labels[other][0]:g}")
        if not (np.isfinite(self._weights) & (self._weights >= 0)).all():
            raise UserError("gauc: a weight is negative or not finite")
        self._groups = np.unique(groups, return_inverse=True)[1]

    def sums(self, logits: Float[Array, " batch"], batch: Mapping[str, Array]) -> Sums:
        """Returns {"gauc": ...} for a batch that holds `id` (0..n-1, each evaluated once) and `weight`."""
        found = group_auc_sums(logits, batch["id"], batch["weight"], len(self._labels), self.value)
        return {"gauc": found}

    def value(self, logits: Float[np.ndarray, " n"]) -> float:
        """Returns the mean over the groups that have both a click and a non-click; NaN if there are none.

        Examples whose logit is NaN are left out. One infinite logit makes the result NaN: a broken model has no order.
        """
        used = ~np.isnan(logits) & ~np.isnan(self._labels) & (self._weights > 0)
        if np.isinf(logits[used]).any():
            return float("nan")
        areas, weights = _areas(*(part[used] for part in (self._groups, logits, self._labels, self._weights)))
        both = ~np.isnan(areas)
        return float(np.sum(areas[both] * weights[both]) / np.sum(weights[both])) if both.any() else float("nan")


class Scores:
    """Collects the logits of all examples of a part, from which the host computes AUC and GAUC exactly.

    While the part is evaluated they take 2 x examples x labels float32 on each device, whatever the size of a batch.
    """

    def __init__(self, examples: int):
        """Makes room for examples 0..examples-1.

        Args:
          examples: the number of examples in the longest part. All parts share one shape, so one program.
        """
        self.examples = examples

    def sums(
        self, logits: Float[Array, "batch labels"], place: Int[Array, " batch"], real: Bool[Array, " batch"]
    ) -> Sum:
        """Returns a sum whose value, [labels, examples], holds the logits of this batch at their places in the part.

        An example that was not evaluated is NaN there; one whose logit is not finite is infinite.

        Args:
          logits: the logits of the batch.
          place: the place of each example in the part, 0..examples-1.
          real: false for padding.
        """
        at = jnp.where(real, place, self.examples)  # beyond the last: dropped
        kept = jnp.where(jnp.isfinite(logits), logits, jnp.inf).astype(jnp.float32).T
        zeros = jnp.zeros((logits.shape[1], self.examples), jnp.float32)
        count = zeros.at[:, at].add(jnp.ones_like(kept), mode="drop")
        return Sum(zeros.at[:, at].add(kept, mode="drop"), count)


def area_under_curve_exact(labels: Values, scores: Values, weights: Values | None = None) -> float:
    """Returns the chance that a click (label 1) scores above a non-click (0). Ties count half; NaN without both.

    This is the Mann-Whitney statistic by ranks, in float64, so scores are told apart however close or large they are.
    An example whose label or score is NaN is left out; an infinite score makes the result NaN.

    Raises:
      UserError: the errors of `GroupAuc`.
    """
    return GroupAuc(labels, np.zeros(len(labels), np.int64), weights).value(np.asarray(scores, np.float64))


def _areas(
    groups: Int[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    labels: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
) -> tuple[Float[np.ndarray, " groups"], Float[np.ndarray, " groups"]]:
    """Returns the AUC of each group that occurs (NaN without both classes), and its weight."""
    if not len(groups):
        return np.zeros(0), np.zeros(0)
    order = np.lexsort((scores, groups))
    groups, scores, labels, weights = (part[order] for part in (groups, scores, labels, weights))
    new_group = np.diff(groups, prepend=-1) != 0
    ties = np.flatnonzero(new_group | (np.diff(scores, prepend=np.nan) != 0))  # where equal scores of a group begin
    clicks, without = (np.add.reduceat(weights * part, ties) for part in (labels, 1 - labels))
    first = np.flatnonzero(new_group[ties])  # the ties where groups begin
    below = np.cumsum(without) - without
    below -= np.repeat(below[first], np.diff(np.append(first, len(ties))))
    won, clicks_of, without_of = (np.add.reduceat(x, first) for x in (clicks * (below + without / 2), clicks, without))
    pairs = clicks_of * without_of
    areas = np.divide(won, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return areas, clicks_of + without_of


def with_slices(sums: Callable[[Mapping[str, Array]], Sums], batch: Mapping[str, Array]) -> Sums:
    """Returns the sums of a batch and of each slice whose mask it holds (`batch["slice/NAME"]`, bool [batch])."""
    masks = {name.removeprefix(SLICE): mask for name, mask in batch.items() if name.startswith(SLICE)}
    return sums(batch) | sliced(lambda weight: sums({**batch, "weight": weight}), masks, batch["weight"])


def sliced(
    sums: Callable[[Float[Array, " batch"]], Sums],
    masks: Mapping[str, Bool[Array, " batch"]],
    weight: Float[Array, " batch"],
) -> Sums:
    """Computes the same metrics on parts of the examples: `ndcg@10[cold_item]` is `ndcg@10` in the mask `cold_item`.

    Inside one program XLA computes only once what the slices share (scores, ranks).

    Args:
      sums: computes the metrics from the weight of each example; it may not use another weight.
      masks: which examples belong to each slice, by its name. Slices may overlap.
      weight: weight of each example, 0 for padding.
    """
    found: dict[str, Sum | Max] = {}
    for part, mask in masks.items():
        inside = sums(jnp.where(mask, weight, jnp.zeros_like(weight)))
        found |= {f"{name}[{part}]": value for name, value in inside.items()}
    return found
