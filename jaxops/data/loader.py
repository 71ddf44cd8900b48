"""Prefetch by grain with whole batches as its elements: a record is never touched by Python on its own.

The position is the cursor and nothing else, so there is no iterator state to save: open another loader at the
cursor.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from jaxops.data.protocol import Source


def build(
    source: Source, cursor: int, size: int, rows: Sequence[tuple[int, int]] | None = None
) -> dict[str, np.ndarray]:
    """Rows of the global batch of `size` examples at `cursor`: the ranges `rows` in order (default: all).

    Since a source is a pure function of the cursor, a host builds only what its own devices hold.
    """
    if rows is None:
        return source.batch(cursor, size)
    parts = [source.batch(cursor + start, stop - start) for start, stop in rows]
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Loader(Iterator[dict[str, np.ndarray]]):
    """Batches at `cursor`, `cursor + size`, ... without end, built ahead by grain's threads.

    `rows` are the ranges of each batch that this process wants; `prefetch` batches are kept ready; `threads`
    = 0 builds in the caller. Close it, or use it in a `with` block, to let go of the threads before the
    process ends. `finish` is applied to each batch where it is built: the plan of tables, say.
    """

    def __init__(
        self,
        source: Source,
        cursor: int,
        size: int,
        *,
        rows: Sequence[tuple[int, int]] | None = None,
        prefetch: int = 2,
        threads: int = 1,
        finish: Callable[[dict[str, np.ndarray]], dict[str, Any]] | None = None,
    ) -> None:
        import grain  # seconds to import, and not needed for looking at data

        last = sys.maxsize // size * size
        dataset = grain.MapDataset.range(cursor, last, size).map(lambda at: build(source, int(at), size, rows))
        if finish is not None:
            dataset = dataset.map(finish)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def close(self) -> None:
        """Stop building; what is under way is finished and dropped."""
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
