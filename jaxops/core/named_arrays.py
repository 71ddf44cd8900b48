"""Sources of weights: named arrays, in host memory, in files or in a checkpoint, that are read by slices.

weights.py decides which array goes to which target. Tested in tests/core/test_weights.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import UserError


class Arrays(Protocol):
    """The protocol of a source of named arrays."""

    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Returns shape and dtype of every array, without reading it."""
        ...

    def load(self, wanted: Mapping[str, "Wanted"]) -> dict[str, Any]:
        """Loads the wanted arrays, each with the dtype and sharding of its target."""
        ...


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A request for one array: shape, dtype and sharding of its target, and whether the source holds it transposed."""

    like: jax.ShapeDtypeStruct
    transpose: bool


class HostArrays:
    """Arrays that the host can slice: numpy arrays, memory-mapped files, or objects with shape, dtype and `[]`."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = arrays

    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in self._arrays.items()}

    def load(self, wanted: Mapping[str, Wanted]) -> dict[str, Any]:
        return {name: self._load(name, one.like, one.transpose) for name, one in wanted.items()}

    def _load(self, name: str, like: jax.ShapeDtypeStruct, transpose: bool) -> Any:
        pieces: dict[tuple[tuple[int, ...], ...], np.ndarray] = {}

        def piece(index: Any) -> np.ndarray:
            ends = tuple(part.indices(size)[:2] for part, size in zip(index, like.shape, strict=True))
            if ends not in pieces:  # a slice that several devices hold is read once
                pieces[ends] = self._piece(name, tuple(slice(*each) for each in ends), like.dtype, transpose)
            return pieces[ends]

        if like.sharding is None:
            return piece((slice(None),) * len(like.shape))
        return jax.make_array_from_callback(like.shape, like.sharding, piece, dtype=like.dtype)

    def _piece(self, name: str, index: tuple[slice, ...], dtype: Any, transpose: bool) -> np.ndarray:
        swap = transpose and len(index) > 1
        part = self._arrays[name][(*index[:-2], index[-1], index[-2]) if swap else index]
        try:
            with np.errstate(over="raise"):  # a copy, since memory mapped from a file must not become an array's memory
                return np.array(part.swapaxes(-1, -2) if swap else part, dtype, order="C")
        except FloatingPointError:
            raise UserError(f"{name} holds numbers that do not fit into {np.dtype(dtype)}") from None


class SavedArrays:
    """The arrays below some entries of the state in a checkpoint; each process reads the parts its devices hold."""

    def __init__(self, checkpoints: Checkpoints, step: int, inside: Sequence[str] = ("params", "frozen")) -> None:
        self._checkpoints, self._step = checkpoints, step
        self._paths: dict[str, str] = {}
        self._shapes: dict[str, jax.ShapeDtypeStruct] = {}
        for leaf in checkpoints.describe(step):
            for part in inside:
                if leaf.path.startswith(f"{part}/"):
                    name = leaf.path.removeprefix(f"{part}/")
                    self._paths[name] = leaf.path
                    self._shapes[name] = jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype))

    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return self._shapes

    def load(self, wanted: Mapping[str, Wanted]) -> dict[str, Any]:
        stored = {
            self._paths[name]: jax.ShapeDtypeStruct(
                self._shapes[name].shape,
                self._shapes[name].dtype,
                sharding=_turned(one.like.sharding, len(one.like.shape)) if one.transpose else one.like.sharding,
            )
            for name, one in wanted.items()
        }
        found = self._checkpoints.load_leaves(self._step, stored)
        return {name: _as_wanted(name, found.pop(self._paths[name]), one) for name, one in wanted.items()}


def _turned(sharding: Sharding | None, rank: int) -> Sharding | None:
    """Returns the sharding of the transposed array."""
    if rank < 2 or not isinstance(sharding, NamedSharding):
        return sharding
    spec = [*sharding.spec, *(None for _ in range(rank - len(sharding.spec)))]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec[:-2], spec[-1], spec[-2]))


def _as_wanted(name: str, array: Any, wanted: Wanted) -> Any:
    """Returns a loaded array cast and transposed for its target, on the target's devices.

    Raises:
      UserError: its numbers do not fit into float16, the only dtype in use with a smaller range.
    """
    swap = wanted.transpose and array.ndim > 1
    if not swap and array.dtype == wanted.like.dtype:
        return array
    turn = lambda x: (x.swapaxes(-1, -2) if swap else x).astype(wanted.like.dtype)
    if isinstance(array, np.ndarray):
        with np.errstate(over="ignore"):
            found = np.ascontiguousarray(turn(array))
    else:
        found = jax.jit(turn, out_shardings=wanted.like.sharding)(array)
    if found.dtype == np.float16 and bool(jnp.isinf(found).sum() > jnp.isinf(array).sum()):
        raise UserError(f"{name} holds numbers that do not fit into {found.dtype}")
    return found
