"""Prefetch by grain with whole batches as its elements: a record is never touched by Python on its own.

The position is the cursor and nothing else, so there is no iterator state to save: open another loader at the
cursor.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from jaxops.core.failures import UserError
from jaxops.data.protocol import Source

Rows = Sequence[tuple[int, int]] | None
"""Ranges of a batch; None for all of it."""


def build_batches(source: Source, cursor: int, size: int, rows: Rows = None) -> dict[str, np.ndarray]:
    """Returns rows of a global batch. A source is a pure function of the cursor, so a host builds only its own rows.

    Args:
      source: the source.
      cursor: the number of examples before the batch.
      size: examples in the global batch.
      rows: ranges (start, stop) of the batch, in order; default all.
    """
    if rows is None:
        return source.batch(cursor, size)
    parts = [source.batch(cursor + start, stop - start) for start, stop in rows]
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Loader(Iterator[dict[str, np.ndarray]]):
    """Batches at `cursor`, `cursor + size`, ... without end, built ahead by grain's threads; others by `take`.

    Close it, or use it in a `with` block, to let go of the threads before the process ends.

    Args:
      rows: the ranges of each batch that this process wants, or a function that gives them for a size.
      prefetch: how many batches are kept ready.
      threads: 0 builds in the caller.
      finish: applied to each batch where it is built: the plan of tables, say.
    """

    def __init__(
        self,
        source: Source,
        cursor: int,
        size: int,
        *,
        rows: Rows | Callable[[int], Rows] = None,
        prefetch: int = 2,
        threads: int = 1,
        finish: Callable[[dict[str, np.ndarray]], dict[str, Any]] | None = None,
    ) -> None:
        self._source, self._size, self._finish = source, size, finish
        self._rows: Callable[[int], Rows] = rows if callable(rows) else lambda size: rows
        self._threads, self._prefetch = threads, prefetch
        self._open(cursor)

    def _open(self, cursor: int) -> None:
        """Begins to prefetch at a cursor."""
        import grain  # seconds to import, and not needed for looking at data

        source, size, rows = self._source, self._size, self._rows(self._size)
        last = sys.maxsize // size * size
        dataset = grain.MapDataset.range(cursor, last, size).map(lambda at: build_batches(source, int(at), size, rows))
        if self._finish is not None:
            dataset = dataset.map(self._finish)
        options = grain.ReadOptions(
            num_threads=self._threads, prefetch_buffer_size=self._prefetch if self._threads else 0
        )
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._next = cursor

    def __next__(self) -> dict[str, np.ndarray]:
        batch: dict[str, np.ndarray] = next(self._iterator)
        self._next += self._size
        return batch

    def take(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Returns the batch of `size` at a cursor, at once if it is the next one that is prefetched.

        A batch of another size is built by the caller. One elsewhere is where prefetching then goes on from.

        Raises:
          UserError: another size, of batches that are planned (`finish`): a plan has one shape.
        """
        if size == self._size:
            if cursor != self._next:
                self.close()
                self._open(cursor)
            return next(self)
        if self._finish is not None:
            raise UserError(
                f"drew {size} examples, but the batches of this model's tables are planned for {self._size}"
            )
        return build_batches(self._source, cursor, size, self._rows(size))

    def close(self) -> None:
        """Stops building batches; those under way are finished and dropped."""
        self._iterator.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
