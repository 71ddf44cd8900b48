"""The share of problems that are solved, from several answers to each: mean@k and pass@k.

mean@k is the share of right answers, which is the probability that one answer is right. pass@k is the probability that
at least one of k answers to a problem is right. Tested in tests/evaluate/test_solved.py.
"""

import math

import numpy as np
from jaxtyping import Bool

from jaxops.core.failures import UserError


def mean_at_k(right: Bool[np.ndarray, "problems copies"]) -> float:
    """Returns the share of right answers, of all problems alike.

    Raises:
      UserError: there is no answer.
    """
    _require_answers(right)
    return float(right.mean())


def pass_at_k(right: Bool[np.ndarray, "problems copies"], k: int) -> float:
    """Returns the mean over problems of the probability that one of k answers or more is right.

    It is the unbiased estimate from n answers, c of them right: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021,
    "Evaluating large language models trained on code"). With k = n it is the share of problems with a right answer.

    Raises:
      UserError: there is no answer, or `k` is not a number from 1 to that of the answers to a problem.
    """
    _require_answers(right)
    copies = right.shape[1]
    if not 1 <= k <= copies:
        raise UserError(f"pass@k: expected a k from 1 to the {copies} answers of a problem, got {k}")
    wrong = copies - right.sum(axis=1)
    return float(np.mean([1 - math.comb(int(count), k) / math.comb(copies, k) for count in wrong]))


def _require_answers(right: Bool[np.ndarray, "problems copies"]) -> None:
    if not right.size:
        raise UserError("solved: there is no answer")
