"""Judgements that are drawn from the ratings of single people: pure, of one group, on held-out texts alone."""

import json

import numpy as np
import pytest

from jaxops.core.failures import UserError
from jaxops.data.loader import build_batches
from jaxops.data.preferences.open import read_judgements
from jaxops.data.preferences.ratings import Ratings, read_rated
from jaxops.data.preferences.spec import RatingColumns, RatingData
from jaxops.data.text.byte_tokenizer import ByteTokenizer
from jaxops.data.text.spec import Share

ROWS = [
    {
        "text": f"{'film' if at % 3 else 'book'} {at}",
        "source": "film" if at % 3 else "book",
        "ratings": [at % 5, at % 4, 2],
    }
    for at in range(60)
]


def write(folder, rows, name="ratings.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def config_of(folder, rows=ROWS, **changes):
    return RatingData(**({"path": write(folder, rows), "length": 16} | changes))


def ratings_of(folder, rows=ROWS):
    config = config_of(folder, rows)
    return Ratings(read_rated(config, config.path))


def test_an_epoch_pairs_each_text_with_another_of_its_group(tmp_path):
    ratings = ratings_of(tmp_path)
    for epoch in range(3):
        drawn = ratings.drawn(7, epoch)
        assert sorted(drawn.first) == sorted(drawn.second) == list(range(60))
        assert (drawn.first != drawn.second).all()
        assert all((a % 3 == 0) == (b % 3 == 0) for a, b in zip(drawn.first, drawn.second, strict=True))
        for text, place in ((drawn.first, drawn.first_rating), (drawn.second, drawn.second_rating)):
            assert (place // 3 == text).all()
    assert (ratings.drawn(7, 0).second != ratings.drawn(7, 1).second).any()
    assert (ratings_of(tmp_path).drawn(7, 2).first_rating == drawn.first_rating).all()


def test_labels_by_one_rating_and_by_all(tmp_path):
    ratings = ratings_of(tmp_path)
    drawn = ratings.drawn(0, 0)
    shares, singles = ratings.shares(drawn), ratings.single(drawn)
    for at, (a, b) in enumerate(zip(drawn.first, drawn.second, strict=True)):
        x, y = np.array(ROWS[a]["ratings"]), np.array(ROWS[b]["ratings"])
        whole = (x[:, None] > y[None]).mean() + 0.5 * (x[:, None] == y[None]).mean()
        assert shares[at] == pytest.approx(whole)
        one, other = ratings.values[drawn.first_rating[at]], ratings.values[drawn.second_rating[at]]
        assert singles[at] == (1 if one > other else 0 if one < other else 0.5)
    assert 0 < (singles == 0.5).mean() < 1


def test_the_other_ratings_leave_out_the_one_that_judged(tmp_path):
    ratings = ratings_of(tmp_path)
    drawn = ratings.drawn(0, 0)
    for at, (text, place) in enumerate(zip(drawn.first, drawn.first_rating, strict=True)):
        rest = np.delete(np.array(ROWS[text]["ratings"], float), place - 3 * text)
        assert ratings.others(drawn)[at, 0] == pytest.approx(rest.mean())
    again = ratings.again(drawn, 0)
    assert (again.first_rating != drawn.first_rating).all() and (again.first_rating // 3 == drawn.first).all()


def test_batches_are_a_pure_function_of_seed_and_cursor(tmp_path):
    source = read_judgements(config_of(tmp_path)).opened(ByteTokenizer()).source(3)
    other = read_judgements(config_of(tmp_path)).opened(ByteTokenizer()).source(3)
    whole = source.batch(50, 80)  # over the end of an epoch
    other.batch(500, 4)
    pieces = build_batches(other, 50, 80, [(0, 7), (7, 60), (60, 80)])
    for name, values in whole.items():
        np.testing.assert_array_equal(values, pieces[name])
    assert whole["tokens"].shape == (80, 2, 16) and set(np.unique(whole["label"])) <= {0, 0.5, 1}
    changed = read_judgements(config_of(tmp_path)).opened(ByteTokenizer()).source(4).batch(50, 80)
    assert (changed["id"] != whole["id"]).any()


def test_held_out_texts_are_never_in_training(tmp_path):
    rows = [*ROWS, ROWS[5], ROWS[9]]  # copies stay on one side
    data = read_judgements(config_of(tmp_path, rows, valid=Share(0.4), judgements=3))
    train, valid = ({one.text.text for one in part} for part in (data.train, data.valid))
    assert not train & valid and len(train | valid) == 60
    opened = data.opened(ByteTokenizer())
    assert len(opened.valid) == 3 * len(data.valid)
    held = opened.valid.texts
    read = {ByteTokenizer().decode(held.of(at).tolist(), skip_special=True) for at in range(len(held))}
    assert read == valid
    assert set(data.words) == train


def test_a_text_that_is_alone_in_its_group_is_told(tmp_path):
    rows = [*ROWS[:6], {"text": "alone", "source": "song", "ratings": [1]}]
    remarks = read_judgements(config_of(tmp_path, rows)).remarks
    assert any("1 texts are the only ones of their group" in one and "ratings.jsonl:7" in one for one in remarks)
    with pytest.raises(UserError, match="no two of the 1 texts are of one group"):
        read_judgements(config_of(tmp_path, rows[-1:]))


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"text": "a", "ratings": 3}, "column 'ratings' is a number (3), expected the list of single ratings"),
        ({"text": "a", "ratings": []}, "has no rating"),
        ({"text": "a", "ratings": [1, "good"]}, 'holds "good", expected numbers'),
        ({"text": "a", "ratings": [True]}, "holds true"),
        ({"text": "", "ratings": [1]}, "column 'text' is empty"),
        ({"txt": "a", "ratings": [1]}, "did you mean 'txt'"),
    ],
)
def test_a_row_that_is_wrong_is_told_with_its_line(tmp_path, row, what):
    with pytest.raises(UserError) as caught:
        ratings_of(tmp_path, [{"text": "good", "ratings": [1, 2]}, row])
    assert "ratings.jsonl:2: " in str(caught.value) and what in str(caught.value)


def test_a_group_that_was_named_must_be_there(tmp_path):
    config = config_of(tmp_path, [{"text": "a", "ratings": [1]}], columns=RatingColumns(group="topic"))
    with pytest.raises(UserError, match="no column 'topic'"):
        read_rated(config, config.path)
