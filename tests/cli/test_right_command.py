"""A config that was given to the wrong command is answered with the right one."""

from pathlib import Path

import pytest
from tiny_runs import working_in

from jaxops.cli.main import main

LOOP = "This file is a loop: jaxops rlhf policy/rlhf_sentiment\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train policy/rlhf_sentiment", LOOP),
        ("config policy/rlhf_sentiment", LOOP),
        ("train policy/rlhf_sentiment rounds=2", LOOP.replace("\n", " rounds=2\n")),
        ("rlhf rec/movielens_sasrec run.seed=1", "This file is a run: jaxops train rec/movielens_sasrec run.seed=1\n"),
        ("rlhf sweep/movielens_lr", "This file is a sweep: jaxops sweep sweep/movielens_lr\n"),
        ("plan sweep/movielens_search --on cpu-8", "This file is a sweep: jaxops sweep sweep/movielens_search\n"),
    ],
)
def test_the_right_command_is_told(words, said, tmp_path, capsys):
    with working_in(tmp_path):
        assert main(words.split()) == 2
        assert [*Path().iterdir()] == []
    out, err = capsys.readouterr()
    assert err.endswith(said) and not out and len(err.splitlines()) < 8


@pytest.mark.parametrize("words", ["train rec/movielens_sasrec task=recc", "rlhf policy/rlhf_sentiment rounds=no"])
def test_a_mistake_of_another_sort_is_told_alone(words, capsys):
    assert main(words.split()) == 2
    assert "This file is" not in capsys.readouterr().err
