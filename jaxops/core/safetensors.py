"""Safetensors files without the safetensors package: named arrays whose bytes are read only when they are sliced.

The format is a length (8 bytes, little-endian), that many bytes of JSON with dtype, shape and offsets of each tensor,
and the tensors' bytes. Files may come from others: every number in a header is checked against the file before it is
used. Tested in tests/core/test_safetensors.py.
"""

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxops.core.failures import UserError, nearest
from jaxops.core.whole_files import writing

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000
"""The largest header in bytes, the bound of the format's own reader; it holds for an index too."""
_MAX_RANK = 32
DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": jnp.bfloat16,
        "F8_E4M3": jnp.float8_e4m3fn,
        "F8_E5M2": jnp.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Opens a safetensors file, or a folder with one file or with shards and their index; only headers are read.

    Each array is a view of the file on disk (numpy.memmap): a slice of it reads the bytes of that slice.

    Raises:
      UserError: no file exists, a shard is missing or truncated, or a header is invalid; the message names the file.
    """
    path = Path(path)
    if not path.is_dir():
        return _open(path)
    if not (path / INDEX).is_file():
        return _open(path / _only_file(path))
    shards = _read_index(path / INDEX)
    missing = [name for name in shards if not (path / name).is_file()]
    if missing:
        raise UserError(
            f"{path / INDEX} names {missing[0]}, which is not there"
            + (f" (nor are {len(missing) - 1} others of {len(shards)})" if len(missing) > 1 else "")
            + ": was the download complete?"
        )
    found: dict[str, np.ndarray] = {}
    for shard, names in shards.items():
        arrays = _open(path / shard)
        for name in names:
            if name not in arrays:
                raise UserError(f"{path / shard} holds no {name}, which {INDEX} places there{nearest(name, arrays)}")
            found[name] = arrays[name]
    return found


def save_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes named arrays (numpy, or jax arrays that this process holds whole) to one file, atomically.

    Raises:
      UserError: the format does not have the dtype of an array, or an array is named `__metadata__`.
      RunFailed: the file cannot be written.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, array in arrays.items():
        if np.dtype(array.dtype) not in _NAMES:
            raise UserError(f"{path}: {name} is {array.dtype}, which safetensors cannot hold (it has {_known()})")
        if name == "__metadata__":
            raise UserError(f"{path}: no array can be named __metadata__, which the format keeps for itself")
        start, end = end, end + math.prod(array.shape) * array.dtype.itemsize
        dtype = _NAMES[np.dtype(array.dtype)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays begin aligned
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for array in arrays.values():  # so that the host holds one array at a time
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _open(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, begin = _read_header(file, path, size)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    spans = {name: _checked(path, name, entry) for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, (_, _, start, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise UserError(f"{path}: the bytes of {name} begin at {start}, expected {end}: the header is damaged")
        end = stop
    if begin + end != size:
        what = "truncated" if begin + end > size else "followed by bytes that its header does not know"
        raise UserError(f"{path} is {what}: {size} bytes, its header says {begin + end}")
    whole = np.memmap(path, np.uint8, "r")
    return {
        name: whole[begin + start : begin + stop].view(dtype).reshape(shape)
        for name, (dtype, shape, start, stop) in spans.items()
    }


def _read_header(file: Any, path: Path, size: int) -> tuple[dict[str, Any], int]:
    """Returns the JSON header, and the offset in bytes at which the arrays begin."""
    first = file.read(8)
    if len(first) < 8:
        raise UserError(f"{path} is no safetensors file: {size} bytes")
    length = struct.unpack("<Q", first)[0]
    if length > MAX_HEADER:
        raise UserError(f"{path} is no safetensors file: a header of {length} bytes, at most {MAX_HEADER} are allowed")
    if 8 + length > size:
        raise UserError(f"{path} is truncated, or no safetensors file: a header of {length} bytes in {size} bytes")
    return _object(file.read(length), path), 8 + length


def _object(text: bytes, path: Path) -> dict[str, Any]:
    """Parses a JSON object; raises UserError if it is none or has a key twice."""

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is there twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is no JSON ({str(error)[:200]})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: its header is no JSON object")
    return found


def _checked(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Returns (dtype, shape, first byte, last byte + 1) of a tensor from its entry in the header.

    Raises:
      UserError: a part of the entry is missing, or the parts do not agree with each other.
    """
    whole = lambda values: (
        isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )
    if not isinstance(entry, dict) or not whole(entry.get("shape")) or not whole(entry.get("data_offsets")):
        raise UserError(f"{path}: its header has no dtype, shape and data_offsets for {name}")
    shape, offsets = tuple(entry["shape"]), entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
    if dtype is None:
        raise UserError(f"{path}: {name} has dtype {str(entry.get('dtype'))[:40]!r} (known: {_known()})")
    if len(shape) > _MAX_RANK or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{path}: {name} is {entry['dtype']}{list(shape)[:8]}, but its bytes are {offsets[:4]}")
    return dtype, shape, offsets[0], offsets[1]


def _read_index(path: Path) -> dict[str, list[str]]:
    """Reads an index, and returns shard -> names of the arrays in it."""
    if path.stat().st_size > MAX_HEADER:
        raise UserError(f"{path}: {path.stat().st_size} bytes, at most {MAX_HEADER} are allowed")
    places = _object(path.read_bytes(), path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{path}: it has no weight_map from names to files")
    shards: dict[str, list[str]] = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise UserError(f"{path}: {name} is in {shard!r}, expected the name of a file beside it")
        shards.setdefault(shard, []).append(name)
    return shards


def _only_file(folder: Path) -> str:
    """Returns the name of the only file of a folder without an index."""
    if (folder / SINGLE).is_file():
        return SINGLE
    found = sorted(each.name for each in folder.glob("*.safetensors"))
    if len(found) != 1:
        there = f"{', '.join(found[:5])}, and no {INDEX} that joins them" if found else "no safetensors file"
        raise UserError(f"{folder} holds {there}")
    return found[0]


def _known() -> str:
    return ", ".join(DTYPES)
