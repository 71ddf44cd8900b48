"""mean@k and pass@k, against every choice of k answers out of n."""

import itertools

import numpy as np
import pytest

from jaxops.core.failures import UserError
from jaxops.evaluate.solved import mean_at_k, pass_at_k

RIGHT = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]], bool)


@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers(k):
    chosen = [list(some) for some in itertools.combinations(range(5), k)]
    assert pass_at_k(RIGHT, k) == pytest.approx(np.mean([RIGHT[:, some].any(axis=1).mean() for some in chosen]))


def test_one_answer_is_right_as_often_as_the_mean_says():
    assert mean_at_k(RIGHT) == 8 / 20 and pass_at_k(RIGHT, 1) == pytest.approx(8 / 20)
    assert pass_at_k(RIGHT, 5) == 3 / 4


def test_what_cannot_be_estimated_is_refused():
    for k in (0, 6):
        with pytest.raises(UserError, match=f"from 1 to the 5 answers of a problem, got {k}"):
            pass_at_k(RIGHT, k)
    with pytest.raises(UserError, match="no answer"):
        mean_at_k(RIGHT[:0])
    with pytest.raises(UserError, match="no answer"):
        pass_at_k(RIGHT[:, :0], 1)
