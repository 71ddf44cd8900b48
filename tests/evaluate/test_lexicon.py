"""The lexicon as a judge: who wrote in a better mood, and what is said where it is not installed."""

import functools
import sys

import pytest

from jaxops.core.failures import UserError
from jaxops.evaluate import lexicon


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(lexicon, "mood", functools.cache(lexicon.mood.__wrapped__))


def test_the_better_mood_wins_and_the_same_is_a_tie():
    pytest.importorskip("vaderSentiment")
    said = lexicon.better_mood(["the film is"] * 3, [" great", " awful", " green"], [" awful", " great", " blue"])
    assert said == [1.0, 0.0, 0.5]
    # Of one prompt: what it says itself counts for both.
    assert lexicon.better_mood(["a bad film, but"], [" very good"], [" very bad"]) == [1.0]


def test_without_the_lexicon_one_line_says_what_to_do(monkeypatch):
    for name in ("vaderSentiment", "vaderSentiment.vaderSentiment"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install .jaxops.judge"):
        lexicon.better_mood(["a"], ["b"], ["c"])


def test_conversations_are_refused(monkeypatch):
    monkeypatch.setattr(lexicon, "mood", lambda: len)
    with pytest.raises(UserError, match="not conversations"):
        lexicon.better_mood([[{"role": "user", "content": "hi"}]], ["b"], ["c"])


def test_scores_are_compared_whatever_gives_them(monkeypatch):
    monkeypatch.setattr(lexicon, "mood", lambda: len)
    assert lexicon.better_mood(["a", "a", "a"], ["xx", "x", ""], ["x", "x", "x"]) == [1.0, 0.5, 0.0]
