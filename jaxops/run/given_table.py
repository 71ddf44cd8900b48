"""The source that a user gives to `predict`: a path, an Arrow table, or a data frame that hands out an Arrow stream."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxops.core.failures import UserError

NAME = "given.parquet"
"""The file that a table is written to, so that it is read and checked by the same code as a file is."""


@contextlib.contextmanager
def as_file(source: Any) -> Iterator[str | os.PathLike[str]]:
    """The path of the source; a table lies in a temporary Parquet file meanwhile.

    Raises:
      UserError: the source is neither a path nor a table; or what is raised inside, which calls a table "the table".
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
