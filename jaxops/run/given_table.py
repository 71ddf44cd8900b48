"""The source that a user gives to `predict`: a path, an Arrow table, or a data frame that exports an Arrow stream."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
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
