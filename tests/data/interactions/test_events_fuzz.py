"""Whole events (ids, time, weight) written in every format and read again, each against what was written.

The columns alone are in tests/data/test_fuzz.py. Here no event may be lost, invented, moved in time or given to someone
else; a table that anyone would call plain is never refused.
"""

import csv
import datetime as dt
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxops.core.failures import UserError
from jaxops.data.interactions.interactions import read_interactions
from jaxops.data.interactions.spec import Columns

FORMATS = ("csv", "tsv", "jsonl", "parquet")
BEGIN = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)
PLAIN = st.text(st.sampled_from("ab01 .-é漢,;|'#\\/\""), max_size=5)
BROKEN = st.text(st.sampled_from('a\n" ,'), max_size=5)
QUICK = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LONG = settings(QUICK, max_examples=1000, derandomize=False)

identifiers = {
    "small": st.integers(0, 9),
    "large": st.integers(-(2**63), 2**63 - 1),
    "text": PLAIN.map(lambda text: "n" + text),
    "broken": BROKEN.map(lambda text: f"u{text}u"),
}
moments = {
    "whole": st.integers(1_600_000_000, 1_700_000_000),
    "eighths": st.integers(0, 10**9).map(lambda n: 1_600_000_000 + n / 8),
    "stamp": st.integers(0, 10**12).map(lambda n: BEGIN + dt.timedelta(microseconds=n)),
    "naive": st.integers(0, 10**6).map(lambda n: (BEGIN + dt.timedelta(seconds=n)).replace(tzinfo=None)),
}


@st.composite
def tables(draw):
    """Format, kinds of the columns, and rows (user, item, time, weight), no two of which are the same event."""
    form = draw(st.sampled_from(FORMATS))
    kinds = sorted(identifiers) if form != "tsv" else [kind for kind in sorted(identifiers) if kind != "broken"]
    user, item = draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds))
    moment = draw(st.sampled_from(sorted(moments)))
    weight = st.integers(0, 80).map(lambda n: n / 8)
    row = st.tuples(identifiers[user], identifiers[item], moments[moment], weight)
    return form, (user, item, moment), draw(st.lists(row, min_size=1, max_size=12, unique_by=lambda row: row[:3]))


def written(value):
    """As a text file holds it."""
    return value.isoformat() if isinstance(value, dt.datetime) else value


def write(folder, form, rows):
    path, names = folder / f"a.{form}", ("user", "item", "time", "w")
    if form == "parquet":
        pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), path)
    elif form == "jsonl":
        lines = [dict(zip(names, map(written, row), strict=True)) for row in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif form == "tsv":
        path.write_text("".join("\t".join(str(written(cell)) for cell in row) + "\n" for row in [names, *rows]))
    else:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([names, *([written(cell) for cell in row] for row in rows)])
        path.write_text(out.getvalue())
    return str(path)


def seconds(moment):
    if not isinstance(moment, dt.datetime):
        return float(moment)
    return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp()


def events(inter):
    users, items = inter.user_ids.table.take(pa.array(inter.user)), inter.item_ids.table.take(pa.array(inter.item - 1))
    return zip(users.to_pylist(), items.to_pylist(), inter.time.tolist(), inter.weight.tolist(), strict=True)


def blanks_decide(rows):
    """Whether two ids differ in the blanks around them alone: one id or two, which the reader asks about."""
    columns = [{str(cell) for cell in column} for column in list(zip(*rows, strict=True))[:2]]
    return any(len({cell.strip() for cell in column}) < len(column) for column in columns)


def check(folder, table):
    form, _, rows = table
    try:
        inter = read_interactions(write(folder, form, rows), Columns(weight="w"), duplicates="keep")
    except UserError as error:
        assert blanks_decide(rows), f"a plain table was refused: {error}"
        return
    found = sorted((str(user), str(item), time, weight) for user, item, time, weight in events(inter))
    wanted = sorted((str(user), str(item), seconds(time), weight) for user, item, time, weight in rows)
    assert found == [(user, item, pytest.approx(time, abs=1e-6), weight) for user, item, time, weight in wanted]
    assert inter.dropped.get("null_id_events", 0) == 0 and sum(inter.lengths) == len(rows)


@given(tables())
@QUICK
def test_events_are_read_as_they_were_written(tmp_path, table):
    check(tmp_path, table)


@pytest.mark.slow
@given(tables())
@LONG
def test_many_events_are_read_as_they_were_written(tmp_path, table):
    check(tmp_path, table)
