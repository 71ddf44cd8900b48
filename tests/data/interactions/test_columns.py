"""Which columns a file has, whatever its format: what `predict` decides by."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxops.core.failures import UserError
from jaxops.data.side import columns_of, read_columns


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name, text", [("a.csv", "user,item\n1,2\n"), ("a.tsv", "user\titem\n1\t2\n")])
def test_of_text_by_its_first_line_or_as_told(folder, name, text):
    (folder / name).write_text(text)
    assert columns_of(name) == ["user", "item"]
    assert columns_of(name, header=("x", "y", "z")) == ["x", "y", "z"]


def test_of_json_lines_also_what_the_first_line_lacks(folder):
    rows = [{"user": 1}, {"user": 1, "time": None}, {"item": 3}]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert columns_of("a.jsonl") == ["user", "time", "item"]


def test_of_several_files_what_any_has_and_their_partitions(folder):
    for day, columns in [("1", ["user", "item", "time"]), ("2", ["item", "user"])]:
        (folder / f"day={day}").mkdir()
        pq.write_table(pa.table({name: [1] for name in columns}), folder / f"day={day}" / "a.parquet")
    assert columns_of("day=*/*.parquet") == ["user", "item", "time", "day"]
    with pytest.raises(UserError, match=r"day=2/a\.parquet: no column 'time'"):
        read_columns("day=*/*.parquet", ["user", "time"])
    (folder / "day=2" / "a.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file"):
        columns_of("day=*/*.parquet")


def test_a_file_that_cannot_be_read_is_told(folder):
    (folder / "a.csv.gz").write_text("user,item\n1,2\n")
    with pytest.raises(UserError, match=r"a\.csv\.gz: cannot be read as csv: zlib inflate failed"):
        columns_of("a.csv.gz")
