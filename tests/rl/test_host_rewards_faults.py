"""A reward that raises, hangs or answers nonsense is said with its name and sample, and costs no other answer."""

import threading
import time

import pytest
import reward_functions
from reward_functions import ASKED, asked, reward

from jaxops.config.secrets import Secret
from jaxops.core.failures import RunFailed
from jaxops.core.journal import Journal
from jaxops.rl.rewards.combine import host_scores
from jaxops.rl.rewards.host import HostRewards

never = lambda: False


@pytest.fixture(autouse=True)
def _nothing_asked():
    ASKED.clear()
    reward_functions.RELEASED.clear()
    yield
    reward_functions.RELEASED.set()  # threads that were left behind end


def wait_until(happened) -> None:
    deadline = time.monotonic() + 10
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert happened()


def seconds_for(bad: str) -> float:
    """Short only where the function hangs: a busy machine makes no other call late."""
    return 0.4 if bad == "hang" else 20.0


def host_of(folder, *rewards) -> tuple[HostRewards, list[str]]:
    said: list[str] = []
    return HostRewards(rewards, Journal(folder), say=said.append), said


SAID = {
    "raise": ("error", "it raised ValueError: no number in it (", "reward_functions.py:"),
    "exit": ("error", "it raised SystemExit: 3 (", "reward_functions.py:"),
    "hang": ("timeout", "it did not answer within 0.4s", ""),
    "nan": ("error", "it answered nan: expected a finite number", ""),
    "inf": ("error", "it answered inf: expected a finite number", ""),
    "huge": ("error", "it answered 1e+39 (float), which float32 cannot hold", ""),
    "text": ("error", "it answered '0.5' (str): expected a finite number", ""),
    "list": ("error", "it answered [1.0] (list): expected a finite number", ""),
    "skip": ("error", "it returned 0 answers for 1 completion", ""),
}


@pytest.mark.parametrize("bad", SAID)
@pytest.mark.parametrize("on_error", ["drop", "zero"])
def test_a_sample_without_an_answer_is_dropped_or_zero_and_the_others_count(tmp_path, bad, on_error):
    config = reward("bad_where", on_error=on_error, seconds=seconds_for(bad), weight=2.0)
    host, said = host_of(tmp_path, config)
    questions = asked("a", "bb", "ccc", "dddd", "eeeee", bad, "fffffff", "gggggggg")
    found = host.score(questions, never)
    sort, what, line = SAID[bad]
    instead = None if on_error == "drop" else 0.0
    assert [one.scores["bad_where"] for one in found] == [1.0, 2.0, 3.0, 4.0, 5.0, instead, 7.0, 8.0]
    assert [one.faults for one in found] == [{}] * 5 + [{"bad_where": sort}] + [{}] * 2
    told = next(text for text in said if ("dropped" if on_error == "drop" else "scores 0") in text)
    assert "reward bad_where (reward_functions:bad_where), step 1, example 15, copy 0:" in told
    assert what in told and line in told and "'prompt 5'" in told and f"completion: {bad!r}" in told
    arrays = host_scores(found, host.names)
    assert arrays.weight.tolist() == [1.0] * 5 + [float(on_error == "zero")] + [1.0] * 2
    shares = {name: entry.value() for name, entry in arrays.sums.items()}
    assert shares == {
        "reward_errors/bad_where": (sort == "error") / 8,
        "reward_timeouts/bad_where": (sort == "timeout") / 8,
        "reward_dropped/bad_where": (on_error == "drop") / 8,
    }
    ASKED.clear()
    again, _ = host_of(tmp_path, config)
    assert again.score(questions, never) == found and not ASKED


@pytest.mark.parametrize("bad", SAID)
def test_stop_names_the_sample_and_keeps_what_was_answered(tmp_path, bad):
    config = [reward("length"), reward("bad_where", seconds=seconds_for(bad))]
    host, _ = host_of(tmp_path, *config)
    with pytest.raises(RunFailed) as stopped:
        host.score(asked("a", "bb", "ccc", bad), never)
    message = str(stopped.value)
    assert "reward bad_where" in message and "example 13, copy 0" in message and SAID[bad][1] in message
    assert "'prompt 3'" in message and "on_error: drop" in message
    ASKED.clear()
    mended, _ = host_of(tmp_path, *config)
    known = asked("a", "bb", "ccc")
    assert [dict(one.scores) for one in mended.score(known, never)] == [
        {"length": float(n), "bad_where": float(n)} for n in (1, 2, 3)
    ]
    assert not ASKED


def test_a_long_prompt_is_shown_by_its_beginning(tmp_path):
    host, _ = host_of(tmp_path, reward("text"))
    question = asked("c" * 500)[0]._replace(prompt="p" * 500)
    with pytest.raises(RunFailed) as stopped:
        host.score([question], never)
    assert f"'{'p' * 200}'..." in str(stopped.value) and f"'{'c' * 200}'..." in str(stopped.value)
    assert "it returned '0.5' (str), not a list of 1" in str(stopped.value)


def test_none_is_an_answer_and_no_fault(tmp_path):
    host, said = host_of(tmp_path, reward("bad_where"))
    (found,) = host.score(asked("none"), never)
    assert found == ({"bad_where": None}, {}, {}) and not said


def test_an_async_function_that_hangs_is_cancelled_and_one_that_raises_is_said(tmp_path):
    host, said = host_of(tmp_path, reward("bad_later", on_error="drop", seconds=0.4, workers=2))
    found = host.score(asked("hang", "bb", "ccc", "raise"), never)
    assert [one.scores["bad_later"] for one in found] == [None, 2.0, 3.0, None]
    wait_until(lambda: ["cancelled"] in ASKED)
    assert any("it raised KeyError: 'answer' (" in text and "in bad_later" in text for text in said)


def test_a_coroutine_that_blocks_its_loop_does_not_block_later_calls(tmp_path, monkeypatch):
    host, _ = host_of(tmp_path, reward("bad_later", on_error="drop", seconds=0.4))
    monkeypatch.setattr("jaxops.rl.rewards.calls.ANSWERS_WITHIN", 0.1)
    found = host.score(asked("block", "bb", "ccc", "dddd"), never)
    assert [one.scores["bad_later"] for one in found] == [None, 2.0, 3.0, 4.0]


def test_a_call_that_is_too_slow_for_several_is_made_for_each(tmp_path):
    host, said = host_of(tmp_path, reward("slow_for_several", seconds=0.4))
    found = host.score(asked(*("x" * n for n in range(5))), never)
    assert [one.scores["slow_for_several"] for one in found] == [float(n) for n in range(5)]
    assert all(not one.faults for one in found)
    assert "a call with 2 samples: it did not answer within 0.4s" in said[0]
    assert "one by one: example 13, copy 0, to example 14, copy 0" in said[0]


def test_a_result_that_fits_no_sample_is_made_again_for_each(tmp_path):
    host, said = host_of(tmp_path, reward("without_duplicates"))
    found = host.score(asked(*["a", "a", "bb", "bb"] * 3), never)
    assert [one.scores["without_duplicates"] for one in found] == [1.0, 1.0, 2.0, 2.0] * 3
    assert "it returned 2 answers for 3 completions" in said[0]


def test_a_function_that_never_answers_is_not_waited_for_sample_by_sample(tmp_path):
    host, said = host_of(tmp_path, reward("silent", on_error="drop", seconds=0.05))
    found = host.score(asked(*["x"] * 80), never)
    assert [one.scores["silent"] for one in found] == [None] * 80
    assert [one.faults for one in found] == [{"silent": "timeout"}] * 80
    assert sum("thread" in text for text in said) == 1
    wait_until(lambda: len(ASKED) >= 7)
    assert len(ASKED) == 1 + 3 + 3  # a call, three samples of it, and a call for each further round


def test_threads_end_with_their_calls(tmp_path):
    before = threading.active_count()
    host, _ = host_of(tmp_path, reward("length", workers=4), reward("length_later", workers=4))
    host.score(asked(*"abcdefgh"), never)
    del host
    wait_until(lambda: threading.active_count() <= before)


def test_no_secret_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame-0815")
    host, said = host_of(tmp_path, reward("keyed", kwargs={"key": Secret("JUDGE_KEY")}, on_error="zero"))
    host.score(asked("a"), never)
    assert "sesame" not in said[0] and "the service refused ${secret:JUDGE_KEY}" in said[0]
    parts = "".join(part.read_text() for part in tmp_path.rglob("*.jsonl"))
    assert '"faults": {"keyed": "error"}' in parts and "sesame" not in parts
