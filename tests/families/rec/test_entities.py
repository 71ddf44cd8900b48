import numpy as np
import pyarrow as pa
import pytest

from jaxops.data.idmaps import Hashed
from jaxops.families.rec.entities import EntityColumn, encode_features, query_codes
from jaxops.families.rec.tables_config import TableConfig


@pytest.mark.parametrize("apart", [True, False])
def test_a_hashed_table_keeps_columns_apart_if_told(apart):
    """The same text in two columns is two rows; two features of one column are one, and so is what a query brings."""
    table = TableConfig(dim=4, rows=100_000, features=("a", "b", "c"), ids=Hashed(apart=apart))
    words = [f"w{x}" for x in range(50)]
    first, other = EntityColumn(pa.array(words)), EntityColumn(pa.array(words))
    tables, owner = {"t": table}, dict.fromkeys("abc", "t")
    encoded = encode_features(tables, owner, {"a": first, "b": first, "c": other})
    a, b, c = (encoded.codes[name] for name in "abc")
    assert np.array_equal(a, b) and np.mean(a == c) == (0 if apart else 1)
    again = query_codes(tables, {"c": pa.array(words[::-1])}, lambda name: encoded.maps[name])
    assert np.array_equal(again["c"], [*c[::-1], 0])  # and nobody's


def test_nobody_is_unknown_and_as_a_user_nothing():
    """No training example has an unknown user: that row of the table is as it was drawn."""
    columns = {
        "user": EntityColumn(pa.array(["u", "v"]), own=True),
        "country": EntityColumn(pa.array(["DE", None])),
        "likes": EntityColumn(pa.array([["a", "b"], []]), weights=pa.array([[1.0, 2.0], []])),
    }
    tables = {name: TableConfig(dim=4) for name in columns}
    encoded = encode_features(tables, {name: name for name in columns}, columns)
    encoded.add_nobody(list(columns))
    assert {name: codes.tolist() for name, codes in encoded.codes.items()} == {
        "user": [1, 2, -1],
        "country": [1, 0, 0],
        "likes": [[1, 2], [-1, -1], [-1, -1]],
    }
    assert encoded.weights["likes"].tolist() == [[1, 2], [0, 0], [0, 0]]
