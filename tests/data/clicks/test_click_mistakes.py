"""Click data that is not what it should be: told, or read as what it says, and never quietly as something else."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxops.core.failures import UserError
from jaxops.data.clicks.clicks import open_clicks
from jaxops.data.clicks.spec import ClickColumns, ClicksFile, Fractions, Label
from jaxops.data.idmaps import Vocabulary
from jaxops.data.interactions.open import open_data
from jaxops.data.interactions.spec import InteractionsFile
from jaxops.data.spec import SideFile
from jaxops.run.build import config_from_dict

ROWS = 100
BY_TIME = {"columns": ClickColumns(time="at"), "split": Fractions(by="time")}
SIDE = SideFile(path="side.pq", key="key", columns=("age",), bags=("tags",), format="parquet")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(**columns):
    base = {
        "who": [f"u{at % 10}" for at in range(ROWS)],
        "device": [("tv", "phone")[at % 2] for at in range(ROWS)],
        "click": [at % 2 for at in range(ROWS)],
        "at": list(range(ROWS)),
    }
    pq.write_table(pa.table({**base, **columns}), "clicks.pq")


def opened(names=("device",), **change):
    given = {"path": "clicks.pq", "format": "parquet", "labels": {"y": Label(column="click")}} | change
    config = ClicksFile(**{"categorical": ("device",), **given})
    return open_clicks(config, {name: (Vocabulary(), None) for name in names}, {name: (name,) for name in names})


def first(value, rest, count=1):
    return [value] * count + [rest] * (ROWS - count)


@pytest.mark.parametrize(
    "columns, change, said",
    [
        ({"w": first(None, 1.0)}, {"columns": ClickColumns(weight="w")}, "columns.weight: row 1 is null"),
        ({"w": first(-1.0, 1.0)}, {"columns": ClickColumns(weight="w")}, "columns.weight: row 1 is negative"),
        ({"at": [None, None, *range(ROWS - 2)]}, BY_TIME, r"columns.time: row 1 is null.*2 such row"),
        (
            {"at": first("yesterday", "2020-01-01")},
            BY_TIME,
            "columns.time: row 1 is 'yesterday', expected unix times",
        ),
        ({"x": first(float("inf"), 1.0)}, {"numeric": ("x",)}, "numeric: x: row 1 is infinite"),
        ({"click": [*[1] * 80, *[None] * 10, *[0] * 10]}, {}, "labels.y: no example of the valid part has it"),
        ({"weight": ["a"] * ROWS}, {"categorical": ("weight",)}, "cannot be called 'weight'"),
        ({"id": ["a"] * ROWS}, {"bags": ("id",)}, "cannot be called 'id'"),
        (
            {"tags": ["a|b"] * ROWS},
            {"bags": ("tags",), "weights": {"tag": "click"}},
            r"data.weights: 'tag' is none of data.bags.*tags",
        ),
        (
            {"tags": first("a", "a|b"), "w": first("1", "1")},
            {"bags": ("tags",), "weights": {"tags": "w"}},
            r"data.weights.tags: column 'w': row 2 has 1 weight\(s\) for 2 value\(s\)",
        ),
        (
            {"tags": first(None, "a|b"), "w": first(None, "1|-1")},
            {"bags": ("tags",), "weights": {"tags": "w"}},
            "data.weights.tags: column 'w': row 2 has a weight that is negative or missing",
        ),
        (
            {"tags": ["a"] * ROWS, "w": [0.5] * ROWS},
            {"bags": ("tags",), "weights": {"tags": "w"}},
            "column 'w' holds double; expected a bag",
        ),
        (
            {"age": [1.0] * ROWS},
            {"numeric": ("age",), "columns": ClickColumns(user="who"), "user_features": SIDE},
            "data.user_features.columns: 'age' is named by data.numeric already",
        ),
        ({"n": [1] * ROWS}, {"bags": ("n",)}, r"column 'n' holds int64; expected a bag: lists, or text apart by '\|'"),
        (
            {"tags": ["a"] * ROWS, "n": [1] * ROWS},
            {"bags": ("tags",), "weights": {"tags": "n"}},
            "column 'n' holds int64; expected a bag",
        ),
        ({}, {"bags": ("device",)}, "data.bags: 'device' is named by data.categorical already"),
        (
            {"age": ["a"] * ROWS},
            {"categorical": ("age",), "columns": ClickColumns(user="who"), "user_features": SIDE},
            "data.user_features.columns: 'age' is named by data.categorical already",
        ),
        ({"list": [["a", "b"]] * ROWS}, {"categorical": ("list",)}, "column 'list' holds lists.*`bags`"),
        ({"s": [{"a": 1}] * ROWS}, {"categorical": ("s",)}, "column 's': row 1: the column holds struct"),
        ({"s": [{"a": 1}] * ROWS}, {"bags": ("s",)}, "column 's': row 1: the column holds struct"),
        ({"s": [{"a": 1}] * ROWS}, {"numeric": ("s",)}, "column 's': row 1: the column holds struct"),
        ({"l": [[["a"]]] * ROWS}, {"bags": ("l",)}, "column 'l' holds list<.*lists of numbers or text"),
        (
            {"m": pa.array([[("a", 1)]] * ROWS, pa.map_(pa.string(), pa.int64()))},
            {"bags": ("m",)},
            "column 'm': row 1: the column holds map",
        ),
        ({"b": first(b"x", b"\xff")}, {"categorical": ("b",)}, r"column 'b': row 2 is b'\\xff', which is no UTF-8"),
        ({"x": first(1e308, 1.0)}, {"numeric": ("x",)}, "numeric: x: row 1 is larger than 3.4e.38"),
        (
            {"x": [1e30, *map(float, range(1, ROWS))]},
            {"numeric": ("x",)},
            r"numeric: x: row 1 is 1e\+30, so large.*placeholder",
        ),
        ({"w": first(1e39, 1.0)}, {"columns": ClickColumns(weight="w")}, "columns.weight: row 1 is larger than"),
        ({"x": first("1,5", "2")}, {"numeric": ("x",)}, "numeric: x: row 1 is '1,5', expected a number"),
    ],
)
def test_what_would_go_unnoticed_is_told(columns, change, said):
    write(**columns)
    with pytest.raises(UserError, match=said):
        opened(**change)


@pytest.mark.parametrize(
    "values",
    [[f"2020-01-01T00:{at // 60:02d}:{at % 60:02d}" for at in range(ROWS)], pa.array(range(ROWS), "timestamp[us]")],
)
def test_times_may_be_iso_text_or_timestamps(values):
    write(at=values)
    parts = opened(**BY_TIME).parts
    assert parts["train"].max() < parts["valid"].min() and parts["valid"].max() < parts["test"].min()


def test_a_time_that_the_split_does_not_ask_for_may_be_missing():
    write(at=first(None, 1))
    assert len(opened(columns=ClickColumns(time="at")).parts["train"]) == 80


def test_examples_of_nobody_are_split_among_themselves():
    write(who=[None if at % 10 == 3 else f"u{at % 10}" for at in range(ROWS)])
    split = Fractions(by="user_time", valid=0.2, test=0.2)
    parts = opened(columns=ClickColumns(user="who", time="at"), split=split).parts
    assert sorted(np.concatenate(list(parts.values()))) == list(range(ROWS))
    assert [int(np.sum(rows % 10 == 3)) for rows in parts.values()] == [6, 2, 2]


def test_nobody_has_an_empty_bag_and_a_side_row_without_a_key_is_nobodys():
    write(who=[-1, None, *([3] * (ROWS - 2))])
    pq.write_table(pa.table({"key": [None, 3], "age": ["lost", "30"], "tags": ["x|y", "p|q"]}), "side.pq")
    data = opened(("device", "age", "tags"), columns=ClickColumns(user="who"), user_features=SIDE)
    batch = data.examples.batch(np.arange(3), np.arange(3))
    assert batch["age"].tolist() == [0, 0, 1]  # "lost" has no row: nobody's age is -1's
    assert batch["tags"].tolist() == [[-1, -1], [-1, -1], [1, 2]]
    assert data.rows == {"device": 3, "age": 2, "tags": 3}


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(pa.string(), 2)])
def test_lists_of_every_kind_are_bags(kind):
    write(tags=pa.array([["b", "a"]] * ROWS, kind))
    data = opened(("device", "tags"), bags=("tags",))
    assert data.source(0).batch(0, 2)["tags"].tolist() == [[2, 1], [2, 1]]


def test_json_keeps_every_digit_of_an_id_and_numbers_may_begin_whole():
    row = lambda at: {"click": at % 2, "x": 1 if at < 3 else 1.5, "device": 2**53 + at}
    Path("clicks.jsonl").write_text("".join(json.dumps(row(at)) + "\n" for at in range(ROWS)))
    data = opened(path="clicks.jsonl", format="jsonl", numeric=("x",), columns=ClickColumns(weight="x"))
    assert data.rows == {"device": 81}
    np.testing.assert_array_equal(data.transform["map.device.ids"], 2**53 + np.arange(80))
    assert data.examples.weight[:4].tolist() == [1, 1, 1, 1.5]


@pytest.mark.parametrize("form", ["text", "lists"])
def test_weights_of_bags_go_with_what_they_weigh(form):
    tags = [["b", "a"], [], ["a"], None] * 25
    much = [[2.0, 0.5], [], [3.0], None] * 25
    if form == "text":
        tags, much = ([None if x is None else "|".join(map(str, x)) for x in column] for column in (tags, much))
    ages = pa.table(
        {"key": [f"u{at}" for at in range(9)], "age": [1] * 9, "likes": [["x", "y"]] * 9, "w": [[1, 4]] * 9}
    )
    pq.write_table(ages, "side.pq")
    write(tags=tags, much=much)
    side = SideFile(path="side.pq", key="key", bags=("likes",), weights={"likes": "w"}, format="parquet")
    given = {"bags": ("tags",), "weights": {"tags": "much"}, "columns": ClickColumns(user="who"), "user_features": side}
    data = opened(("device", "tags", "likes"), **given)
    batch = data.examples.batch(np.arange(10), np.arange(10))
    assert batch["tags"][0].tolist() == [2, 1] and batch["tags/weight"].dtype == np.float32
    assert batch["tags/weight"][:4].tolist() == [[2, 0.5], [0, 0], [3, 0], [0, 0]]
    assert batch["likes/weight"][:9].tolist() == [[1, 4]] * 9
    assert batch["likes"][9].tolist() == [-1, -1]  # a user without a row in the file: an empty bag


def test_numbers_of_side_files_are_for_click_models_alone():
    pq.write_table(pa.table({"user": [1, 1], "item": [1, 2], "time": [1, 2]}), "plays.pq")
    side = SideFile(path="side.pq", key="key", numeric=("age",))
    config = InteractionsFile("plays.pq", format="parquet", user_features=side)
    with pytest.raises(UserError, match=r"data.user_features.numeric: 'age': only click models read numbers"):
        open_data(config, sides=True)


@pytest.mark.parametrize(
    "values",
    [
        [True, False] * 50,
        ["True", "False"] * 50,
        ["true", " false"] * 50,
        pa.array(["1.0", "0.0"] * 50).cast(pa.decimal128(5, 2)),
        pa.array([1, 0] * 50, pa.uint64()),
    ],
)
def test_truth_values_and_decimals_are_numbers(values):
    write(click=values, x=values)
    data = opened(numeric=("x",))
    assert data.examples.labels[:4, 0].tolist() == [1, 0, 1, 0]
    np.testing.assert_allclose(data.examples.numeric[:2, 0], [1, -1])


def test_what_was_true_or_false_may_be_a_category():
    write(device=[True, False] * 50)
    data = opened()
    assert data.rows == {"device": 3} and data.source(0).batch(0, 4)["device"].tolist()


def test_bags_drop_blanks_around_values_and_empty_parts_with_their_weights():
    write(tags=["b | a||nan", "", "|", " a"] * 25, much=["1|2|3|4", "", "5|6", "7"] * 25)
    data = opened(("device", "tags"), bags=("tags",), weights={"tags": "much"})
    batch = data.examples.batch(np.arange(4), np.arange(4))
    assert batch["tags"].tolist() == [[2, 1], [-1, -1], [-1, -1], [1, -1]]
    assert batch["tags/weight"].tolist() == [[1, 2], [0, 0], [0, 0], [7, 0]]


def test_a_bag_apart_by_another_separator_is_told(caplog):
    write(tags=["a,b"] * ROWS)
    opened(("device", "tags"), bags=("tags",))
    assert "column 'tags' is a bag apart by '|', which no row holds; most hold ','" in caplog.text


def test_side_files_that_hardly_join_are_warned_of(caplog):
    ages = {"key": ["u1", "stranger", None], "age": ["30", "40", "50"], "tags": ["x", "y", "z"]}
    pq.write_table(pa.table(ages), "side.pq")
    write()
    data = opened(("device", "age", "tags"), columns=ClickColumns(user="who"), user_features=SIDE)
    counts = data.inspection["user_features"]
    assert [counts[name] for name in ("ids", "matched", "unmatched", "without_key", "empty")] == [10, 1, 1, 1, {}]
    assert "WARNING: data.user_features: 1 of 10 have a row (10.0%)" in caplog.text
    assert "is 'key' the right column?" in data.inspection["notes"][0]
    caplog.clear()
    pq.write_table(pa.table({"key": [f"u{at}" for at in range(9)], "age": [None] * 9, "tags": ["x"] * 9}), "side.pq")
    data = opened(("device", "tags"), columns=ClickColumns(user="who"), user_features=SIDE)
    assert data.inspection["user_features"]["empty"] == {"age": 9}
    assert "9 of 10 have a row (90.0%), of them 9 without age" in caplog.text and "WARNING: " not in caplog.text


def test_columns_of_unlike_types_in_several_files():
    write(device=[1, 2] * 50)
    Path("clicks.pq").rename("a.pq")
    write(device=["1", "2"] * 50)
    Path("clicks.pq").rename("b.pq")
    data = opened(path=("a.pq", "b.pq"))
    assert data.rows == {"device": 3}


def test_empty_separators_are_refused():
    with pytest.raises(UserError, match="separator"):
        config_from_dict(
            {"task": "rec", "data": {"kind": "clicks", "path": "x", "separator": ""}, "run": {"steps": 1}}, source="x"
        )


@pytest.mark.parametrize("by", ["time", "random"])
def test_exact_copies_of_examples_do_not_straddle_a_split(by, caplog):
    twice = {"who": [f"u{at // 2}" for at in range(ROWS)], "at": [at // 2 for at in range(ROWS)]}
    twice |= {"device": [f"d{at // 2}" for at in range(ROWS)], "click": [at // 2 % 2 for at in range(ROWS)]}
    write(**twice, tags=[["x", str(at // 2)] for at in range(ROWS)])
    given = {"columns": ClickColumns(user="who", time="at"), "split": Fractions(by=by), "bags": ("tags",)}
    data = opened(**given)
    assert sum(map(len, data.parts.values())) == len(data.examples.labels) == 50
    assert data.inspection["dropped"] == {"duplicate_examples": 50} and "50 example(s) are exact copies" in caplog.text
    assert len(set(data.examples.user.tolist())) == 50
    assert sum(map(len, opened(**given, duplicates="keep").parts.values())) == ROWS
    write(**twice | {"at": [at // 2 * 86400 for at in range(ROWS)]}, tags=[["x"]] * ROWS)
    assert sum(map(len, opened(**given).parts.values())) == ROWS
    assert sum(map(len, opened(**given, duplicates="drop").parts.values())) == 50
