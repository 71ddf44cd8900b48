"""Examples in columns, as batches: training in an order of each epoch's own, evaluation in order and padded."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from jaxops.data.bags import WEIGHT
from jaxops.data.epochs import Epochs
from jaxops.data.slices import SLICE

PART_ROW = "part/row"
"""The entry of evaluation batches that says which example of its part each one is; no column is called so."""


@dataclasses.dataclass(frozen=True, eq=False)
class Column:
    """A feature as table rows: [n] or, of a bag, [n, width] (-1: nothing); `index`: which of them an example has.

    `weights` are float32 [n, width], where a bag has them.
    """

    codes: Int32[np.ndarray, "n ..."]
    index: np.ndarray | None = None
    weights: Float32[np.ndarray, "n width"] | None = None

    def of(self, examples: np.ndarray) -> np.ndarray:
        """Returns the codes of these examples: row 0 (unknown) or an empty bag where the index is -1."""
        if self.index is None:
            return self.codes[examples]
        at = self.index[examples]
        found = self.codes[at]
        found[at < 0] = 0 if found.ndim == 1 else -1
        return found

    def weights_of(self, examples: np.ndarray) -> np.ndarray:
        """Returns the weights of these examples. Where the index is -1 they are arbitrary, as the bag is empty."""
        assert self.weights is not None
        return self.weights[examples if self.index is None else self.index[examples]]


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """All examples; `masks` go with evaluation as batch["slice/NAME"], `user` groups them."""

    features: Mapping[str, Column]
    numeric: Float32[np.ndarray, "examples numbers"]
    labels: Float32[np.ndarray, "examples tasks"]
    weight: Float32[np.ndarray, " examples"]
    masks: Mapping[str, Bool[np.ndarray, " examples"]]
    user: np.ndarray | None = None

    def batch(self, rows: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Returns a batch of the examples `rows`, as models of features read it, with these `ids`."""
        out = {"id": ids.astype(np.int32), "weight": self.weight[rows]}
        out |= {name: column.of(rows) for name, column in self.features.items()}
        for name, column in self.features.items():
            if column.weights is not None:
                out[f"{name}{WEIGHT}"] = column.weights_of(rows)
        if self.numeric.shape[1]:
            out["numeric"] = self.numeric[rows]
        out["label"] = self.labels[rows, 0] if self.labels.shape[1] == 1 else self.labels[rows]
        return out


class ExampleSource:
    """A `Source` of the examples `rows`; see `Examples.batch` for what is in a batch.

    Raises:
      UserError: more than 32-bit ids can tell apart.
    """

    def __init__(self, examples: Examples, rows: Int64[np.ndarray, " n"], seed: int) -> None:
        self._all, self._rows = examples, rows
        self.examples = len(rows)
        self._epochs = Epochs(self.examples, seed)

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Examples `[cursor, cursor + size)` of the endless stream of epochs."""
        ids = self._epochs.ids(cursor, size)
        return self._all.batch(self._rows[ids], ids)


class ExampleBatches:
    """Evaluation batches of the examples `rows`, in order; the last one padded with rows of weight 0."""

    def __init__(self, examples: Examples, rows: Int64[np.ndarray, " n"], size: int) -> None:
        self._all, self._rows, self.size = examples, rows, size

    def __len__(self) -> int:
        return -(-len(self._rows) // self.size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.rows(k, 0, self.size) for k in range(len(self)))

    def rows(self, k: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows `[start, stop)` of batch k alone; "id" is the row among all examples.

        PART_ROW is the row among those of the part, -1 for padding.
        """
        at = np.arange(k * self.size + start, k * self.size + stop)
        real = at < len(self._rows)
        at = np.where(real, at, 0)
        rows = self._rows[at]
        out: dict[str, Any] = self._all.batch(rows, rows)
        out["weight"] = out["weight"] * real.astype(np.float32)
        out[PART_ROW] = np.where(real, at, -1).astype(np.int32)
        return out | {f"{SLICE}{name}": mask[rows] & real for name, mask in self._all.masks.items()}
