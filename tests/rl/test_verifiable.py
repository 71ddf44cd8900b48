"""Rewards of answers that can be checked, and the problems of addition that have such answers."""

import json
import sys

import pytest

from jaxops.data.prompts import additions
from jaxops.rl.rewards.config import FunctionReward
from jaxops.rl.rewards.function import UserFunction
from jaxops.rl.rewards.verifiable import exact


def test_exact_compares_with_the_answer_of_the_row():
    said = ["12", " 12\n", "012", "", "13"]
    assert exact(["?"] * 5, said, ["12"] * 5) == [1, 1, 0, 0, 0]
    assert exact(["?"] * 2, ["12", "12"], answer=[12, None]) == [1, None]  # numbers too; without an answer: dropped


def test_a_config_names_it_and_the_data_need_its_column():
    from jaxops.config.load import from_dict
    from jaxops.core.failures import UserError

    reward = from_dict(FunctionReward, {"fn": "jaxops.rl.rewards.verifiable:exact"}, [], source="test").config
    assert UserFunction(reward, ["completion", "answer"]).sees == ("answer",)
    with pytest.raises(UserError, match=r"needs 'answer'.*did you mean 'answers'"):
        UserFunction(reward, ["answers"])


@pytest.mark.parametrize(("most", "terms"), [(12, 2), (3, 4)])
def test_additions_are_all_right_and_no_sum_straddles_the_split(most, terms):
    train, valid = additions.additions(most=most, held_out=10, seed=3, terms=terms)
    sets = []
    for part in (train, valid):
        rows = [tuple(map(int, row["prompt"].removesuffix("=").split("+"))) for row in part]
        assert all(str(sum(row)) == one["answer"] == one["completion"] for row, one in zip(rows, part, strict=True))
        assert len(set(rows)) == len(rows) and all(len(row) == terms for row in rows)
        sets.append({tuple(sorted(row)) for row in rows})
    assert len(train) + len(valid) == (most + 1) ** terms and len(sets[1]) == 10 and not sets[0] & sets[1]


def test_the_command_writes_the_same_files_again(tmp_path, monkeypatch, capsys):
    def written(folder, *more):
        monkeypatch.setattr(sys, "argv", ["additions", str(folder), "--most", "9", "--held-out", "5", *more])
        additions.main()
        return [(folder / f"{part}.jsonl").read_bytes() for part in additions.PARTS]

    first = written(tmp_path / "a")
    assert first == written(tmp_path / "b") != written(tmp_path / "c", "--seed", "1")
    assert set(json.loads(first[1].splitlines()[0])) == {"prompt", "completion", "answer"}
    third = written(tmp_path / "e", "--terms", "3")
    assert json.loads(third[0].splitlines()[0])["prompt"].count("+") == 2
    wrong = {("--held-out", "55"): "than the 55 sets", ("--held-out", "0"): "1 or more", ("--most", "0"): "--most of"}
    for more, message in {**wrong, ("--seed", "-1"): "--seed of at least 0", ("--terms", "1"): "at least 2"}.items():
        with pytest.raises(SystemExit):
            written(tmp_path / "d", *more)
        assert message in capsys.readouterr().err
