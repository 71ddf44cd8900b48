"""Comparisons of two policies: ids that do not tell which is which, and one outcome for each pair."""

import json

import pytest

from jaxops.evaluate.win_rate import win_rate
from jaxops.flow.rlhf.compare import compared, is_first, outcomes
from jaxops.flow.rlhf.pairs import Vote

COUNT, SEED = 400, 3
PAIRS = compared("loop-1", [f"say {at}" for at in range(COUNT)], ["new"] * COUNT, ["old"] * COUNT, SEED)


def of_new(pair, share):
    """A vote that gives the new policy this share of the win."""
    return Vote(pair.id, share if pair.a == "new" else 1 - share)


def test_each_policy_has_the_first_place_about_half_of_the_time_and_no_id_tells():
    firsts = [pair.a == "new" for pair in PAIRS]
    assert 150 < sum(firsts) < 250 and firsts == [is_first(pair.id, SEED) for pair in PAIRS]
    assert {pair.id[:-6] for pair in PAIRS} == {"loop-1-c"} and all(pair.id[-6:].isdigit() for pair in PAIRS)
    assert {json.dumps(sorted(vars(pair))) for pair in PAIRS} == {json.dumps(["a", "b", "id", "prompt"])}
    other = compared("loop-1", ["x"] * COUNT, ["new"] * COUNT, ["old"] * COUNT, SEED + 1)
    assert [pair.a for pair in other] != [pair.a for pair in PAIRS]


def test_wins_are_those_of_the_new_policy_whatever_its_place():
    assert outcomes(PAIRS, [of_new(pair, 1.0) for pair in PAIRS], SEED) == [1.0] * COUNT
    assert outcomes(PAIRS, [of_new(pair, 0.0) for pair in PAIRS], SEED) == [0.0] * COUNT


def test_many_votes_on_one_pair_are_one_comparison():
    votes = [of_new(PAIRS[0], 1.0)] * 9 + [of_new(PAIRS[1], 0.0), of_new(PAIRS[1], 1.0), of_new(PAIRS[2], 0.0)]
    found = outcomes(PAIRS, votes, SEED)
    assert found == [1.0, 0.5, 0.0]
    assert win_rate(found).rate == pytest.approx(0.5) and win_rate(found).comparisons == 3


def test_equal_answers_are_a_tie_without_a_vote():
    pairs = compared("loop-1", ["x", "y"], ["one", "new"], ["one", "old"], SEED)
    assert outcomes(pairs, [of_new(pairs[1], 1.0)], SEED) == [0.5, 1.0]
