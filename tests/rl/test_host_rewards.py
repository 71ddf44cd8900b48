"""Reward functions are asked once for each sample, with the columns that they see; the journal keeps the answers."""

import datetime

import pytest
import reward_functions
from reward_functions import ASKED, asked, reward

from jaxops.core.answers import Key
from jaxops.core.failures import UserError
from jaxops.core.interrupt import Interrupted
from jaxops.core.journal import Journal
from jaxops.core.mesh import make_mesh
from jaxops.rl.rewards.function import Asked, check_columns
from jaxops.rl.rewards.host import ROUNDS, HostRewards
from jaxops.run.trust import named_code, trust_of

never = lambda: False


@pytest.fixture(autouse=True)
def _nothing_asked():
    ASKED.clear()


def scores(host: HostRewards, questions: list[Asked], poll=never) -> list[dict]:
    return [dict(one.scores) for one in host.score(questions, poll)]


def asked_for() -> list[str]:
    return sorted(completion for call in ASKED for completion in call)


@pytest.mark.parametrize("fn", ["length", "length_later"])
@pytest.mark.parametrize("workers", [1, 3])
def test_each_sample_is_asked_once_in_its_place(tmp_path, fn, workers):
    texts = ["x" * n for n in (5, 3, 0, 1, 4, 2, 6, 9, 7, 8)]
    host = HostRewards([reward(fn, workers=workers)], Journal(tmp_path))
    assert host.names == (fn,)
    assert scores(host, asked(*texts)) == [{fn: float(len(one))} for one in texts]
    assert asked_for() == sorted(texts)
    assert len(ASKED) <= ROUNDS * workers


@pytest.mark.parametrize("fn", ["together", "together_later"])
def test_workers_call_at_the_same_time(tmp_path, fn):
    reward_functions.MEETING.reset()
    host = HostRewards([reward(fn, workers=2)], Journal(tmp_path))
    assert scores(host, asked(*"abcdefgh")) == [{fn: 1.0}] * 8


def test_rewards_are_asked_at_the_same_time(tmp_path):
    reward_functions.MEETING.reset()
    two = [reward("together", name="one"), reward("together", name="other")]
    assert scores(HostRewards(two, Journal(tmp_path)), asked("a", "b")) == [{"one": 1.0, "other": 1.0}] * 2


def test_numbers_of_all_sorts_are_answers(tmp_path):
    host = HostRewards([reward("scalars", workers=4), reward("as_array")], Journal(tmp_path))
    found = scores(host, asked("int", "bool", "none", "numpy", "array", "long"))
    assert [one["scalars"] for one in found] == [2.0, 1.0, None, 0.5, 3.0, 7.0]
    assert all(type(one["scalars"]) in (float, type(None)) and type(one["as_array"]) is float for one in found)


def test_a_function_gets_the_columns_that_it_names_and_its_keywords(tmp_path):
    rewards = [reward("exact", kwargs={"bonus": 0.25}), reward("names_of_columns")]
    host = HostRewards(rewards, Journal(tmp_path), ["source", "answer"])
    found = scores(host, asked("a", "b", answer=["a", "c"], source=["x", "y"]))
    assert [one["exact"] for one in found] == [1.25, 0.25]
    assert [one["names_of_columns"] for one in found] == [102.0, 102.0]


def test_the_configs_keyword_goes_before_a_column_of_its_name(tmp_path):
    host = HostRewards([reward("exact", kwargs={"bonus": 0.25})], Journal(tmp_path), ["answer", "bonus"])
    assert scores(host, asked("b", answer=["b"], bonus=[5.0])) == [{"exact": 1.25}]


def test_columns_that_do_not_fit_are_refused_in_one_message():
    rewards = [reward("exact"), reward("sees"), reward("length")]
    with pytest.raises(UserError) as refused:
        check_columns(rewards, ["answers", "completions"])
    said = str(refused.value)
    assert "reward exact" in said and "needs 'answer'" in said and "did you mean 'answers'?" in said
    assert "reward sees" in said and "needs 'tags'" in said
    assert "reward length" in said and "column 'completions'" in said and "another name" in said
    check_columns(rewards, ["answer", "tags"])


def test_a_function_cannot_change_what_others_are_asked(tmp_path):
    host = HostRewards([reward("changes_what_it_gets"), reward("sees")], Journal(tmp_path), ["tags"])
    messages = [{"role": "user", "content": "hello"}]
    question = Asked(Key(1, 2), messages, "hi", {"tags": ["a", "b"]})
    assert scores(host, [question] * 3) == [{"changes_what_it_gets": 0.0, "sees": 21.0}] * 3
    assert len(messages) == 1 and question.columns == {"tags": ["a", "b"]}


def test_another_process_with_the_journal_asks_only_what_is_new(tmp_path):
    config = [reward("length", workers=2)]
    questions = asked("a", "bb", "ccc", source=["x", "y", "z"])
    first = scores(HostRewards(config, Journal(tmp_path), ["source"]), questions)
    ASKED.clear()
    assert scores(HostRewards(config, Journal(tmp_path), ["source"]), questions) == first
    assert ASKED == []
    changed = [questions[0], questions[1]._replace(completion="bbbb"), questions[2]._replace(columns={"source": "?"})]
    again = scores(HostRewards(config, Journal(tmp_path), ["source"]), changed)
    assert again == [{"length": 1.0}, {"length": 4.0}, {"length": 3.0}]
    assert asked_for() == ["bbbb", "ccc"]


def test_a_column_that_no_function_sees_and_a_weight_change_no_question(tmp_path):
    scores(HostRewards([reward("length_later")], Journal(tmp_path), ["source"]), asked("a", source=["x"]))
    ASKED.clear()
    other = HostRewards([reward("length_later", weight=2.0, workers=4)], Journal(tmp_path), ["source"])
    assert scores(other, asked("a", source=["y"])) == [{"length_later": 1.0}] and not ASKED
    other = HostRewards([reward("length_later"), reward("length")], Journal(tmp_path), ["source"])
    assert scores(other, asked("a", source=["y"])) == [{"length_later": 1.0, "length": 1.0}] and len(ASKED) == 2


def test_an_interrupt_loses_no_answer(tmp_path):
    questions, polls = asked(*("x" * n for n in range(8))), []
    host = HostRewards([reward("length")], Journal(tmp_path))
    with pytest.raises(Interrupted):
        host.score(questions, lambda: polls.append(1) or len(polls) == 3)
    done = asked_for()
    assert len(done) == 4
    ASKED.clear()
    assert scores(HostRewards([reward("length")], Journal(tmp_path)), questions) == [
        {"length": float(n)} for n in range(8)
    ]
    assert not set(asked_for()) & set(done)


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("known", [False, True])
def test_every_process_polls_equally_often(tmp_path, count, known):
    polls, questions = [], asked(*("x" * n for n in range(count)))
    if known:
        scores(HostRewards([reward("length")], Journal(tmp_path)), questions)
    scores(HostRewards([reward("length")], Journal(tmp_path)), questions, lambda: polls.append(1) and False)
    assert len(polls) == ROUNDS


def test_columns_hold_what_tables_hold(tmp_path):
    rewards, day = [reward("length")], datetime.date(2026, 1, 2)
    host = HostRewards(rewards, Journal(tmp_path), ["day", "raw"])
    assert scores(host, asked("a", day=[day], raw=[b"x"])) == [{"length": 1.0}]
    ASKED.clear()
    scores(host, asked("a", day=[day], raw=[b"x"]))
    assert not ASKED
    scores(host, asked("a", day=[day.replace(day=3)], raw=[b"x"]))
    assert ASKED == [["a"]]
    with pytest.raises(UserError, match=r"example 10: .*raw.*object"):
        scores(host, asked("a", day=[day], raw=[object()]))


def test_a_run_of_somebody_else_imports_nothing(tmp_path):
    values = {"rewards": [{"fn": {"fn": "reward_functions:length"}, "weight": 1.0}]}
    assert named_code(values) == {"rewards.0.fn.fn": "reward_functions:length"}
    untrusted = [reward("length", guard=trust_of(values, "runs/theirs"))]
    with pytest.raises(UserError, match=r"runs/theirs names code by import path"):
        HostRewards(untrusted, Journal(tmp_path))
    with pytest.raises(UserError, match=r"runs/theirs names code by import path"):
        check_columns(untrusted, [])
    trusted = [reward("length", guard=trust_of(values, "runs/theirs", ["reward_functions"]))]
    assert scores(HostRewards(trusted, Journal(tmp_path)), asked("abc")) == [{"length": 3.0}]


def test_one_process_has_all_rows(tmp_path):
    host, mesh = HostRewards([reward("length")], Journal(tmp_path)), make_mesh(data=-1)
    questions = asked(*"abcdefgh")
    mine = host.score(questions, never)
    assert host.all(mesh, 8, mine) == mine
    nothing = HostRewards([], Journal(tmp_path / "other"))
    assert nothing.all(mesh, 8, nothing.score(questions, never)) == [({}, {}, {})] * 8
