"""Further metrics of a reward function: logged, journalled with the answer, and told where they are wrong."""

import jax
import numpy as np
import pytest
from reward_functions import ASKED, asked, reward

from jaxops.core.failures import RunFailed
from jaxops.core.journal import Journal
from jaxops.core.mesh import make_mesh
from jaxops.rl.collect import Scored
from jaxops.rl.rewards.combine import host_scores
from jaxops.rl.rewards.config import FunctionReward, further_metrics
from jaxops.rl.rewards.function import Fault, FunctionAnswer, answers_of
from jaxops.rl.rewards.host import HostRewards

never = lambda: False
NAMES = ("words", "vowels")


@pytest.fixture(autouse=True)
def _nothing_asked():
    ASKED.clear()


def host_of(folder, *rewards: FunctionReward) -> tuple[HostRewards, list[str]]:
    said: list[str] = []
    return HostRewards(rewards, Journal(folder), say=said.append), said


@pytest.mark.parametrize("fn", ["measures", "measures_later"])
def test_further_metrics_come_with_the_answer_and_are_not_asked_for_again(tmp_path, fn):
    rewards = [reward(fn, name="mine", metrics=NAMES, workers=2), reward("length")]
    host, said = host_of(tmp_path, *rewards)
    questions = asked("a bad one", "xx", "", "i")
    found = host.score(questions, never)
    assert [dict(one.scores) for one in found] == [{"mine": n, "length": n} for n in (9, 2, 0, 1)]
    assert [one.metrics for one in found] == [
        {"mine": {"words": words, "vowels": vowels}} for words, vowels in ((3, 4 / 9), (1, 0), (0, None), (1, 1))
    ]
    assert len(said) == 1 and "mine: it returns metrics that its config does not name" in said[0]
    assert "of no interest" in said[0]
    calls = len(ASKED)
    again, _ = host_of(tmp_path, *rewards)
    assert again.score(questions, never) == found and len(ASKED) == calls
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    arrays = host_scores(again.all(mesh, 4, found), again.names, further_metrics(rewards))
    np.testing.assert_array_equal(arrays.metrics["mine/words"], [3, 1, 0, 1])
    np.testing.assert_allclose(arrays.metrics["mine/vowels"], [4 / 9, 0, np.nan, 1])
    assert set(arrays.metrics) == {"mine/words", "mine/vowels"}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("short", "it returned 0 values of the metric 'words' for 1 completion"),
        ("nan", "metric 'words': it answered nan: expected a finite number"),
        ("less", "it returned no metric 'vowels', which its config names, but only words, of no interest"),
    ],
)
def test_a_wrong_metric_is_told_with_name_and_sample_and_costs_no_other_answer(tmp_path, bad, said):
    host, _ = host_of(tmp_path, reward("measures", name="mine", metrics=NAMES))
    with pytest.raises(RunFailed) as error:
        host.score(asked("good", bad), never)
    text = str(error.value)
    assert "reward mine (reward_functions:measures), step 1, example 11, copy 0" in text and said in text
    assert f"completion: '{bad}'" in text
    dropping, _ = host_of(tmp_path / "drop", reward("measures", name="mine", metrics=NAMES, on_error="drop"))
    found = dropping.score(asked("good", bad), never)
    assert [one.scores["mine"] for one in found] == [4.0, None] and found[1].faults == {"mine": "error"}
    assert found[0].metrics["mine"]["words"] == 1 and "mine" not in found[1].metrics


def test_a_tuple_of_two_rewards_is_no_reward_with_metrics():
    assert answers_of((1.0, None), 2) == [FunctionAnswer(1.0), FunctionAnswer(None)]
    assert answers_of(([1.0], {"n": [2]}), 1, ["n"]) == [FunctionAnswer(1.0, {"n": 2.0})]
    fault = answers_of([1.0], 1, ["n"])
    assert isinstance(fault, Fault) and "it returned no metric 'n', which its config names, but none" in fault.what
    wrong = answers_of(([1.0], {"n": "2"}), 1, ["n"])
    assert isinstance(wrong, Fault) and "as values of the metric 'n', '2' (str), not a list of 1" in wrong.what


def test_means_are_over_the_completions_that_have_a_value_dropped_ones_too():
    values = np.array([1.0, np.nan, 3.0, 7.0], np.float32)
    scored = Scored(np.zeros(4), np.array([True, True, False, True]), {}, {}, {"mine/n": values})
    found = scored.measured()["reward/mine/n"]
    assert float(found.value()) == pytest.approx(11 / 3) and float(found.count) == 3
    assert float(scored.measured(np.array([1, 1, 1, 0]))["reward/mine/n"].value()) == 2
