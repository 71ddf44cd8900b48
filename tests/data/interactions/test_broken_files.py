"""Every kind of broken data file gives one clear message that says where, what, and what was expected."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxops.core.failures import UserError
from jaxops.data.interactions.interactions import read_interactions
from jaxops.data.interactions.sequences import read_sequences
from jaxops.data.interactions.spec import Columns, MinCount
from jaxops.data.spec import TextFormat


def parquet(folder, name="a.parquet", **columns):
    pq.write_table(pa.table(columns), folder / name)


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def table(**columns):
    good = {"user": [1, 2], "item": [3, 4], "time": [5, 6]}
    return lambda folder: parquet(folder, **{**good, **columns})


def two(first, second):
    def write(folder):
        parquet(folder, "a.parquet", user=first, item=[1, 2], time=[1, 2])
        parquet(folder, "b.parquet", user=second, item=[1, 2], time=[1, 2])

    return write


CSV = "user,item,time\n1,2,3\n"
WEIGHTED = Columns(weight="rating")

# name: (writes files, path, options, what the message must say)
BROKEN = {
    "missing file": (text("plays.csv", CSV), "play.csv", {}, ["no data file", "did you mean 'plays.csv'?"]),
    "missing folder": (text("a.csv", CSV), "nowhere/a.csv", {}, ["nowhere does not exist"]),
    "glob of nothing": (text("a.csv", CSV), "*.parquet", {}, ["no file matches", "*.parquet"]),
    "folder of nothing": (text("notes.txt", "x"), ".", {}, ["holds no data file", "notes.txt"]),
    "empty list": (text("a.csv", CSV), [], {}, ["the list of data files is empty"]),
    "unknown suffix": (text("a.xlsx", "x"), "a.xlsx", {}, ["'.xlsx'", ".parquet", "`format:`"]),
    "mixed formats": (
        lambda folder: (text("a.csv", CSV)(folder), table()(folder)),
        ".",
        {},
        ["different formats", "a.csv (csv)", "a.parquet (parquet)"],
    ),
    "no bytes": (text("a.csv", ""), "a.csv", {}, ["no events in", "a.csv", "empty"]),
    "header alone": (text("a.csv", "user,item,time\n"), "a.csv", {}, ["no events in", "empty"]),
    "blank jsonl": (text("a.jsonl", "\n\n"), "a.jsonl", {}, ["no events in", "empty"]),
    "no ids at all": (text("a.csv", "user,item,time\n,,3\n"), "a.csv", {}, ["all 1 rows lack a user"]),
    "missing column": (
        text("a.csv", "account,item,time\n1,2,3\n"),
        "a.csv",
        {"columns": Columns(user="acount")},
        ["no column 'acount'; did you mean 'account'?", "columns: account, item, time"],
    ),
    "missing time": (text("a.csv", "user,item\n1,2\n"), "a.csv", {}, ["no column 'time'", "`time: null`"]),
    "missing in parquet": (
        table(),
        "a.parquet",
        {"columns": WEIGHTED},
        ["no column 'rating'", "user, item, time"],
    ),
    "missing in jsonl": (
        text("a.jsonl", '{"user": 1, "item": 2, "tiem": 3}\n'),
        "a.jsonl",
        {},
        ["no column 'time'; did you mean 'tiem'?"],
    ),
    "column twice": (
        text("a.csv", "user,item,item,time\n1,2,3,4\n"),
        "a.csv",
        {},
        ["'item' is there 2 times"],
    ),
    "ragged row": (
        text("a.csv", CSV + "1,2\n"),
        "a.csv",
        {},
        ["a.csv", "Row #3", "Expected 3 columns, got 2"],
    ),
    "not utf-8": (
        text("a.csv", CSV.encode() + "é,1,1\n".encode() + b"\xff,1,1\n"),
        "a.csv",
        {},
        ["a.csv:4: b'\\xff,1,1\\n' is no UTF-8 text", "text.encoding: latin-1"],
    ),
    "unknown encoding": (
        text("a.csv", CSV),
        "a.csv",
        {"text": TextFormat(encoding="latin-9000")},
        ["text.encoding: 'latin-9000' is no encoding"],
    ),
    "quote astray": (
        text("a.csv", CSV + '1,"Weird,2\n1,7,3\n1,"good",4\n'),
        "a.csv",
        {},
        ["a.csv:3: a quoted field opens here and goes on after its closing quote", "Weird", "text.quote: none"],
    ),
    "quote that never closes": (
        text("a.csv", CSV + '1,2,3\n1,"Weird,2\n1,7,3\n'),
        "a.csv",
        {},
        ["a.csv:4: a quoted field opens here and does not close"],
    ),
    "NaN rating": (
        table(rating=[1.0, np.nan]),
        "a.parquet",
        {"columns": WEIGHTED},
        ["a.parquet: row 2, column 'rating'", "null or NaN", "1 such row"],
    ),
    "NaN rating in csv": (
        text("a.csv", "user,item,time,rating\n1,2,3,4\n1,2,3,nan\n1,2,3,\n1,2,3,NaN\n"),
        "a.csv",
        {"columns": WEIGHTED},
        ["row 2, column 'rating'", "3 such row"],
    ),
    "null time": (table(time=pa.array([None, 1])), "a.parquet", {}, ["row 1, column 'time'", "1 such row"]),
    "null time in jsonl": (
        text("a.jsonl", '{"user": 1, "item": 2, "time": 3}\n{"user": 1, "item": 2}\n'),
        "a.jsonl",
        {},
        ["row 2, column 'time'"],
    ),
    "infinite rating": (
        table(rating=[1.0, np.inf]),
        "a.parquet",
        {"columns": WEIGHTED},
        ["row 2", "infinite"],
    ),
    "rating in words": (
        text("a.csv", "user,item,time,rating\n1,2,3,4\n1,2,3,good\n"),
        "a.csv",
        {"columns": WEIGHTED},
        ["row 2, column 'rating' is 'good', expected a number"],
    ),
    "rating a list": (
        table(rating=[[1], [2]]),
        "a.parquet",
        {"columns": WEIGHTED},
        ["list", "expected numbers"],
    ),
    "time in words": (
        text("a.csv", CSV + "1,2,yesterday\n"),
        "a.csv",
        {},
        ["row 2, column 'time' is 'yesterday', expected a unix time"],
    ),
    "day first": (text("a.csv", "user,item,time\n1,2,15/11/2026\n"), "a.csv", {}, ["'15/11/2026'", "ISO"]),
    "milliseconds": (
        table(time=[1794700800000, 1]),
        "a.parquet",
        {},
        ["row 1", "1794700800000", "year 3000", "`columns.time_unit`"],
    ),
    "float ids": (
        table(user=[1.0, 2.5]),
        "a.parquet",
        {},
        ["a.parquet: row 2, column 'user' is 2.5, which is no id", "whole"],
    ),
    "float ids in jsonl": (
        text("a.jsonl", '{"user": 1.5, "item": 2, "time": 3}\n'),
        "a.jsonl",
        {},
        ["a.jsonl: row 1, column 'user' is 1.5, which is no id"],
    ),
    "date ids": (
        table(item=pa.array([1, 2], pa.date32())),
        "a.parquet",
        {},
        ["row 1, column 'item'", "the id column holds date32"],
    ),
    "an essay as id": (table(user=["x", "y" * 5000]), "a.parquet", {}, ["1000 bytes", "right column?"]),
    "a NUL in an id": (table(user=["x", "x\0"]), "a.parquet", {}, ["NUL"]),
    "types of ids differ": (
        two([1, 2], ["a", "b"]),
        "*.parquet",
        {},
        ["user ids are of different types", "int64 in", "string in", "'a' in", "b.parquet: row 1"],
    ),
    "types of ids differ in jsonl": (
        text("a.jsonl", '{"user": 1, "item": 2, "time": 3}\n{"user": "x", "item": 2, "time": 3}\n'),
        "a.jsonl",
        {},
        ["a.jsonl:2", "'user' is \"x\" here", "int64 before"],
    ),
    "not parquet": (text("a.parquet", CSV), "a.parquet", {}, ["a.parquet: not a Parquet file"]),
    "parquet cut short": (
        lambda folder: (
            table()(folder),
            (folder / "a.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-9]),
        ),
        "a.parquet",
        {},
        ["a.parquet: not a Parquet file"],
    ),
    "parquet with damaged names": (
        lambda folder: (
            table()(folder),
            (folder / "a.parquet").write_bytes((folder / "a.parquet").read_bytes().replace(b"item", b"it\xecm")),
        ),
        "a.parquet",
        {},
        ["a.parquet: not a Parquet file", "utf-8"],
    ),
    "parquet with text that is none": (
        table(user=pa.array([b"x", b"\xff"]).view(pa.string())),
        "a.parquet",
        {},
        ["a.parquet: cannot be read as parquet", "UTF8"],
    ),
    "broken json": (
        text("a.jsonl", '{"user": 1, "item": 2, "time": 3}\n\n{"user": 1, "item": 2, "tim\n'),
        "a.jsonl",
        {},
        ["a.jsonl:3: not JSON"],
    ),
    "json array": (
        text("a.jsonl", '[{"user": 1}]\n'),
        "a.jsonl",
        {},
        ["a.jsonl:1: expected a JSON object a line"],
    ),
    "json object as id": (
        text("a.jsonl", '{"user": {"id": 1}, "item": 2, "time": 3}\n'),
        "a.jsonl",
        {},
        ["a.jsonl:1: column 'user'", "expected a number or a string"],
    ),
    "nothing left": (
        text("a.csv", CSV),
        "a.csv",
        {"min_count": MinCount(user=5, item=2)},
        ["no event is left after min_count {user: 5, item: 2}", "1 events, 1 users"],
    ),
    "no such filesystem": (
        text("a.csv", CSV),
        "nosuch://bucket/a.csv",
        {},
        ["cannot read data from nosuch://"],
    ),
    "nothing at the uri": (
        text("a.csv", CSV),
        "file:///nonexistent-folder/*.csv",
        {},
        ["no data file at file://"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_message(tmp_path, monkeypatch, name):
    write, path, options, fragments = BROKEN[name]
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder)
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as caught:
        read_interactions(path, **options)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message
    assert "Traceback" not in message
    assert len(message) < 700
    assert sorted(folder.rglob("*")) == before


SEQUENCES = {
    "missing": (None, ["cannot read sequences from", "No such file"]),
    "empty": ("\n  \n", ["no sequences in it", "`user item item ...`"]),
    "no items": ("1 2 3\n2\n", ["a.txt:2: user '2' has no items"]),
    "twice": ("1 2 3\n2 4\n\n1 5\n", ["a.txt:4: user '1' has line 1 already"]),
    "binary": (b"\x00\xff\xfe", ["not a text file"]),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence_file_message(tmp_path, name):
    content, fragments = SEQUENCES[name]
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_sequences(path)
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)


def test_sequence_file_names_the_nearest(tmp_path):
    (tmp_path / "beauty.txt").write_text("1 2\n")
    with pytest.raises(UserError, match=r"did you mean 'beauty\.txt'"):
        read_sequences(tmp_path / "beuty.txt")
