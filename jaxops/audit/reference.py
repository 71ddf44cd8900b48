"""Losses and metrics in numpy and float64, each as plain as its definition: what one's own are compared with.

They are written for reading, not for speed. Tested against the shipped ones in tests/audit/test_numpy_references.py.
"""

import numpy as np
from jaxtyping import Float, Int, Num

Values = Num[np.ndarray, "..."]


def log_softmax(logits: Num[np.ndarray, "... n"]) -> Float[np.ndarray, "... n"]:
    """Returns logits minus the logarithm of the sum of their exponentials, along the last axis.

    Example:
        >>> log_softmax(np.zeros((1, 4))).round(3).tolist()
        [[-1.386, -1.386, -1.386, -1.386]]
    """
    logits = np.asarray(logits, np.float64)
    away = logits - logits.max(axis=-1, keepdims=True)
    found: np.ndarray = away - np.log(np.exp(away).sum(axis=-1, keepdims=True))
    return found


def cross_entropy(logits: Num[np.ndarray, "... n"], targets: Int[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Returns -log softmax(logits)[target] of each entry.

    Example:
        >>> float(cross_entropy(np.array([[0.0, np.log(3.0)]]), np.array([1]))[0].round(4))
        0.2877
    """
    found: np.ndarray = -np.take_along_axis(log_softmax(logits), np.asarray(targets)[..., None], axis=-1)[..., 0]
    return found


def binary_cross_entropy(logits: Values, labels: Values) -> Float[np.ndarray, "..."]:
    """Returns the cross-entropy of labels in [0, 1] under sigmoid(logits), of each entry.

    Example:
        >>> float(binary_cross_entropy(np.array([0.0]), np.array([1.0]))[0].round(4))
        0.6931
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    found: np.ndarray = np.logaddexp(0, logits) - labels * logits
    return found


def bradley_terry(chosen: Values, rejected: Values) -> Float[np.ndarray, "..."]:
    """Returns -log sigmoid(chosen - rejected) of each pair of scores (Bradley & Terry 1952).

    Example:
        >>> float(bradley_terry(np.array([1.0]), np.array([1.0]))[0].round(4))
        0.6931
    """
    found: np.ndarray = np.logaddexp(0, np.asarray(rejected, np.float64) - np.asarray(chosen, np.float64))
    return found


def generalised_advantages(
    rewards: Num[np.ndarray, " steps"], values: Num[np.ndarray, " steps"], gamma: float = 1.0, lam: float = 0.95
) -> Float[np.ndarray, " steps"]:
    """Returns the advantages of one finished episode, whose value after the last step is zero (Schulman et al. 2016).

    Example:
        >>> generalised_advantages(np.array([0.0, 1.0]), np.zeros(2), lam=0.5).tolist()
        [0.5, 1.0]
    """
    following = np.append(np.asarray(values, np.float64)[1:], 0.0)
    found, after = np.zeros(len(rewards)), 0.0
    for at in reversed(range(len(rewards))):
        after = rewards[at] + gamma * following[at] - values[at] + gamma * lam * after
        found[at] = after
    return found


def ranks(scores: Num[np.ndarray, "rows items"], target: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """Returns how many items score above the target of each row, ties counted against it; 0 is the best.

    Example:
        >>> ranks(np.array([[3.0, 1.0, 2.0]]), np.array([2])).tolist()
        [1]
    """
    scores = np.asarray(scores, np.float64)
    own = np.take_along_axis(scores, np.asarray(target)[:, None], axis=1)
    found: np.ndarray = (scores >= own).sum(axis=1) - 1
    return found


def hit_rate(ranks: Int[np.ndarray, " rows"], top: int) -> float:
    """Returns the share of rows whose target is among the first `top`.

    Example:
        >>> hit_rate(np.array([0, 9, 10]), 10)
        0.6666666666666666
    """
    return float(np.mean(np.asarray(ranks) < top))


def ndcg(ranks: Int[np.ndarray, " rows"], top: int) -> float:
    """Returns the mean of 1 / log2(rank + 2) over rows with one target, zero beyond `top` (Järvelin & Kekäläinen 2002).

    Example:
        >>> ndcg(np.array([0, 2, 50]), 10)
        0.5
    """
    ranks = np.asarray(ranks)
    return float(np.mean(np.where(ranks < top, 1 / np.log2(ranks + 2.0), 0.0)))


def auc(scores: Num[np.ndarray, " rows"], labels: Num[np.ndarray, " rows"]) -> float:
    """Returns the share of pairs of a positive and a negative that the scores order rightly, a tie being half.

    Example:
        >>> auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
        0.75
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels) > 0
    gaps = scores[labels][:, None] - scores[~labels][None]
    return float(np.mean((gaps > 0) + 0.5 * (gaps == 0)))
