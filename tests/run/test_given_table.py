"""`predict` takes a path, an Arrow table, or anything that hands out an Arrow stream, and reads all of them alike."""

import pyarrow as pa
import pyarrow.csv
import pytest

from jaxops.core.failures import UserError
from jaxops.run.build import build_task, load_config
from jaxops.run.load import load


class Frame:
    """A data frame as pandas and polars are to Arrow: it hands out a stream, and is no table."""

    def __init__(self, table):
        self._table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self._table.__arrow_c_stream__(requested_schema)


def test_a_table_and_a_frame_are_read_as_the_file_is(finished):
    model, table = load(finished), pyarrow.csv.read_csv("plays.csv")
    expected = model.predict("plays.csv", top=3)
    assert model.predict(table, top=3).equals(expected)
    assert model.predict(Frame(table), top=3).equals(expected)
    assert model.predict(pa.table({"user": ["u00", "u07"]}), top=2)["user"].to_pylist() == ["u00"] * 2 + ["u07"] * 2


def test_what_is_wrong_with_a_table_is_told_of_the_table(finished):
    model = load(finished)
    with pytest.raises(UserError, match=r"^the table: no column 'user'"):
        model.predict(pa.table({"item": ["i01"]}))
    with pytest.raises(UserError, match=r"expected a path, a pyarrow table or a data frame .*, got list"):
        model.predict([1, 2])
    for ask in (model.predict, model.recall):
        with pytest.raises(UserError, match="no user has a history that the model knows"):
            ask(pa.table({"user": ["nobody"]}))
    with pytest.raises(UserError, match="top must be at least 1"):
        model.predict("plays.csv", top=0)


def test_a_frame_in_place_of_a_factory_is_told_what_to_do(finished):
    task = load_config(f"{finished}/config.yaml")
    with pytest.raises(UserError, match=r"data is a function that makes one, got a value of type Frame; .*to_parquet"):
        build_task(task, data=Frame(pa.table({"user": [1]})))
    with pytest.raises(UserError, match=r"objective is a function that makes one, got a value of type dict$"):
        build_task(task, objective={"kind": "bce"})
