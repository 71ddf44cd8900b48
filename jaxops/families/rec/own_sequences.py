"""A user's own source of sequences, by import path or from Python; it is checked before anything is compiled."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxops.core.failures import UserError, nearest
from jaxops.data.protocol import Source
from jaxops.families.rec.config import RecConfig
from jaxops.run.callables import require_callable
from jaxops.run.task import EvalBatches

ITEMS = ("items", "targets", "target", "seen")
"""The entries of a batch that hold item rows."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """The data of a sequence model, from files or from a user's source, and the model that was built for them.

    Attributes:
      model: the sequence model.
      source: the training examples.
      batches: for each part, a function from a batch size to the evaluation batches.
      inspection: a description of the data.
      item_ids: the original ids of items, in the order of their rows.
    """

    model: Any
    source: Source
    batches: Mapping[str, Callable[[int], EvalBatches]]
    inspection: dict[str, Any]
    item_ids: np.ndarray


def open_own(source: Any, config: RecConfig, build_model: Callable[[int], Any]) -> Opened:
    """Opens a user's source, which has `n_items`, `examples`, `batch(cursor, size)`, and perhaps `valid` and `test`.

    `valid` and `test` are functions from a batch size to evaluation batches (see data/interactions/queries.py).
    `build_model` is called with the number of items.

    Raises:
      UserError: a part is missing, or the first batches are not what they should be.
    """
    name = f"data {config.data.kind}"
    missing = [part for part in ("n_items", "examples", "batch") if not hasattr(source, part)]
    if missing:
        raise UserError(
            f"{name}: what the factory returned ({type(source).__name__}) has no {', '.join(missing)};"
            f" a source has n_items, examples and batch(cursor, size)"
        )
    for part in ("n_items", "examples"):
        value = getattr(source, part)
        if not isinstance(value, int | np.integer) or value < 1:
            raise UserError(f"{name}: {part}: expected a positive integer, got {value!r}")
    require_callable(f"{name}: batch", source.batch, "cursor", "size")
    model = build_model(int(source.n_items))
    _check_batch(name, source, config, model.length)
    return Opened(
        model=model,
        source=source,
        batches={part: getattr(source, part) for part in ("valid", "test") if hasattr(source, part)},
        inspection={"source": config.data.kind, "examples": int(source.examples), "items": int(source.n_items)},
        item_ids=np.arange(1, int(source.n_items) + 1),
    )


def _check_batch(name: str, source: Any, config: RecConfig, length: int) -> None:
    """Checks the first batches of a user's source before anything is compiled."""
    size = config.batch.global_
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
    """Checks the names, shapes (None: any size) and dtypes of a batch's arrays, and the range of items."""
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
