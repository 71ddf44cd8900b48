"""A profiler trace of some steps of a run, written once; TensorBoard opens it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxops.core.loop import Hook, Snapshot


@contextlib.contextmanager
def profiled(folder: Path, start: int, steps: int) -> Iterator[list[Hook]]:
    """Yields hooks that trace `steps` steps after step `start`; a run that ends among them still writes its trace."""
    begin, last = max(start, 1), max(start, 1) + steps
    running = False

    def toggle(snapshot: Snapshot) -> None:
        nonlocal running
        if snapshot.step == begin:
            jax.profiler.start_trace(str(folder))
            running = True
        elif snapshot.step == last and running:
            snapshot.flush()
            jax.profiler.stop_trace()
            running = False

    try:
        yield [Hook(begin, toggle), Hook(last, toggle)]
    finally:
        if running:
            jax.profiler.stop_trace()
