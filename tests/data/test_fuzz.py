"""Small tables of every type and oddity, written as CSV, TSV, JSON lines and Parquet, read and compared value by value.

The expectation is plain Python over the values as they were written, and what pandas reads of the same file: no row
lost, none invented, no traceback.
"""

import csv
import decimal
import io
import json
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxops.core.failures import UserError
from jaxops.data.interactions.interactions import read_interactions
from jaxops.data.interactions.spec import Columns
from jaxops.data.side import read_columns
from jaxops.data.values import MISSING, floats, plain

LETTERS = st.sampled_from("ab01 .-é\",;|\t'#\\")
TEXT = st.text(LETTERS, max_size=5) | st.sampled_from(
    [*MISSING, "007", "1.0", " 1", "NA", "none", "-3", "18446744073709551615"]
)
COLUMNS = {
    "string": TEXT | st.none(),
    "large_string": TEXT | st.none(),
    "binary": TEXT.map(str.encode) | st.none(),
    "dictionary": TEXT | st.none(),
    "int8": st.integers(-128, 127) | st.none(),
    "int64": st.integers(-(2**63), 2**63 - 1) | st.none(),
    "uint64": st.integers(0, 2**64 - 1) | st.none(),
    "double": st.floats(width=32) | st.integers(-99, 99).map(float) | st.none(),
    "decimal": st.decimals(-99, 99, places=2, allow_nan=False) | st.none(),
    "bool": st.booleans() | st.none(),
    "null": st.none(),
}
TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "binary": pa.binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "int8": pa.int8(),
    "int64": pa.int64(),
    "uint64": pa.uint64(),
    "double": pa.float64(),
    "decimal": pa.decimal128(6, 2),
    "bool": pa.bool_(),
    "null": pa.null(),
}
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def whole(value):
    return not isinstance(value, str) and value == value and abs(value) != math.inf and value == int(value)


def category(value):
    """What a cell says, as text: the rule of values.py over Python values."""
    if value is None or value != value:
        return None
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str):
        return None if value.strip() in MISSING else value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, decimal.Decimal):
        return str(int(value)) if whole(value) else f"{value:.2f}"
    if isinstance(value, float):
        return str(int(value)) if whole(value) and abs(value) < 2**53 else value
    return str(value)


def as_number(value):
    return value if value is None or isinstance(value, float) else float(value)


@given(st.data())
@FUZZ
def test_parquet_columns_value_by_value(tmp_path, data):
    kind = data.draw(st.sampled_from(sorted(COLUMNS)))
    values = data.draw(st.lists(COLUMNS[kind], min_size=1, max_size=9))
    pq.write_table(pa.table({"x": pa.array(values, TYPES[kind])}), tmp_path / "a.parquet", row_group_size=2)
    found = plain(read_columns(str(tmp_path / "a.parquet"), ["x"])["x"]).to_pylist()
    expected = [category(value) for value in values]
    assert len(found) == len(values)
    pandas = pd.read_parquet(tmp_path / "a.parquet", dtype_backend="pyarrow")["x"]
    assert [None if value is pd.NA else category(value) for value in pandas] == expected
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None), (found, expected)
        if isinstance(want, float):
            assert float(got) == want
        elif want is not None:
            assert str(got) == want


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=9), st.sampled_from("tc,;|"), st.booleans())
@FUZZ
def test_text_value_by_value(tmp_path, rows, form, everything):
    """Read as pyarrow reads it alone where that is right; in TSV, where quotes are letters, as the lines say."""
    path = tmp_path / ("a.tsv" if form == "t" else "a.csv")
    if form == "t":
        rows = [tuple(cell.replace("\t", " ") for cell in row) for row in rows]
        content = "".join("\t".join(row) + "\n" for row in [("x", "y", "z"), *rows])
    else:
        out = io.StringIO()
        quoting = csv.QUOTE_ALL if everything else csv.QUOTE_MINIMAL
        writer = csv.writer(out, delimiter="," if form == "c" else form, lineterminator="\n", quoting=quoting)
        writer.writerows([("x", "y", "z"), *rows])
        content = out.getvalue()
    path.write_bytes(content.encode())
    table = read_columns(str(path), ["x", "y", "z"])
    assert [tuple(cell or "" for cell in row.values()) for row in table.to_pylist()] == rows
    separator = {"t": "\t", "c": ","}.get(form, form)
    quoting = csv.QUOTE_NONE if form == "t" else csv.QUOTE_MINIMAL
    pandas = pd.read_csv(
        path, dtype=str, keep_default_na=False, sep=separator, quoting=quoting, skip_blank_lines=False, engine="python"
    )
    assert list(pandas.itertuples(index=False, name=None)) == rows
    if form == "c":
        options = pacsv.ConvertOptions(column_types=dict.fromkeys("xyz", pa.string()), strings_can_be_null=False)
        alone = pacsv.read_csv(path, convert_options=options, parse_options=pacsv.ParseOptions(newlines_in_values=True))
        assert [tuple(row.values()) for row in alone.to_pylist()] == rows


@given(st.data())
@FUZZ
def test_json_lines_value_by_value(tmp_path, data):
    kind = data.draw(st.sampled_from(["string", "int64", "bool"]))
    values = data.draw(st.lists(COLUMNS[kind], min_size=1, max_size=9))
    lines = [{"x": value, "other": [1, {"y": None}]} for value in values]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = plain(read_columns(str(tmp_path / "a.jsonl"), ["x"])["x"]).to_pylist()
    assert [None if one is None else str(one) for one in found] == [category(value) for value in values]


@given(st.data())
@FUZZ
def test_events_keep_every_row_or_count_it_or_say_one_thing(tmp_path, data):
    """Ids of any type in any format: events plus those without an id are the rows, and equal ids are one user."""
    kind = data.draw(st.sampled_from(sorted(COLUMNS)))
    users = data.draw(st.lists(COLUMNS[kind], min_size=1, max_size=9))
    typed = pa.table({"user": pa.array(users, TYPES[kind]), "item": list(range(len(users)))})
    pq.write_table(typed, tmp_path / "a.parquet")
    try:
        inter = read_interactions(str(tmp_path / "a.parquet"), Columns(time=None))
    except UserError as error:
        assert "row" in str(error) and (
            kind in ("bool", "double", "decimal") or "lack a user" in str(error) or "NUL" in str(error)
        ), str(error)
        return
    named = [category(user) for user in users]
    known = [name for name in named if name is not None]
    assert inter.n_events == len(known) and inter.dropped.get("null_id_events", 0) == len(users) - len(known)
    spelled = {_spelled(name) for name in known} if all(_spelled(name) is not None for name in known) else set(known)
    assert inter.n_users == len(spelled)
    # Every event is found again by the id that was written.
    written = [user for user, name in zip(users, named, strict=True) if name is not None]
    asked = np.array([user.decode() if isinstance(user, bytes) else str(category(user)) for user in written])
    rows = inter.user_ids.rows(asked)
    assert (rows >= 0).all() and np.bincount(rows, minlength=inter.n_users).tolist() == inter.lengths.tolist()


def _spelled(name):
    """The integer that a text spells, None if none."""
    text = str(name).strip().removesuffix(".0")
    digits = text.removeprefix("-")
    plain_form = digits.isascii() and digits.isdigit() and (digits == "0" or digits[0] != "0")
    return int(text) if plain_form else None


@given(
    st.lists(st.floats() | st.integers(-(2**70), 2**70) | st.sampled_from([True, False, None]), min_size=1, max_size=9)
)
@FUZZ
def test_numbers_are_numbers(tmp_path, values):
    """CSV cells of numbers, as float() reads them."""
    text = ["" if value is None else str(value) for value in values]
    if any(isinstance(value, bool) for value in values) and not all(isinstance(v, bool) or v is None for v in values):
        return
    (tmp_path / "a.csv").write_text("x,y\n" + "".join(f"{cell},1\n" for cell in text))
    found = floats(read_columns(str(tmp_path / "a.csv"), ["x"])["x"], lambda row: f"row {row}")
    expected = [math.nan if value is None else float(value) for value in values]
    np.testing.assert_array_equal(found, expected)
