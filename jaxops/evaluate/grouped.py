"""Metrics within groups and on parts of the examples: AUC by user, exact, and any metric by slice.

Held by tests/evaluate/test_grouped.py, against numpy in float64.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxops.core.failures import UserError
from jaxops.core.sums import Max, Sum, Sums
from jaxops.data.slices import SLICE

Values = Float[np.ndarray, " _"] | Int[np.ndarray, " _"] | Bool[np.ndarray, " _"]
"""One for each example; lengths that differ are told by an error of ours."""


def group_auc_sums(
    logits: Float[Array, " batch"],
    ids: Int[Array, " batch"],
    weight: Float[Array, " batch"],
    n: int,
    finalizer: Callable[[np.ndarray], float],
) -> Sum:
    """The logit of every evaluation example, where `finalizer` meets all of them: float64 [n], on the host.

    An order needs all scores at once; `2 n` float32 on each device hold them, whatever the cut into batches. An
    example that was not evaluated is NaN, one whose logit is not finite is infinite.

    Args:
      logits: of this batch.
      ids: which examples they are, 0..n-1; others are left out.
      weight: 0 for what is left out (padding, examples outside a slice); other weights are alike.
      n: how many examples the evaluation has.
      finalizer: a function that equals itself from call to call (it is part of a compiled program).
    """
    there = (weight > 0) & (ids >= 0)
    at = jnp.where(there, ids, n)  # beyond the last: dropped
    kept = jnp.where(jnp.isfinite(logits), logits, jnp.inf).astype(jnp.float32)
    zeros = jnp.zeros(n, jnp.float32)
    return Sum(zeros.at[at].add(kept, mode="drop"), zeros.at[at].add(1.0, mode="drop"), finalizer)


class GroupAuc:
    """AUC within each group (user, session), as a mean weighted by the groups' impressions.

    "GAUC" of Zhu et al. 2017, "Optimized cost per click in Taobao display advertising", and Zhou et al. 2018, "Deep
    interest network": whether each user's own items are in order, which AUC over all examples mixes with telling users
    apart. Exact; equal logits count half.
    """

    def __init__(self, labels: Values, groups: Shaped[np.ndarray, " _"], weights: Values | None = None):
        """Keeps what the host knows of the evaluation examples 0..n-1.

        Args:
          labels: 1 where there was a click, 0 where not, NaN where that is not known (left out).
          groups: ids of any kind.
          weights: of each example; default 1. The weight of a group is the sum of its examples'.

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
        """{"gauc": ...} of a batch that holds `id` (0..n-1, each evaluated once) and `weight`."""
        found = group_auc_sums(logits, batch["id"], batch["weight"], len(self._labels), self.value)
        return {"gauc": found}

    def value(self, logits: Float[np.ndarray, " n"]) -> float:
        """The mean over groups that have both a click and a non-click; NaN without any.

        Examples whose logit is NaN are left out; an infinite one makes the whole NaN: a broken model has no order.
        """
        used = ~np.isnan(logits) & ~np.isnan(self._labels) & (self._weights > 0)
        if np.isinf(logits[used]).any():
            return float("nan")
        areas, weights = _areas(*(part[used] for part in (self._groups, logits, self._labels, self._weights)))
        both = ~np.isnan(areas)
        return float(np.sum(areas[both] * weights[both]) / np.sum(weights[both])) if both.any() else float("nan")


class Scores:
    """The logits of all examples of a part on the host, where any order is exact: AUC, AUC of a slice, GAUC.

    2 x examples x labels float32 on each device hold them while the part is evaluated, whatever the cut into batches.
    """

    def __init__(self, examples: int):
        """Makes room for examples 0..examples-1 of a part (of the longest part, so that there is one shape)."""
        self.examples = examples

    def sums(
        self, logits: Float[Array, "batch labels"], place: Int[Array, " batch"], real: Bool[Array, " batch"]
    ) -> Sum:
        """The logits of a batch at their places in the part; `real` is false for padding. Its value is [labels, n].

        An example that was not evaluated is NaN there, one whose logit is not finite is infinite.
        """
        at = jnp.where(real, place, self.examples)  # beyond the last: dropped
        kept = jnp.where(jnp.isfinite(logits), logits, jnp.inf).astype(jnp.float32).T
        zeros = jnp.zeros((logits.shape[1], self.examples), jnp.float32)
        count = zeros.at[:, at].add(jnp.ones_like(kept), mode="drop")
        return Sum(zeros.at[:, at].add(kept, mode="drop"), count)


def area_under_curve_exact(labels: Values, scores: Values, weights: Values | None = None) -> float:
    """The chance that a click (label 1) scores above a non-click (0), ties half; NaN without both.

    The Mann-Whitney statistic by ranks, in float64: scores are told apart however close or large they are. A label of
    NaN is left out, and so is an example whose score is NaN; an infinite score makes the whole NaN.

    Raises:
      UserError: as `GroupAuc`.
    """
    return GroupAuc(labels, np.zeros(len(labels), np.int64), weights).value(np.asarray(scores, np.float64))


def _areas(
    groups: Int[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    labels: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
) -> tuple[Float[np.ndarray, " groups"], Float[np.ndarray, " groups"]]:
    """AUC of each group that occurs, NaN without both classes, and its weight."""
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
    """The sums of a batch, and of each slice that it carries a mask of (`batch["slice/NAME"]`, bool [batch])."""
    masks = {name.removeprefix(SLICE): mask for name, mask in batch.items() if name.startswith(SLICE)}
    return sums(batch) | sliced(lambda weight: sums({**batch, "weight": weight}), masks, batch["weight"])


def sliced(
    sums: Callable[[Float[Array, " batch"]], Sums],
    masks: Mapping[str, Bool[Array, " batch"]],
    weight: Float[Array, " batch"],
) -> Sums:
    """The same metrics of parts of the examples: `ndcg@10[cold_item]` is `ndcg@10` of those in the mask `cold_item`.

    Inside one program XLA computes what the slices share (scores, ranks) once.

    Args:
      sums: from the weight of each example to the metrics. It may not use another weight.
      masks: by name of the slice, which examples belong to it. They may overlap.
      weight: of each example, 0 for padding.
    """
    found: dict[str, Sum | Max] = {}
    for part, mask in masks.items():
        inside = sums(jnp.where(mask, weight, jnp.zeros_like(weight)))
        found |= {f"{name}[{part}]": value for name, value in inside.items()}
    return found
