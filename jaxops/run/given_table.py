"""The source that a user gives to `predict` or `sample` (a path, an Arrow table, a data frame), and its columns."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxops.core.failures import UserError

NAME = "given.parquet"
"""The name of the file that a table is written to, so that the same code reads and checks tables and files."""


@contextlib.contextmanager
def as_file(source: Any) -> Iterator[str | os.PathLike[str]]:
    """Yields the path of the source; a table is written to a temporary Parquet file for the time of the context.

    Raises:
      UserError: the source is neither a path nor a table. An error from inside is raised again, and the path of the
        temporary file in it becomes "the table".
    """
    if isinstance(source, str | os.PathLike):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="jaxops-") as folder:
        path = os.path.join(folder, NAME)
        pq.write_table(_table(source), path)
        try:
            yield path
        except UserError as error:
            raise UserError(str(error).replace(path, "the table"), shared=error.shared) from None


def _table(source: Any) -> pa.Table:
    if isinstance(source, pa.Table):
        return source
    if hasattr(source, "__arrow_c_stream__"):
        return pa.table(source)
    raise UserError(
        f"predict: expected a path, a pyarrow table or a data frame (something with __arrow_c_stream__), got"
        f" {type(source).__name__}"
    )


def joined_columns(rows: Sequence[Mapping[str, Any]], made: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Joins the columns of rows that were given with those of what was made of them, and keeps them all.

    A given column of the same name becomes `given_NAME`; where there is one already, `given_given_NAME`.

    Raises:
      UserError: a given column cannot be written.
    """
    made_names = list(made[0]) if made else []
    given = columns_of_rows(rows)
    taken, columns = {*given, *made_names}, {}
    for name, values in given.items():
        called = name
        while called in taken and name in made_names:
            called = f"given_{called}"
        taken.add(called)
        columns[called] = values
    return pa.table(columns | {name: pa.array([row[name] for row in made]) for name in made_names})


def columns_of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
    """Returns the columns of rows; it is called before what takes long, so that no result is lost for them.

    Raises:
      UserError: the values of a column are of several types, or no table can hold them.
    """
    columns = {}
    # Of all rows: pyarrow takes the names of the first row alone, and a column that it lacks would be lost.
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, OverflowError, UnicodeError) as error:
            raise UserError(
                f"column {name!r} has values of several types, or one that no table holds ({error})"
            ) from None
    return columns
