"""CSV and TSV as people write them: separators, quotes and encodings, found or given, and never rows that vanish."""

import csv
import io
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxops.core.failures import UserError
from jaxops.data import dialect
from jaxops.data.interactions.interactions import read_interactions
from jaxops.data.interactions.spec import Columns
from jaxops.data.side import columns_of, read_columns
from jaxops.data.spec import TextFormat


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows(name, wanted, **options):
    table = read_columns(name, wanted, **options)
    return [tuple(row.values()) for row in table.to_pylist()]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", "::"])
def test_separators_are_found_by_the_wanted_columns_and_told(separator, caplog):
    lines = [("user", "item", "time"), ("u", "a,b" if separator != "," else "ab", "3"), ("v", "c", "4")]
    Path("a.csv").write_text("".join(separator.join(line) + "\n" for line in lines))
    assert rows("a.csv", ["user", "item", "time"]) == lines[1:]
    assert columns_of("a.csv") == ["user", "item", "time"]
    assert ("apart by" in caplog.text) == (separator != ",")
    inter = read_interactions("a.csv")
    assert inter.n_events == 2 and inter.time.tolist() == [3, 4]


def test_a_header_of_ones_own_tells_the_separator_by_its_length():
    Path("ratings.dat").write_text("1::10::5::978300760\n1::11::4::978300761\n")
    inter = read_interactions("ratings.dat", format="csv", header=("user", "item", "rating", "time"))
    assert inter.time.tolist() == [978300760, 978300761]


def test_given_separators():
    Path("a.csv").write_text("user~item\n1~2,3\n")
    assert rows("a.csv", ["user", "item"], text=TextFormat(separator="~")) == [("1", "2,3")]
    Path("b.csv").write_text("user§item\n1§2\n")
    assert rows("b.csv", ["user", "item"], text=TextFormat(separator="§")) == [("1", "2")]
    Path("c.csv").write_text("user,item\n1;2,3\n")
    assert rows("c.csv", ["user", "item"], text=TextFormat(separator=",")) == [("1;2", "3")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
def test_encodings_are_found_and_told(encoding, caplog):
    Path("a.csv").write_bytes("user,item\nzoë,café\nb,x\n".encode(encoding))
    assert rows("a.csv", ["user", "item"]) == [("zoë", "café"), ("b", "x")]
    assert ("text.encoding" in caplog.text) == (encoding in ("latin-1", "utf-16"))
    assert rows("a.csv", ["user"], text=TextFormat(encoding=encoding)) == [("zoë",), ("b",)]


def test_another_encoding_is_given():
    Path("a.csv").write_bytes("user,item\nшик,1\n".encode("cp1251"))
    assert rows("a.csv", ["user"], text=TextFormat(encoding="cp1251")) == [("шик",)]
    with pytest.raises(UserError, match=r"a\.csv: .* is no utf-8 text \(text.encoding\)|is no UTF-8 text"):
        rows("a.csv", ["user"], text=TextFormat(encoding="utf-8"))


def test_in_tsv_a_quote_is_a_letter():
    lines = [("1", '"weird al'), ("1", "b"), ("2", 'odd" one'), ("2", '"c"')]
    Path("a.tsv").write_text("user\titem\n" + "".join("\t".join(line) + "\n" for line in lines))
    assert rows("a.tsv", ["user", "item"]) == lines
    quoted = [(u, i) for u, i in lines if i != '"weird al']
    Path("b.tsv").write_text("user\titem\n" + "".join("\t".join(line) + "\n" for line in quoted))
    assert rows("b.tsv", ["user", "item"], text=TextFormat(quote="double"))[-1] == ("2", "c")


def test_tsv_of_quoted_fields_alone_is_told(caplog):
    Path("a.tsv").write_text('"user"\t"item"\n"1"\t"a\tb"\n')
    assert rows("a.tsv", ["user", "item"]) == [("1", "a\tb")]
    assert "text.quote" in caplog.text


def test_quotes_may_be_letters_in_csv():
    Path("a.csv").write_text('user,item\n1,"Weird\n2,b\n3,"c"\n')
    assert rows("a.csv", ["user", "item"], text=TextFormat(quote="none")) == [("1", '"Weird'), ("2", "b"), ("3", '"c"')]
    with pytest.raises(UserError, match=r"a\.csv:2: a quoted field"):
        rows("a.csv", ["user", "item"])
    Path("b.csv").write_text('user,item\n1,5" pipe\n2,b\n')  # it opens no field, so it is a letter
    assert rows("b.csv", ["user", "item"]) == [("1", '5" pipe'), ("2", "b")]


def test_the_line_of_a_stray_quote_counts_those_inside_of_fields(monkeypatch):
    monkeypatch.setattr(dialect, "BLOCK", 16)
    good = '1,"a\nb"\n2,"say ""x"""\n'
    Path("a.csv").write_text("user,item\n" + good * 10 + '3,"c" d\n4,e\n')
    with pytest.raises(UserError, match=r"a\.csv:32: .*goes on after its closing quote: '\"c\" d"):
        rows("a.csv", ["user", "item"])
    monkeypatch.setattr(dialect, "LONGEST", 64)
    Path("a.csv").write_text("user,item\n" + '3,"c\n' + "4,e\n" * 100)
    with pytest.raises(UserError, match=r"a\.csv:2: .*does not close"):
        rows("a.csv", ["user", "item"])


CELL = st.text(st.sampled_from('ab",;\t\n é1'), max_size=6)


@given(
    st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=12),
    st.integers(1, 40),
    st.sampled_from([",", ";"]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_what_csv_writes_is_read_back_wherever_blocks_end(tmp_path, table, block, separator, ending, quoting):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator=ending, quoting=quoting)
    writer.writerow(("x", "y", "z"))
    writer.writerows(table)
    path = tmp_path / "a.csv"
    path.write_bytes(out.getvalue().encode())
    before, dialect.BLOCK = dialect.BLOCK, block
    try:
        found = rows(str(path), ["x", "y", "z"])
    finally:
        dialect.BLOCK = before
    assert [tuple(value or "" for value in row) for row in found] == table


@pytest.mark.parametrize("quote", ["double", "none"])
def test_text_as_arrow_alone_would_read_it(quote):
    """Rows without a special character are the same through every way of reading."""
    content = "user,item\n" + "".join(f"u{k},{k}\n" for k in range(1000))
    Path("a.csv").write_text(content)
    assert rows("a.csv", ["user", "item"], text=TextFormat(quote=quote)) == [(f"u{k}", f"{k}") for k in range(1000)]
    assert read_interactions("a.csv", Columns(time=None)).n_items == 1000
    assert pa.__version__
