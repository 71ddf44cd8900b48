"""A user's own source by import path, looked at before anything is compiled."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxops.config.types import ByPath
from jaxops.core.failures import UserError, nearest
from jaxops.data.protocol import Source
from jaxops.families.rec.config import RecConfig
from jaxops.models.sasrec import SASRecConfig
from jaxops.run.callables import require_callable
from jaxops.run.task import EvalBatches

ITEMS = ("items", "targets", "target", "seen")
"""Entries of a batch that hold items."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a family's data comes down to, wherever it is from; see `Task` for what each is."""

    n_items: int
    source: Source
    evaluations: Mapping[str, Callable[[int], EvalBatches]]
    inspection: dict[str, Any]
    item_ids: np.ndarray
    baselines: Callable[[], dict[str, dict[str, float]]] | None = None


def open_own(config: RecConfig) -> Opened:
    """A user's source by import path: `n_items`, `examples`, `batch(cursor, size)`; `valid` and `test` optional.

    `valid` and `test` are functions of a batch size that return evaluation batches (see
    data/interactions/queries.py).

    Raises:
      UserError: something is missing, or the first batches are not what they should be.
    """
    assert isinstance(config.data, ByPath)
    source = config.data.call()
    missing = [name for name in ("n_items", "examples", "batch") if not hasattr(source, name)]
    if missing:
        raise UserError(
            f"data {config.data.fn}: what the factory returned ({type(source).__name__}) has no {', '.join(missing)};"
            f" a source has n_items, examples and batch(cursor, size)"
        )
    for name in ("n_items", "examples"):
        value = getattr(source, name)
        if not isinstance(value, int | np.integer) or value < 1:
            raise UserError(f"data {config.data.fn}: {name}: expected a positive integer, got {value!r}")
    require_callable(f"data {config.data.fn}: batch", source.batch, "cursor", "size")
    _check_batch(source, config)
    evaluations: dict[str, Callable[[int], EvalBatches]] = {
        name: getattr(source, name) for name in ("valid", "test") if hasattr(source, name)
    }
    return Opened(
        n_items=int(source.n_items),
        source=source,
        evaluations=evaluations,
        inspection={"source": config.data.fn, "examples": int(source.examples), "items": int(source.n_items)},
        item_ids=np.arange(1, int(source.n_items) + 1),
    )


def _check_batch(source: Any, config: RecConfig) -> None:
    """Looks at the first batches of a user's source before anything is compiled."""
    assert isinstance(config.data, ByPath) and isinstance(config.model, SASRecConfig)
    size, length, name = config.batch.global_, config.model.length, f"data {config.data.fn}"
    shapes: dict[str, tuple[int | None, ...]]
    shapes = {"id": (size,), "items": (size, length), "targets": (size, length), "weight": (size, length)}
    _check_arrays(f"{name}: batch(0, {size})", source.batch(0, size), shapes, source.n_items)
    size = config.evaluate.batch
    shapes = {"id": (size,), "items": (size, length), "target": (size,), "seen": (size, None), "weight": (size,)}
    for part in (part for part in ("valid", "test") if hasattr(source, part)):
        require_callable(f"{name}: {part}", getattr(source, part), "size")
        first = next(iter(getattr(source, part)(size)), None)
        if first is None:
            raise UserError(f"{name}: {part}({size}) gave no batch; leave {part} out where there is none")
        what = f"{name}: {part}({size}): its first batch"
        _check_arrays(what, first, shapes, source.n_items)
        empty = (np.asarray(first["items"])[:, -1] == 0) & (np.asarray(first["weight"]) > 0)
        if empty.any():
            raise UserError(
                f"{what}: row {int(np.flatnonzero(empty)[0])} of items ends in padding: the newest item belongs in the"
                f" last column (pad on the left)"
            )


def _check_arrays(what: str, batch: Any, shapes: Mapping[str, tuple[int | None, ...]], n_items: int) -> None:
    """Names, shapes (None: any size), kinds and the range of items."""
    if not isinstance(batch, Mapping):
        raise UserError(f"{what}: expected a dict of arrays ({', '.join(shapes)}), got {type(batch).__name__}")
    wrong = []
    for name, shape in shapes.items():
        if name not in batch:
            wrong.append(f"no {name!r}{nearest(name, batch)}")
            continue
        array = np.asarray(batch[name])
        fits = array.ndim == len(shape) and all(b in (None, a) for a, b in zip(array.shape, shape, strict=True))
        integers = name != "weight"
        if not fits or array.dtype.kind not in ("iu" if integers else "f"):
            wanted = f"{'int32' if integers else 'float32'} {str(shape).replace('None', '*')}"
            wrong.append(f"{name}: expected {wanted}, got {array.dtype} {array.shape}")
        elif name in ITEMS and array.size and not 0 <= array.min() <= array.max() <= n_items:
            wrong.append(f"{name}: expected 0 (padding) to n_items = {n_items}, got {array.min()} to {array.max()}")
    if wrong:
        raise UserError(f"{what}: {'; '.join(wrong)}")
