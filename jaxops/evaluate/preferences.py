"""Metrics of scores against human judgements of pairs: accuracy with its interval, log loss, calibration, biases.

All are computed on the host in float64, as the interval and the biases need all pairs at once. Tested in
tests/evaluate/test_preference_metrics.py.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxops.core.metric import Metric

BINS = 10
REPLICATES = 400
"""Samples of the bootstrap."""
Z = 1.959964
"""The quantile of the normal distribution that leaves 2.5 % above it."""
MOST_ANNOTATORS = 8
FEWEST_PAIRS = 10
"""An annotator with fewer judgements has no accuracy of their own."""

METRICS = {
    "accuracy": Metric("accuracy", "higher", "Accuracy"),
    "accuracy_low": Metric("accuracy_low", "neither", "Accuracy, 2.5 %"),
    "accuracy_high": Metric("accuracy_high", "neither", "Accuracy, 97.5 %"),
    "log_loss": Metric("log_loss", "lower", "Log loss"),
    "ece": Metric("ece", "lower", "ECE"),
    "longer_bias": Metric("longer_bias", "neither", "Bias to longer"),
    "first_bias": Metric("first_bias", "neither", "Bias to first"),
    "disagreement": Metric("disagreement", "neither", "Disagreement"),
}
"""The metrics of a reward model; see `measure`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """Human judgements of pairs, and what a bias could depend on.

    Attributes:
      label: the probability that the first is better; 0.5 is a tie.
      weight: how much each counts.
      clusters: two numbers a pair; judgements that share one are not independent.
      lengths: tokens of the two answers.
      swapped: pairs whose second side was shown first.
      annotators: who judged, or None.
    """

    label: Float[np.ndarray, " pairs"]
    weight: Float[np.ndarray, " pairs"]
    clusters: Int[np.ndarray, "pairs two"]
    lengths: Int[np.ndarray, "pairs two"]
    swapped: Bool[np.ndarray, " pairs"]
    annotators: Sequence[str | None] = ()


def measure(judged: Judged, heads: Float[np.ndarray, "pairs two heads"]) -> dict[str, float]:
    """Returns the metrics of the heads' scores of each pair's two texts; those of `METRICS`.

    `accuracy` is the share of judgements without ties that the sign of the difference of mean scores agrees with, an
    equal pair counted half; `accuracy_low` and `accuracy_high` are the ends of its 95 % interval. `accuracy[NAME]` is
    that of one annotator. `log_loss` is of the label under Bradley-Terry, ties as half a win for each, and `ece` the
    expected calibration error of its probability, over both orders of each pair. `longer_bias` is how much more often
    the model prefers the longer answer than people do, and `first_bias` the same for the text that was shown first.
    `disagreement` is the standard deviation of the difference of scores over the heads, over that over the pairs.
    """
    heads = np.asarray(heads, np.float64)
    scores = heads.mean(axis=2)
    difference = scores[:, 0] - scores[:, 1]
    label, weight = judged.label.astype(np.float64), judged.weight.astype(np.float64)
    decided = (label != 0.5) & (weight > 0)
    right = agrees(difference, label)
    low, high = interval(right[decided], weight[decided], judged.clusters[decided])
    found = {
        "accuracy": mean(right, weight * decided),
        "accuracy_low": low,
        "accuracy_high": high,
        "log_loss": mean(label * softplus(-difference) + (1 - label) * softplus(difference), weight),
        "ece": calibration_error(reliability(difference, label, weight)),
        "longer_bias": bias(difference, label, weight * decided, np.sign(judged.lengths[:, 0] - judged.lengths[:, 1])),
        "first_bias": bias(difference, label, weight * decided, np.where(judged.swapped, -1, 1)),
        "disagreement": disagreement(heads),
    }
    return found | by_annotator(judged.annotators, right, weight * decided)


def agrees(difference: Float[np.ndarray, " pairs"], label: Float[np.ndarray, " pairs"]) -> np.ndarray:
    """Returns 1 where the sign of the difference agrees with the label, 0 where not, 0.5 where the scores are equal."""
    return 0.5 + 0.5 * np.sign(difference) * np.sign(label - 0.5)


def mean(values: np.ndarray, weight: np.ndarray) -> float:
    """Returns the weighted mean; NaN where nothing has weight."""
    total = weight.sum()
    return float((values * weight).sum() / total) if total > 0 else float("nan")


def interval(
    values: Float[np.ndarray, " pairs"], weight: Float[np.ndarray, " pairs"], clusters: Int[np.ndarray, "pairs two"]
) -> tuple[float, float]:
    """Returns the 95 % interval of the weighted mean of values from 0 to 1, for pairs that depend on each other.

    Clusters (texts, or prompts) are drawn with replacement, and a pair counts as often as both of its clusters are
    drawn, or its one: the pigeonhole bootstrap (Owen 2007), which errs on the wide side. Its variance says how many
    independent pairs these are worth, and for that number the interval is Wilson's, which is right for few pairs too:
    four right out of four are no proof of a perfect model. The same pairs give the same interval.
    """
    if not len(values):
        return float("nan"), float("nan")
    names, at = np.unique(clusters, return_inverse=True)
    at = at.reshape(clusters.shape)
    one = at[:, 0] == at[:, 1]
    generator = np.random.Generator(np.random.Philox(0))
    means = np.empty(REPLICATES)
    for k in range(REPLICATES):
        drawn = np.bincount(generator.integers(0, len(names), len(names)), minlength=len(names))
        means[k] = mean(values, weight * drawn[at[:, 0]] * np.where(one, 1, drawn[at[:, 1]]))
    rate, worth = mean(values, weight), float(weight.sum() ** 2 / (weight**2).sum())
    variance, least = float(np.nanvar(means)), rate * (1 - rate)
    if least > 0 and variance > 0:
        return wilson(rate, min(worth, least / variance))
    apart = len(names) if one.all() else max(len(names) / 2, 1)  # all are right, or all are wrong
    return wilson(rate, float(min(worth, apart)))


def wilson(rate: float, count: float) -> tuple[float, float]:
    """Returns the 95 % interval of a rate that was observed in `count` independent trials (Wilson 1927)."""
    square = Z**2 / count
    middle, half = rate + square / 2, Z * np.sqrt(rate * (1 - rate) / count + square / (4 * count))
    return float((middle - half) / (1 + square)), float((middle + half) / (1 + square))


def softplus(x: np.ndarray) -> np.ndarray:
    """Returns log(1 + exp(x))."""
    return np.logaddexp(0.0, x)


def reliability(
    difference: Float[np.ndarray, " pairs"], label: Float[np.ndarray, " pairs"], weight: Float[np.ndarray, " pairs"]
) -> Float[np.ndarray, "3 bins"]:
    """Returns predicted probability, observed share and share of the pairs, in equal steps of the probability.

    Each pair counts in both of its orders, half each, since nothing says which of its texts is the first. Empty bins
    have NaN.
    """
    p = np.exp(-softplus(-np.concatenate([difference, -difference])))
    label, weight = np.concatenate([label, 1 - label]), np.concatenate([weight, weight])
    bins = np.clip((p * BINS).astype(np.int64), 0, BINS - 1)
    total = lambda x: np.bincount(bins, x, minlength=BINS)
    count = total(weight)
    rate = lambda x: np.divide(total(weight * x), count, out=np.full(BINS, np.nan), where=count > 0)
    return np.stack([rate(p), rate(label), count / count.sum()])


def calibration_error(found: Float[np.ndarray, "3 bins"]) -> float:
    """Returns the mean distance between predicted and observed, weighted by the share of the pairs."""
    predicted, observed, share = found
    return float(np.nansum(np.abs(predicted - observed) * share))


def bias(
    difference: Float[np.ndarray, " pairs"],
    label: Float[np.ndarray, " pairs"],
    weight: Float[np.ndarray, " pairs"],
    side: Int[np.ndarray, " pairs"],
) -> float:
    """Returns how much more often the model prefers a side than people do: 1 the first, -1 the second, 0 neither.

    NaN where no pair has a side.
    """
    weight = weight * (side != 0)
    prefers = lambda sign: mean(0.5 + 0.5 * np.sign(sign) * side, weight)
    return prefers(difference) - prefers(label - 0.5)


def disagreement(heads: Float[np.ndarray, "pairs two heads"]) -> float:
    """Returns the deviation over heads of the difference of scores, over the deviation of their mean over the pairs.

    NaN for one head: it cannot disagree.
    """
    differences = heads[:, 0] - heads[:, 1]
    spread = float(np.sqrt(np.mean(differences.mean(axis=1) ** 2)))
    if heads.shape[2] < 2 or not spread > 0:
        return float("nan")
    return float(np.sqrt(np.mean(differences.var(axis=1, ddof=1))) / spread)


def by_annotator(
    annotators: Sequence[str | None], right: Float[np.ndarray, " pairs"], weight: Float[np.ndarray, " pairs"]
) -> dict[str, float]:
    """Returns the accuracy on the judgements of each of the annotators who judged most."""
    names = sorted({name for name in annotators if name is not None})
    if not names:
        return {}
    who = np.array([name or "" for name in annotators])
    counts = {name: int(((who == name) & (weight > 0)).sum()) for name in names}
    most = sorted(names, key=lambda name: (-counts[name], name))[:MOST_ANNOTATORS]
    return {f"accuracy[{name}]": mean(right, weight * (who == name)) for name in most if counts[name] >= FEWEST_PAIRS}
