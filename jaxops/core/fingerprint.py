"""The digest of a group of arrays, the same on every mesh, on any number of processes, on any kind of device.

Every element's bits are mixed with its position in the whole array, and the results are added up as 32-bit integers
that wrap around. So the sum depends neither on the sharding nor on the order of addition. Each device sums its own
part of an array, without communication; the host adds the parts and takes a SHA-256 over the paths, shapes, dtypes and
sums. Each array has two sums with keys of their own, 64 bits in all. The digest detects change, not an adversary.
Tested in tests/core/test_fingerprint.py.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from jaxops.core import plain
from jaxops.core.failures import RunFailed

_WORD = 1 << 32
"""Positions are counted modulo this. In a larger array a second count over its first dimensions separates them."""


def fingerprint(leaves: Mapping[plain.Path, Any]) -> str:
    """Returns a SHA-256, as 64 hexadecimal digits, of the paths, shapes, dtypes and bits of these arrays.

    It compares bits, not values: 0.0 and -0.0 differ, and so do NaNs with different payloads. With several processes
    all of them must make this call with the same arrays.

    Raises:
      RunFailed: processes hold different values of an array that each of them holds whole.
    """
    # Each array has its own mesh or none, so the mesh of `jax.set_mesh` is set aside.
    with jax.set_mesh(Mesh(np.empty((), dtype=object), ())):
        begun = {path: _begin(leaf) for path, leaf in leaves.items()}  # all are dispatched before the first wait
    sums = np.zeros((len(begun), 2), np.uint32)
    for row, parts in zip(sums, begun.values(), strict=True):
        for part in parts:
            row += np.asarray(part).reshape(-1, 2).sum(0, dtype=np.uint32)
    if jax.process_count() > 1:
        sums = _over_processes(sums, leaves)
    said = [
        [plain.name(path), list(np.shape(leaf)), str(plain.dtype(leaf)), [int(x) for x in row]]
        for (path, leaf), row in zip(leaves.items(), sums, strict=True)
    ]
    return hashlib.sha256(json.dumps(sorted(said)).encode()).hexdigest()


def _begin(leaf: Any) -> list[Any]:
    """Starts to sum the parts of an array that this process counts; a part with replicas is counted once."""
    if not isinstance(leaf, jax.Array):
        words = _words_of_numpy(np.asarray(leaf))
        return [_sums(words, np.zeros(words.ndim, np.uint32), words.shape)]
    kind = next(iter(leaf.addressable_shards)).data.device.default_memory().kind
    if leaf.sharding.memory_kind not in (None, kind):  # the array is in host memory, where nothing can be computed
        leaf = jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))
    if leaf.is_fully_replicated:
        return [_sums_of(leaf.addressable_data(0), np.zeros(leaf.ndim, np.uint32), leaf.shape)]
    if isinstance(leaf.sharding, NamedSharding):
        summed = _by_part(leaf.sharding)(leaf)
        return [part.data for part in summed.addressable_shards if part.replica_id == 0]
    return [
        _sums_of(part.data, np.array([cut.indices(size)[0] for cut, size in _cuts(part, leaf)], np.uint32), leaf.shape)
        for part in leaf.addressable_shards
        if part.replica_id == 0
    ]


def _cuts(part: Any, leaf: jax.Array) -> Iterator[tuple[slice, int]]:
    return zip(part.index, leaf.shape, strict=True)


@functools.lru_cache(256)
def _by_part(sharding: NamedSharding) -> Any:
    """Returns a jitted function from an array to the sums of each of its parts, computed without communication."""
    mesh = sharding.mesh
    axes = [_names(entry) for entry in sharding.spec]
    used = tuple(axis for entry in axes for axis in entry)

    def local(block: Array, shape: tuple[int, ...]) -> UInt32[Array, "1 2"]:
        offsets = [
            lax.axis_index(entry).astype(jnp.uint32) * np.uint32(size) if entry else jnp.uint32(0)
            for entry, size in zip(axes + [()] * (block.ndim - len(axes)), block.shape, strict=True)
        ]
        return _sums_of(block, jnp.stack(offsets), shape)[None]

    def run(whole: Array) -> UInt32[Array, "parts 2"]:
        part = functools.partial(local, shape=whole.shape)
        out = PartitionSpec(used)
        return jax.shard_map(part, mesh=mesh, in_specs=sharding.spec, out_specs=out, check_vma=False)(whole)

    run.__name__ = "fingerprint"
    return jax.jit(run)


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else tuple(entry) if isinstance(entry, tuple) else (entry,)


@functools.partial(jax.jit, static_argnums=2)
def _sums_of(block: Array, offsets: UInt32[Array, " ndim"], shape: tuple[int, ...]) -> UInt32[Array, "2"]:
    words, more = _words(block)
    return _sums(words, jnp.concatenate([offsets, jnp.zeros(len(more), jnp.uint32)]), (*shape, *more))


@functools.partial(jax.jit, static_argnums=2)
def _sums(words: Array, offsets: UInt32[Array, " ndim"], shape: tuple[int, ...]) -> UInt32[Array, "2"]:
    """Returns both sums over a block that begins at `offsets` of an array of this `shape`."""
    bits = words.astype(jnp.uint32)
    key = _mixed(_position(bits.shape, offsets, shape) + np.uint32(0x9E3779B9))
    if np.prod(shape, dtype=object) > _WORD:
        far = next(i for i in range(len(shape)) if np.prod(shape[i:], dtype=object) <= _WORD)
        outer = _position(bits.shape, offsets, shape, dimensions=far)
        key = _mixed(key ^ (outer * np.uint32(0xC2B2AE35)))
    # At each position both are one-to-one in the bits, so that a single change is always seen; each has its own key.
    first = _mixed(bits ^ key)
    second = _mixed(first + key * np.uint32(0x85EBCA6B))
    add = lambda one, other: (one[0] + other[0], one[1] + other[1])
    zero = np.uint32(0)
    # One reduction computes both: two of them would mix everything twice, and on CPU neither would be vectorised.
    return jnp.stack(lax.reduce((first, second), (zero, zero), add, tuple(range(bits.ndim))))


def _position(
    block: tuple[int, ...], offsets: Array, shape: tuple[int, ...], dimensions: int | None = None
) -> UInt32[Array, "..."]:
    """Returns the position, modulo 2^32, of each entry of a block in an array of this shape in row-major order.

    Args:
      block: shape of the block.
      offsets: index of its first entry, by dimension.
      shape: shape of the whole array.
      dimensions: count over so many of the first dimensions only; None counts over all.
    """
    position, stride = jnp.zeros(block, jnp.uint32), 1
    for i in reversed(range(len(block) if dimensions is None else dimensions)):
        along = lax.broadcasted_iota(jnp.uint32, block, i) + jnp.broadcast_to(offsets[i], block)
        position, stride = position + along * np.uint32(stride % _WORD), stride * shape[i]
    return position


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Scrambles 32 bits one-to-one, so that each output bit depends on all input bits (Wellons' lowbias32, 2018)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _words(block: Array) -> tuple[Array, Sequence[int]]:
    """Returns the bits of a block as unsigned integers of 8 to 32 bits, and the dimensions added at the end."""
    if jnp.issubdtype(block.dtype, jnp.complexfloating):
        block = jnp.stack([block.real, block.imag], axis=-1)
        words, more = _words(block)
        return words, (2, *more)
    if block.dtype == jnp.bool_:
        return block.astype(jnp.uint8), ()
    if block.dtype.itemsize == 8:
        return lax.bitcast_convert_type(block, jnp.uint32), (2,)
    words = lax.bitcast_convert_type(block, f"uint{_width(block.dtype)}")
    return (words if _width(block.dtype) >= 8 else words.astype(jnp.uint8)), ()


def _words_of_numpy(array: np.ndarray) -> np.ndarray:
    """Returns the words of a numpy array; as a jax array its 64-bit numbers would be rounded."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.kind == "c":
        return _words_of_numpy(np.stack([array.real, array.imag], axis=-1))
    if array.dtype.itemsize == 8:
        return array.view(np.uint32).reshape(*array.shape, 2) if array.shape else array.reshape(1).view(np.uint32)
    words = array.reshape(array.shape or (1,)).view(f"uint{8 * array.dtype.itemsize}").reshape(array.shape)
    return words & np.uint8(2 ** _width(array.dtype) - 1) if _width(array.dtype) < 8 else words


def _width(dtype: Any) -> int:
    """Returns the number of bits of a dtype; numbers of fewer than 8 bits are stored in 8."""
    if dtype == np.bool_:
        return 8
    return int((jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits)


def _over_processes(sums: np.ndarray, leaves: Mapping[plain.Path, Any]) -> np.ndarray:
    """Adds the sums over all processes; for arrays that each process holds whole it takes one, and they must agree."""
    gathered = np.asarray(multihost_utils.process_allgather(sums))
    total = gathered.sum(0, dtype=np.uint32)
    for row, (path, leaf) in enumerate(leaves.items()):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
            continue
        if (gathered[:, row] != gathered[0, row]).any():
            raise RunFailed(f"{plain.name(path)} should be the same on every process, and is not")
        total[row] = gathered[0, row]
    return total
