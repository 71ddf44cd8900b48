"""The arrays of a run folder's `transform/`, one Parquet file each, and the SHA-256 of every file in `digests.json`.

An altered array would change what a model answers, and nothing in the answer would show it. Folders from before the
digests have none, and are read unchecked. Tested in tests/run/folder/test_run_folder.py.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxops.core import small_files
from jaxops.core.failures import UserError

DIGESTS = "digests.json"


def write_transform(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays into a folder, and then their digests.

    Args:
      folder: it is made where it is missing.
      arrays: vectors, or matrices, by name; byte strings are written as text.
    """
    folder.mkdir(exist_ok=True)
    for name, values in arrays.items():
        pq.write_table(pa.table({name: _arrow(values)}), transform_file(folder, name))
    digests = {name: _sha256(transform_file(folder, name)) for name in sorted(arrays)}
    with open(folder / DIGESTS, "w") as out:
        out.write(json.dumps(digests, indent=1) + "\n")
        out.flush()
        os.fsync(out.fileno())  # after a loss of power, arrays that did not reach the disk are told by it


def read_transform(folder: Path, name: str) -> np.ndarray:
    """Returns one array of a folder.

    Raises:
      UserError: the file is missing, broken, or not what the run wrote.
    """
    file = transform_file(folder, name)
    try:
        digests = _digests(folder / DIGESTS)
        if digests is not None and _sha256(file) != digests.get(name):
            raise UserError(
                f"{file} is not what the run wrote: its SHA-256 is another than in {DIGESTS}. The run folder is damaged"
                " or was altered; restore the file from a copy"
            )
        values = pq.read_table(file)[name].combine_chunks()
        if pa.types.is_fixed_size_list(values.type):
            return values.flatten().to_numpy().reshape(len(values), values.type.list_size)
        return values.to_numpy(zero_copy_only=False)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def transform_file(folder: Path, name: str) -> Path:
    """Returns the file of an array."""
    return folder / f"{quote(name, safe='')}.parquet"


def _digests(file: Path) -> Mapping[str, str] | None:
    """Returns the recorded digests; None in a folder from before there were any."""
    try:
        found = json.loads(small_files.read_text(file))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a JSON object of digests; the run folder is damaged")
    return found


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _arrow(values: np.ndarray) -> pa.Array:
    """Converts an array to Arrow: bytes become text, and a matrix becomes lists of one length."""
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return pa.array(values if values.dtype.kind != "S" else np.char.decode(values, "utf-8"))
