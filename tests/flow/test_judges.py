"""The judges of pairs: files of people, and functions; and votes as a reward model's data."""

import json

import pytest

from jaxops.config.load import from_dict
from jaxops.core.failures import UserError
from jaxops.flow.rlhf.config import FileJudge, RlhfConfig
from jaxops.flow.rlhf.judges import Files, Function, TooFewVotes
from jaxops.flow.rlhf.pairs import AnswerPair, Vote, preferences, read_pairs, write_lines

PAIRS = [AnswerPair(f"p{at}", f"say {at}", "long answer", "short") for at in range(4)]


def longer(prompts, first, second, margin=0.0):
    return [float(len(a) > len(b) + margin) for a, b in zip(first, second, strict=True)]


def wrong_length(prompts, first, second):
    return [1.0]


def no_number(prompts, first, second):
    return ["a"] * len(first)


def votes_file(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileJudge(path=str(path))


def function(name):
    values = {"policy": "p", "reward": "r", "prompts": "q", "judge": {"fn": f"test_judges:{name}"}}
    return Function(from_dict(RlhfConfig, values).config.judge)


def test_people_answer_in_files_of_a_folder(tmp_path):
    votes_file(tmp_path / "anna.jsonl", {"id": "p0", "choice": "a", "annotator": "anna"}, {"id": "p1", "choice": "Tie"})
    votes_file(tmp_path / "ben.jsonl", {"id": "p0", "choice": "b"}, {"id": "of another loop", "choice": "b"})
    judge = Files(FileJudge(path=str(tmp_path), enough=0.5))
    assert judge.votes(PAIRS) == [Vote("p0", 1.0, "anna"), Vote("p1", 0.5), Vote("p0", 0.0)]
    with pytest.raises(TooFewVotes) as few:
        Files(FileJudge(path=str(tmp_path))).votes(PAIRS)
    assert few.value.missing == 2 and "2 of 4 pairs" in str(few.value)
    assert len(Files(FileJudge(path=str(tmp_path))).votes(PAIRS, required=False)) == 3


def test_the_last_answer_of_an_annotator_counts(tmp_path):
    rows = [{"id": "p0", "choice": choice, "annotator": name} for choice, name in (("a", "anna"), ("b", "ben"))]
    config = votes_file(tmp_path / "votes.jsonl", *rows, {"id": "p0", "choice": "tie", "annotator": "anna"})
    assert Files(config).votes(PAIRS, required=False) == [Vote("p0", 0.5, "anna"), Vote("p0", 0.0, "ben")]
    unnamed = votes_file(tmp_path / "unnamed.jsonl", *[{"id": "p1", "choice": "a"}] * 2)
    assert len(Files(unnamed).votes(PAIRS, required=False)) == 2  # nobody knows whose they are


def test_no_file_yet_is_no_error_but_too_few(tmp_path):
    with pytest.raises(TooFewVotes, match="4 of 4"):
        Files(FileJudge(path=str(tmp_path / "votes"))).votes(PAIRS)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "p0", "choice": "c"}, "choice is 'c', expected a, b or tie"),
        ({"id": "p0", "choise": "a"}, "no 'choice'"),
        ({"choice": "a"}, "no 'id'"),
    ],
)
def test_a_vote_that_means_nothing_is_told_with_its_line(tmp_path, row, said):
    judge = Files(votes_file(tmp_path / "v.jsonl", {"id": "p1", "choice": "a"}, row))
    with pytest.raises(UserError, match=said):
        judge.votes(PAIRS)


def test_a_function_says_how_probable_it_is_that_the_first_is_better():
    assert function("longer").votes(PAIRS) == [Vote(pair.id, 1.0) for pair in PAIRS]


@pytest.mark.parametrize(
    ("name", "said"), [("wrong_length", "1 answers for 4 pairs"), ("no_number", "expected the probability from 0 to 1")]
)
def test_a_function_that_answers_wrongly_is_named(name, said):
    with pytest.raises(UserError, match=said):
        function(name).votes(PAIRS)


def test_votes_become_preferences_with_the_label_of_what_is_not_sure():
    rows = preferences(PAIRS, [Vote("p0", 1.0, "anna"), Vote("p1", 0.25), Vote("p2", 0.5)])
    assert rows[0] == {
        "id": "p0",
        "prompt": "say 0",
        "label": 1.0,
        "chosen": "long answer",
        "rejected": "short",
        "annotator": "anna",
    }
    assert (rows[1]["chosen"], rows[1]["label"]) == ("short", 0.75)
    assert rows[2]["label"] == 0.5
    chat = AnswerPair("c", [{"role": "user", "content": "hi"}], "a", "b")
    assert preferences([chat], [Vote("c", 0.0)])[0]["chosen"] == [{"role": "assistant", "content": "b"}]


def test_pairs_are_read_as_they_were_written_and_damage_is_told(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_lines(path, [vars(pair) for pair in PAIRS])
    assert read_pairs(path) == PAIRS
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match=r"pairs\.jsonl:4"):
        read_pairs(path)
