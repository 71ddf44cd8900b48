import csv
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxops.core.failures import UserError
from jaxops.data.interactions import arrange
from jaxops.data.interactions.interactions import Interactions, from_arrays, read_interactions
from jaxops.data.interactions.spec import Columns, MinCount

ROWS = [
    # user, item, time, weight: ties, out of order, ids that sort otherwise as strings than as numbers
    (10, 7, 300, 1.0),
    (9, 100, 200, 2.5),
    (10, 5, 100, 3.0),
    (10, 100, 100, 4.0),
    (9, 7, 200, 0.5),
    (10, 20, 300, 1.5),
    (9, 5, 100, 2.0),
]


def reference(rows, min_count=MinCount()):
    """The documented meaning in plain Python: [(user, [(time, item, weight), ...]), ...] in original ids."""
    rows = list(rows)
    while True:
        users, items = [r[0] for r in rows], [r[1] for r in rows]
        kept = [r for r in rows if users.count(r[0]) >= min_count.user and items.count(r[1]) >= min_count.item]
        if len(kept) == len(rows):
            break
        rows = kept
    out = []
    for user in sorted({r[0] for r in rows}):
        mine = [(r[2], row, r[1], r[3]) for row, r in enumerate(rows) if r[0] == user]
        out.append((user, [(time, item, weight) for time, _, item, weight in sorted(mine, key=lambda e: e[:2])]))
    return out


def spelled(inter: Interactions):
    out = []
    items = inter.item_ids.originals(inter.item)
    for row, user in enumerate(inter.user_ids.originals(np.arange(inter.n_users))):
        at = slice(inter.offsets[row], inter.offsets[row + 1])
        assert np.all(inter.user[at] == row)
        events = zip(inter.time[at].tolist(), items[at].tolist(), inter.weight[at].tolist(), strict=True)
        out.append((user.item(), list(events)))
    return out


def same(a: Interactions, b: Interactions) -> None:
    for name in ("user", "item", "time", "weight", "offsets"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=name)
    for name in ("user_ids", "item_ids"):
        np.testing.assert_array_equal(getattr(a, name).values, getattr(b, name).values)
        assert getattr(a, name).first == getattr(b, name).first
    assert (a.timed, a.dropped) == (b.timed, b.dropped)


def table(rows, user=int, item=int):
    users, items, times, weights = zip(*rows, strict=True)
    return {
        "u": [user(x) for x in users],
        "extra": [None] * len(rows),
        "i": [item(x) for x in items],
        "t": list(times),
        "w": list(weights),
    }


COLUMNS = Columns(user="u", item="i", time="t", weight="w")


def write_csv(path, columns, delimiter=","):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as file:
        out = csv.writer(file, delimiter=delimiter)
        out.writerow(columns)
        out.writerows(zip(*columns.values(), strict=True))


def write_jsonl(path, columns):
    lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")


def test_events_are_sorted_by_time_then_row_and_rows_by_id():
    inter = from_arrays(*zip(*ROWS, strict=True))
    assert spelled(inter) == reference(ROWS)
    assert inter.item_ids.originals([1, 2, 3, 4]).tolist() == [5, 7, 20, 100]
    assert inter.user_ids.originals(np.array([[1], [0]])).tolist() == [[10], [9]]
    assert (inter.n_users, inter.n_items, inter.n_events) == (2, 4, 7)
    # users 10 and 9 have two events each at one moment: row order decides
    assert inter.item_ids.originals(inter.item[inter.offsets[1] :]).tolist() == [5, 100, 7, 20]


def test_encoding_does_not_depend_on_row_order():
    inter = from_arrays(*zip(*ROWS, strict=True))
    shuffled = from_arrays(*zip(*sorted(ROWS, key=str), strict=True))
    np.testing.assert_array_equal(inter.item_ids.values, shuffled.item_ids.values)
    np.testing.assert_array_equal(inter.user_ids.values, shuffled.user_ids.values)


@pytest.mark.latest
@pytest.mark.parametrize("kind", [int, lambda x: f"id {x} é"], ids=["integer", "string"])
def test_every_format_gives_the_same_interactions(tmp_path, kind):
    columns = table(ROWS, kind, kind)
    expected = from_arrays(columns["u"], columns["i"], columns["t"], columns["w"])
    write_csv(tmp_path / "a.csv", columns)
    write_csv(tmp_path / "a.csv.gz", columns)
    write_csv(tmp_path / "a.tsv", columns, "\t")
    write_jsonl(tmp_path / "a.jsonl", columns)
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    dictionary = pa.table({**columns, "i": pa.array(columns["i"]).dictionary_encode()})
    pq.write_table(dictionary, tmp_path / "dictionary.parquet")
    for name in ("a.csv", "a.csv.gz", "a.tsv", "a.jsonl", "a.parquet", "dictionary.parquet"):
        same(read_interactions(str(tmp_path / name), COLUMNS), expected)
    uri = (tmp_path / "a.parquet").as_uri()
    same(read_interactions(uri, COLUMNS), expected)
    same(read_interactions(uri.replace("a.parquet", "[a]*.parquet"), COLUMNS), expected)


def test_string_ids_round_trip():
    users = ["zoë", "Ann", "zoë", "b", "Ann"]
    items = ["007", "7", "x" * 300, "7", "007"]
    inter = from_arrays(users, items)
    assert inter.user_ids.originals([0, 1, 2]).tolist() == ["Ann", "b", "zoë"]
    back = inter.item_ids.rows(inter.item_ids.originals(inter.item))
    np.testing.assert_array_equal(back, inter.item)
    assert inter.item_ids.rows(["7", "nope", "x" * 301, "xx", "70"]).tolist() == [2, -1, -1, -1, -1]
    with pytest.raises(IndexError, match="from 1 to 3"):
        inter.item_ids.originals([0])


def test_integer_ids_are_found_by_strings_too():
    inter = from_arrays([3, -5, 3], [1, 2, 3])
    assert inter.user_ids.rows(["3", "-5", "03", "x", "99999999999999999999"]).tolist() == [1, 0, -1, -1, -1]
    assert inter.user_ids.rows(np.array([[3, 4]])).tolist() == [[1, -1]]


def test_text_is_integer_only_if_all_of_it_is(tmp_path):
    (tmp_path / "a.csv").write_text("user,item\n1,10\n2,9\n1,9223372036854775807\n")
    inter = read_interactions(str(tmp_path / "a.csv"), Columns(time=None))
    assert inter.user_ids.kind == "integer"
    # 19 digits beyond what surely fits: the whole column stays text, nothing is rounded
    assert inter.item_ids.kind == "string"
    assert inter.item_ids.originals([1, 2, 3]).tolist() == ["10", "9", "9223372036854775807"]


def test_hive_partitions_globs_lists_and_folders(tmp_path):
    for day, rows in (("2026-11-15", ROWS[:3]), ("2026-11-16", ROWS[3:]), ("2026-12-01", ROWS)):
        folder = tmp_path / "plays" / f"dt={day}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table(table(rows)), folder / "part-0.parquet")
        (folder / "_SUCCESS").write_text("")
        (folder / ".part-0.parquet.crc").write_text("x")
    expected = from_arrays(*zip(*ROWS, strict=True))
    november = str(tmp_path / "plays" / "dt=2026-11-*" / "*.parquet")
    same(read_interactions(november, COLUMNS), expected)
    days = [str(tmp_path / "plays" / f"dt=2026-11-{d}") for d in (15, 16)]
    same(read_interactions(days, COLUMNS), expected)
    same(read_interactions([*days, november], COLUMNS), expected)  # each file once
    assert read_interactions(str(tmp_path / "plays"), COLUMNS, duplicates="keep").n_events == 2 * len(ROWS)
    remote = (tmp_path / "plays").as_uri()
    same(read_interactions(f"{remote}/dt=2026-11-1?/**/*.parquet", COLUMNS), expected)
    assert read_interactions(remote, COLUMNS, duplicates="keep").n_events == 2 * len(ROWS)
    by_day = read_interactions(november, Columns(user="u", item="i", time="dt"))
    assert set(by_day.time) == {1794700800.0, 1794787200.0}


def test_listed_order_is_the_row_order(tmp_path):
    for name, item in (("b", "first"), ("a", "second")):
        (tmp_path / f"{name}.csv").write_text(f"user,item,time\nu,{item},5\n")
    given_order = read_interactions([str(tmp_path / "b.csv"), str(tmp_path / "a.csv")])
    assert given_order.item_ids.originals(given_order.item).tolist() == ["first", "second"]
    by_name = read_interactions(str(tmp_path / "*.csv"))
    assert by_name.item_ids.originals(by_name.item).tolist() == ["second", "first"]


def test_no_time_keeps_the_order_of_the_rows(tmp_path):
    (tmp_path / "a.csv").write_text("user,item\nu,z\nv,y\nu,a\nu,m\n")
    inter = read_interactions(str(tmp_path / "a.csv"), Columns(time=None))
    assert not inter.timed
    assert inter.item_ids.originals(inter.item).tolist() == ["z", "a", "m", "y"]
    np.testing.assert_array_equal(inter.weight, np.ones(4, np.float32))


def test_no_header_line(tmp_path):
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n186\t302\t3\t891717742\n")
    names = ["user", "item", "rating", "time"]
    inter = read_interactions(str(tmp_path / "u.data"), Columns(), format="tsv", header=names)
    assert spelled(inter) == [(186, [(891717742.0, 302, 1.0)]), (196, [(881250949.0, 242, 1.0)])]


@pytest.mark.parametrize(
    ("times", "unit", "expected"),
    [
        ([1794700800, 1794700801], "s", [1794700800.0, 1794700801.0]),
        ([1794700800.25, 1794700801.5], "s", [1794700800.25, 1794700801.5]),
        ([1794700800250, 1794700801000], "ms", [1794700800.25, 1794700801.0]),
        (["2026-11-15", "2026-11-15 08:00"], "s", [1794700800.0, 1794729600.0]),
        (["2026-11-15T01:00:00+01:00", "2026-11-15T00:00:00.25Z"], "s", [1794700800.0, 1794700800.25]),
        (np.array(["2026-11-15", "2026-11-16"], "datetime64[D]"), "s", [1794700800.0, 1794787200.0]),
        (np.array(["2026-11-15T00:00:00.000001"] * 2, "datetime64[ns]"), "s", [1794700800.000001] * 2),
        (pa.array([1794700800] * 2, pa.timestamp("s", "Asia/Tokyo")), "ms", [1794700800.0] * 2),
    ],
)
def test_times(tmp_path, times, unit, expected):
    columns = pa.table({"user": [1, 1], "item": [1, 2], "time": times})
    pq.write_table(columns, tmp_path / "a.parquet")
    inter = read_interactions(str(tmp_path / "a.parquet"), Columns(time_unit=unit))
    np.testing.assert_array_equal(inter.time, sorted(expected))
    if isinstance(times, list):
        write_csv(tmp_path / "a.csv", {"user": [1, 1], "item": [1, 2], "time": times})
        write_jsonl(tmp_path / "a.jsonl", {"user": [1, 1], "item": [1, 2], "time": times})
        same(read_interactions(str(tmp_path / "a.csv"), Columns(time_unit=unit)), inter)
        same(read_interactions(str(tmp_path / "a.jsonl"), Columns(time_unit=unit)), inter)


def test_rows_without_an_id_are_dropped_and_counted(tmp_path):
    (tmp_path / "a.csv").write_text("user,item,time\nu,a,1\n,b,2\nu,,3\nu,c,4\n")
    inter = read_interactions(str(tmp_path / "a.csv"))
    assert inter.n_events == 2
    assert inter.dropped == {"null_id_events": 2}


def test_min_count_repeats_until_nothing_changes():
    # u3 has one event and goes; then c has one left and goes; then all that are left have two
    rows = [("u1", "a"), ("u1", "b"), ("u2", "c"), ("u2", "a"), ("u2", "b"), ("u3", "c")]
    inter = from_arrays(*zip(*rows, strict=True), min_count=MinCount(user=2, item=2))
    assert spelled(inter) == [
        ("u1", [(0.0, "a", 1.0), (1.0, "b", 1.0)]),
        ("u2", [(3.0, "a", 1.0), (4.0, "b", 1.0)]),
    ]
    assert inter.dropped == {"min_count_events": 2, "min_count_users": 1, "min_count_items": 1}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 3), st.sampled_from([0.5, 1.0])),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 50),
    st.booleans(),
)
def test_arrange_is_the_reference(rows, min_user, min_item, chunk, strings):
    """k-core, encoding, grouping and order, for any chunk size."""
    if strings:
        rows = [(f"u{u}", f"i{i}", t, w) for u, i, t, w in rows]
    min_count = MinCount(min_user, min_item)
    expected = reference(rows, min_count)
    whole = arrange.arrange
    try:
        arrange.arrange = lambda *a, **k: whole(*a, **{**k, "chunk": chunk})
        if not expected:
            with pytest.raises(UserError, match="no event is left after min_count"):
                from_arrays(*zip(*rows, strict=True), min_count=min_count, duplicates="keep")
            return
        inter = from_arrays(*zip(*rows, strict=True), min_count=min_count, duplicates="keep")
    finally:
        arrange.arrange = whole
    assert spelled(inter) == expected
    assert inter.dropped.get("min_count_users", 0) == len({r[0] for r in rows}) - len(expected)
    assert inter.dropped.get("min_count_events", 0) == len(rows) - inter.n_events


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("2015-04-01 10:00:00 UTC", 1427882400.0),
        ("2015-04-01 10:00:00.25 UTC", 1427882400.25),
        ("2015-04-01 10:00:00.123456789", 1427882400.123456),
        ("2015-04-01T10:00:00.123456789Z", 1427882400.123456),
        ("2015-04-01 12:00:00+02:00", 1427882400.0),
        ("2015-04-01 12:00:00.5 +0200", 1427882400.5),
        ("2015-04-01T10:00:00z", 1427882400.0),
    ],
)
def test_times_as_pandas_and_bigquery_write_them(tmp_path, text, seconds):
    (tmp_path / "a.csv").write_text(f"user,item,time\n1,2,{text}\n1,3,{text}\n")
    assert read_interactions(str(tmp_path / "a.csv")).time.tolist() == [seconds] * 2


def test_compact_dates_are_asked_about(tmp_path):
    path = str(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("user,item,time\n1,2,20150401\n1,3,20160229\n")
    with pytest.raises(UserError, match=r"row 1, column 'time' is 20150401: the date 2015-04-01, or 20,150,401 sec"):
        read_interactions(path)
    found = read_interactions(path, Columns(time_unit="date"))
    assert found.time.tolist() == [1427846400.0, 1456704000.0]
    (tmp_path / "a.csv").write_text("user,item,time\n1,2,20150401\n1,3,20150229\n")
    assert read_interactions(path).time.tolist() == [20150229.0, 20150401.0]  # the second is no date
    with pytest.raises(UserError, match=r"row 2, column 'time' is '20150229', expected a date as 20150401"):
        read_interactions(path, Columns(time_unit="date"))


def test_a_weight_that_no_model_can_hold(tmp_path):
    pq.write_table(pa.table({"user": [1], "item": [2], "w": [1e308]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 1, column 'w' is 1e\+308.*a number that float32 can hold"):
        read_interactions(str(tmp_path / "a.parquet"), Columns(time=None, weight="w"))
