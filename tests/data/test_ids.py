"""One rule for ids, wherever they are read: integers as integers, the rest as exact text, the missing as nobody."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxops.core.failures import UserError
from jaxops.data.idmaps import Hashed, Range, Vocabulary, fit_map
from jaxops.data.ids import Ids
from jaxops.data.interactions.interactions import read_interactions
from jaxops.data.interactions.spec import Columns, MinCount
from jaxops.data.side import join_side, read_columns
from jaxops.data.spec import SideFile
from jaxops.data.values import plain

UNTIMED = Columns(time=None)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parquet(name, **columns):
    pq.write_table(pa.table(columns), name)
    return name


def text(name, *rows):
    with open(name, "w") as file:
        file.write("".join(f"{row}\n" for row in ("user,item", *rows)))
    return name


def ids_of(inter):
    return (
        inter.user_ids.originals(np.arange(inter.n_users)).tolist(),
        inter.item_ids.originals(np.arange(1, inter.n_items + 1)).tolist(),
    )


@pytest.mark.parametrize("word", ["", "nan", "NaN", "NULL", "null", "None", "<NA>", "\\N", "  ", " nan "])
def test_words_for_missing_name_nobody_in_any_format(word):
    """Also where the other ids are text, and in Parquet and JSON."""
    rows = [("a", "x"), (word, "y"), ("b", word), ("b", "z")]
    text("a.csv", *(f'{u},"{i}"' for u, i in rows))
    parquet("a.parquet", user=[u for u, _ in rows], item=[i for _, i in rows])
    with open("a.jsonl", "w") as file:
        file.writelines(json.dumps({"user": u, "item": i}) + "\n" for u, i in rows)
    for name in ("a.csv", "a.parquet", "a.jsonl"):
        inter = read_interactions(name, UNTIMED)
        assert ids_of(inter) == (["a", "b"], ["x", "z"]) and inter.dropped == {"null_id_events": 2}, name


def test_other_words_are_ids():
    assert ids_of(read_interactions(text("a.csv", "NA,none", "na,nil"), UNTIMED)) == (["NA", "na"], ["nil", "none"])


def test_missing_words_do_not_turn_integers_into_text():
    assert ids_of(read_interactions(text("a.csv", "10,1", "9,2", "nan,3", "9,None"), UNTIMED)) == ([9, 10], [1, 2])


def test_a_hive_partition_of_nobody(folder):
    for user in ("7", "__HIVE_DEFAULT_PARTITION__"):
        (folder / f"user={user}").mkdir()
        parquet(f"user={user}/a.parquet", item=[1, 2])
    inter = read_interactions("user=*/*.parquet", UNTIMED)
    assert ids_of(inter)[0] == ["7"] and inter.dropped == {"null_id_events": 2}


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1.0, 11.0, None, 11.0]),
        pa.array([1.0, 11.0, float("nan"), 11.0], pa.float32()),
        pa.array(["1.00", "11.00", None, "11.00"]).cast(pa.decimal128(9, 2)),
        pa.array([1, 11, None, 11], pa.uint64()),
        pa.array([1, 11, None, 11], pa.int16()).dictionary_encode(),
    ],
)
def test_whole_numbers_of_every_type_are_integers(column):
    inter = read_interactions(parquet("a.parquet", user=column, item=[1, 2, 3, 4]), UNTIMED)
    assert ids_of(inter)[0] == [1, 11] and inter.user_ids.kind == "integer" and inter.n_events == 3


def test_floats_in_text_are_the_integers_that_they_spell():
    """A table with missing ids, as pandas writes it, beside one without."""
    text("a.csv", "1.0,5", "11.0,6", ",7")
    text("b.csv", "11,5", " 1,6", "2,6")
    inter = read_interactions(["a.csv", "b.csv"], UNTIMED)
    assert ids_of(inter) == ([1, 2, 11], [5, 6])
    assert inter.lengths.tolist() == [2, 1, 2]
    few = read_interactions(["a.csv", "b.csv"], UNTIMED, MinCount(user=2))
    assert ids_of(few)[0] == [1, 11] and few.dropped["min_count_users"] == 1


@pytest.mark.parametrize("other", ["01", "1.0", '" 1"', "001.00"])
def test_text_that_may_be_one_id_or_two_is_refused_with_its_rows(other):
    text("a.csv", "1,5", "x,5", ",5", f"{other},5")
    with pytest.raises(UserError, match=r"user: '1' \(a\.csv: row 1\) and .*\(a\.csv: row 4\).*one id or two"):
        read_interactions("a.csv", UNTIMED)


def test_typed_text_is_exact():
    inter = read_interactions(parquet("a.parquet", user=["1", "01", "x"], item=["7", "9", "10"]), UNTIMED)
    assert ids_of(inter) == (["01", "1", "x"], ["10", "7", "9"])


def test_padded_text_stays_text():
    assert ids_of(read_interactions(text("a.csv", "007,1", "008,2"), UNTIMED))[0] == ["007", "008"]


@pytest.mark.parametrize("kind", [pa.uint64(), pa.string()])
def test_unsigned_ids_beyond_int64_are_exact_text(kind):
    big = [2**64 - 1, 2**63, 5]
    inter = read_interactions(parquet("a.parquet", user=pa.array(big, pa.uint64()).cast(kind), item=[1, 2, 3]), UNTIMED)
    assert ids_of(inter)[0] == sorted(map(str, big))
    assert inter.user_ids.rows(np.array(big, np.uint64)).tolist() == inter.user_ids.rows([*map(str, big)]).tolist()
    assert (inter.user_ids.rows(np.array(big, np.uint64)) >= 0).all()


def test_types_that_differ_between_files():
    parquet("a.parquet", user=pa.array([1, 2]), item=[1, 2])
    parquet("b.parquet", user=pa.array(["2", "3"]), item=[1, 2])
    parquet("c.parquet", user=pa.nulls(2), item=[1, 2])
    parquet("d.parquet", user=pa.array([2**63], pa.uint64()), item=[1])
    assert ids_of(read_interactions(["a.parquet", "b.parquet"], UNTIMED))[0] == [1, 2, 3]
    for order in (["c.parquet", "a.parquet"], ["a.parquet", "c.parquet"]):
        inter = read_interactions(order, UNTIMED)
        assert ids_of(inter)[0] == [1, 2] and inter.dropped == {"null_id_events": 2}
    assert ids_of(read_interactions(["a.parquet", "d.parquet"], UNTIMED))[0] == ["1", "2", str(2**63)]


def test_rows_are_found_by_ids_of_every_type():
    numbers = Ids(np.array([2**60, 2**60 + 2]), 0)
    for kind in (np.int64, np.uint64, str, object):
        assert numbers.rows(np.array([2**60 + 2, 2**60 + 1]).astype(kind)).tolist() == [1, -1]
    assert numbers.rows(np.array([2**64 - 1], np.uint64)).tolist() == [-1]
    small = Ids(np.array([3, 7]), 0)
    assert small.rows(np.array([7.0, 3.5, np.nan])).tolist() == [1, -1, -1]
    assert small.rows(["7.0", " 7", "07", "x"]).tolist() == [1, 1, -1, -1]
    words = Ids(np.array([b"7", b"x"]), 0)
    assert words.rows(np.array([7.0])).tolist() == words.rows([7]).tolist() == words.rows(["7.0"]).tolist() == [0]
    assert words.rows(["x", "y", "07"]).tolist() == [1, -1, -1]


@pytest.mark.parametrize(
    "values",
    [pa.array([1, 11, 1]), pa.array([1.0, 11.0, 1.0]), pa.array(["1", "11", "1.0"]), pa.array([1, 11, 1], pa.uint64())],
)
def test_maps_follow_the_rule(values):
    vocabulary = fit_map(Vocabulary(), "t", values, None)
    assert vocabulary.rows == 3
    asked = [pa.array([11, 1]), pa.array(["11", "1"]), pa.array(["11.0", "1"]), pa.array([11.0, 1.0])]
    assert [vocabulary.encode(one).tolist() for one in asked] == [[2, 1]] * 4
    for config in (Hashed(), Range()):
        fitted = fit_map(config, "t", values, 100)
        assert len({tuple(fitted.encode(one).tolist()) for one in asked}) == 1
        assert fitted.encode(pa.array([None, "nan"])).tolist() == [0, 0]


def test_side_files_join_by_the_rule():
    inter = read_interactions(text("a.csv", "1,5", "11,6", "3,7"), UNTIMED)
    keys = {
        "floats": [11.0, 1.0, float("nan")],
        "text": ["11.0", " 1", "nan"],
        "unsigned": pa.array([11, 1, None], pa.uint64()),
    }
    for name, column in keys.items():
        parquet("side.parquet", user=column, age=["old", "young", "nobody"])
        found = join_side(SideFile(path="side.parquet", key="user", columns=("age",)), inter.user_ids, name)[0]
        assert found["age"].to_pylist() == ["young", None, "old"], name


@pytest.mark.parametrize(
    "column, said",
    [
        (pa.array([{"a": 1}]), "struct"),
        (pa.array([[["a"]]]), "list"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "map"),
        (pa.array([b"\xff\xfe"]), "no UTF-8 text"),
        (pa.array([b"\xff\xfe"], pa.binary(2)), "no UTF-8 text"),
    ],
)
def test_what_is_no_value_is_told_with_its_column_and_row(column, said):
    with pytest.raises(UserError, match=f"column 'x': row 1.*{said}"):
        plain(column, "column 'x'")
    with pytest.raises(UserError, match=f"a.parquet: row 1, column 'user'.*{said}"):
        read_interactions(parquet("a.parquet", user=column, item=[1]), UNTIMED)


def test_bytes_are_text():
    parquet("a.parquet", user=pa.array([b"x", "é".encode()], pa.large_binary()), item=[1, 2])
    assert ids_of(read_interactions("a.parquet", UNTIMED))[0] == ["x", "é"]
    assert plain(read_columns("a.parquet", ["user"])["user"]).to_pylist() == ["x", "é"]
