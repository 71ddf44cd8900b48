"""Reading arrays of a checkpoint onto any sharding with tensorstore: each process reads the parts its devices hold.

Orbax can do this too, in about twice the time where memory is the bottleneck (a CPU): it reads into unaligned memory in
small pages, which jax then copies. Here a piece is read once, into memory that jax takes over as it is. The layout is
orbax's own: Zarr 3 arrays in OCDBT, named by their path with dots. Tested in tests/core/test_read_arrays.py.
"""

import collections
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Sharding, SingleDeviceSharding

from jaxops.core import stores

_ALIGNMENT = 64
"""Alignment in bytes: jax copies an array that does not begin at a multiple of this into its own memory."""
_IN_FLIGHT = 2 << 30
"""Bytes that are read ahead before the first are handed to their device; the host must have that much free memory."""
_READERS = 4
"""Number of files that are read at a time; more would use more memory and gain nothing."""


def read_arrays(folder: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Reads the arrays of these names onto these shardings; a leaf without a sharding becomes a numpy array.

    `folder` is the folder in which orbax wrote the tree; names are paths joined by dots.

    Raises:
      ValueError: a name is missing or cannot be read, or has another shape or dtype.
    """
    import tensorstore as ts

    context = ts.Context({"file_io_concurrency": {"limit": _READERS}})
    opened = {name: ts.open(_spec(folder, name), context=context, open=True, read=True) for name in wanted}
    pieces: dict[str, list[Any]] = {name: [] for name in wanted}
    in_flight: collections.deque[tuple[str, np.ndarray, list[jax.Device], Any]] = collections.deque()
    held = 0

    def land() -> None:
        nonlocal held
        name, memory, devices, read = in_flight.popleft()
        read.result()
        held -= memory.nbytes
        pieces[name] += _placed(memory, devices, wanted[name].sharding)

    for name, like in wanted.items():
        store = opened[name].result()
        if store.shape != like.shape or store.dtype.numpy_dtype != like.dtype:
            raise ValueError(
                f"{name} is {store.dtype.name}{list(store.shape)}, not {np.dtype(like.dtype).name}{list(like.shape)}"
            )
        unpacked = store.chunk_layout.write_chunk.shape or ()  # no smaller than those that are read
        if any((piece or 0) > max(size, 1) for piece, size in zip(unpacked, like.shape, strict=False)):
            raise ValueError(f"{name} is stored in pieces larger than itself")  # each is unpacked whole
        for index, devices in _needed(like):
            source = store[index][ts.d[:].translate_to[0]] if like.shape else store
            memory = _aligned(source.shape, like.dtype)
            held += memory.nbytes
            in_flight.append((name, memory, devices, ts.array(memory).write(source)))
            while held > _IN_FLIGHT and len(in_flight) > 1:
                land()
    while in_flight:
        land()
    join = jax.make_array_from_single_device_arrays
    return {
        name: pieces[name][0] if like.sharding is None else join(like.shape, like.sharding, pieces[name])
        for name, like in wanted.items()
    }


def _needed(like: jax.ShapeDtypeStruct) -> Iterable[tuple[tuple[slice, ...], list[jax.Device]]]:
    """Returns the parts of an array that this process reads, each with its devices; for numpy the whole, with none."""
    if like.sharding is None:
        return [((slice(None),) * len(like.shape), [])]
    holders: dict[tuple[tuple[int, ...], ...], list[jax.Device]] = collections.defaultdict(list)
    for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
        ends = tuple(part.indices(size)[:2] for part, size in zip(index or (), like.shape, strict=True))
        holders[ends].append(device)
    return [(tuple(slice(*part) for part in ends), devices) for ends, devices in holders.items()]


def _placed(memory: np.ndarray, devices: list[jax.Device], sharding: Sharding | None) -> list[Any]:
    """Puts `memory` on each device, or returns it as it is without a sharding.

    A CPU device takes the memory over, and copies it before it first overwrites it.
    """
    if sharding is None:
        return [memory]
    at = [SingleDeviceSharding(device, memory_kind=sharding.memory_kind) for device in devices]
    return [jax.device_put(memory, one, may_alias=True) for one in at]


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Allocates aligned memory for an array, without writing to it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _spec(folder: epath.Path, name: str) -> dict[str, Any]:
    place = os.fspath(folder)
    base = stores.kvstore_spec(stores.parse_url(place)) if stores.is_url(place) else {"driver": "file", "path": place}
    base = {**base, "path": f"{base['path'].rstrip('/')}/"}
    return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
