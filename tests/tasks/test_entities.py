import numpy as np
import pyarrow as pa
import pytest

from jaxops.data.idmaps import Hashed
from jaxops.tasks.entities import EntityColumn, encode, query_codes
from jaxops.tasks.tables_config import TableConfig


@pytest.mark.parametrize("apart", [True, False])
def test_a_hashed_table_keeps_columns_apart_if_told(apart):
    """The same text in two columns is two rows; two features of one column are one, and so is what a query brings."""
    table = TableConfig(dim=4, rows=100_000, features=("a", "b", "c"), ids=Hashed(apart=apart))
    words = [f"w{x}" for x in range(50)]
    first, other = EntityColumn(pa.array(words)), EntityColumn(pa.array(words))
    tables, owner = {"t": table}, dict.fromkeys("abc", "t")
    encoded = encode(tables, owner, {"a": first, "b": first, "c": other})
    a, b, c = (encoded.codes[name] for name in "abc")
    assert np.array_equal(a, b) and np.mean(a == c) == (0 if apart else 1)
    again = query_codes(tables, {"c": pa.array(words[::-1])}, lambda name: encoded.maps[name])
    assert np.array_equal(again["c"], c[::-1])
