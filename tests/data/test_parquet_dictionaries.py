"""A dictionary that stands for far more text than its file has bytes: what is read at once stays bounded."""

import decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxops.core.failures import UserError
from jaxops.data import files, formats, ids
from jaxops.data.interactions.interactions import read_interactions
from jaxops.data.interactions.spec import Columns

ROWS = 20_000


@pytest.fixture
def write(tmp_path):
    """Writes `ROWS` events whose shelf is one of three texts of `length` letters, and returns the path."""

    def made(length: int, column: str = "shelf"):
        texts = pa.array([f"{n}{'x' * (length - 1)}" for n in range(3)])
        events = {name: np.arange(ROWS) % 7 for name in ("user", "item", "time")}
        events[column] = pa.DictionaryArray.from_arrays(pa.array(np.arange(ROWS, dtype=np.int32) % 3), texts)
        path = tmp_path / "events.parquet"
        # In several row groups, as text, not as a dictionary.
        pq.write_table(pa.table(events), path, store_schema=False, row_group_size=8000)
        return str(path)

    return made


def read(path, *wanted):
    (file,) = files.expand_paths(path)
    return list(formats.batches(file, wanted, None))


def test_long_texts_are_read_a_few_rows_at_once_and_all_of_them_are(write, monkeypatch):
    path = write(2000)  # 40 MB of text in a file of some kilobytes
    monkeypatch.setattr(formats, "MOST", 1 << 20)
    found = read(path, "item", "shelf")
    assert max(batch.nbytes for batch in found) <= 1.05 * formats.MOST
    assert sum(len(batch) for batch in found) == ROWS
    shelves = pa.chunked_array([batch["shelf"] for batch in found]).to_pylist()
    assert all(text == f"{n % 3}{'x' * 1999}" for n, text in enumerate(shelves))
    assert pa.chunked_array([batch["item"] for batch in found]).to_numpy().tolist() == (np.arange(ROWS) % 7).tolist()


def test_short_texts_are_read_as_before(write):
    assert [len(batch) for batch in read(write(20), "item", "shelf")] == [ROWS]


def test_a_text_that_is_no_category_is_refused_before_it_is_read(write, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST", 1000)
    path = write(1001)
    with pytest.raises(UserError, match=r"events.parquet: column 'shelf' has a text of 1,001 bytes; at most 1,000"):
        read(path, "item", "shelf")
    read(path, "item")  # nobody asked for it


def test_an_id_that_is_too_long_is_told_at_its_first_batch(write, monkeypatch):
    path = write(ids.LONGEST + 1, "user")
    batches = []
    real = formats.batches
    monkeypatch.setattr(formats, "MOST", 1 << 20)
    monkeypatch.setattr(formats, "batches", lambda *args, **options: (batches.append(b) or b for b in real(*args)))
    with pytest.raises(UserError, match=r"events.parquet: user ids may be 1000 bytes long; one has 1001 \('0xxx"):
        read_interactions(path)
    assert len(batches) == 1


def test_other_columns_in_dictionaries_of_bytes_are_left_to_their_readers(tmp_path):
    events = {name: [1, 2, 3] for name in ("user", "item", "time")}
    prices = pa.array([decimal.Decimal("1.50")] * 3, pa.decimal128(30, 2))
    pq.write_table(pa.table({**events, "price": prices, "none": pa.nulls(3)}), tmp_path / "a.parquet")
    (batch,) = read(str(tmp_path / "a.parquet"), "price", "none")
    assert batch["price"].to_pylist() == prices.to_pylist() and batch["none"].null_count == 3
    pq.write_table(pa.table({**events, "raw": [b"\xff", b"a", None]}), tmp_path / "b.parquet")
    assert read(str(tmp_path / "b.parquet"), "raw")[0]["raw"].to_pylist() == [b"\xff", b"a", None]
    empty = {name: pa.array([], pa.int64()) for name in events}
    pq.write_table(pa.table({**empty, "shelf": pa.array([], pa.string())}), tmp_path / "c.parquet")
    assert sum(len(batch) for batch in read(str(tmp_path / "c.parquet"), "user", "shelf")) == 0
    shelves = pa.array([None, None, None], pa.string())
    pq.write_table(pa.table({**events, "shelf": shelves}), tmp_path / "d.parquet")
    found = read_interactions(str(tmp_path / "d.parquet"), Columns(context=("shelf",)))
    assert found.context_of("shelf").null_count == 3
