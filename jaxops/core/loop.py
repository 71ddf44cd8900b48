"""The one loop: steps over batches, windows of metrics fetched one late, hooks that cost nothing when not due.

Between two boundaries (a window's end or a hook's turn) the loop does nothing but take a batch and call the step; it
never waits for the device, because the window it reads at a boundary is the one before.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxops.core.failures import RunFailed
from jaxops.core.mesh import serialise_dispatch
from jaxops.core.recovery import GoBack
from jaxops.core.state import State
from jaxops.core.step import Step
from jaxops.core.sums import LOSS, Sum, Sums, finalize

Batch = Mapping[str, Any]
NonFinite = Literal["raise", "skip", "rollback"]


@dataclasses.dataclass
class Snapshot:
    """What a hook sees: the step just finished, the next example's cursor, the state, and metrics if it looks.

    `state` is donated to the next step: use it inside the hook, do not keep it. Set `stop` to a reason to end the run.
    `flush()` waits for the device, delivers every window up to this step and returns the newest values. A hook that
    takes long or saves calls it first: the steps before it are then on record, and its own time is nobody's.
    """

    step: int
    cursor: int
    state: State
    flush: Callable[[], dict[str, Any]] = dict
    stop: str | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """The values of the window that ends at this step; looking at them flushes."""
        return self.flush()


@dataclasses.dataclass(frozen=True)
class Hook:
    """A function called after every `every`-th step."""

    every: int
    fn: Callable[[Snapshot], None]


def every(steps: int, fn: Callable[[Snapshot], None]) -> Hook:
    """`fn(snapshot)` after every `steps` steps.

    Raises:
      ValueError: `steps` is below one.
    """
    if steps < 1:
        raise ValueError(f"every: expected at least one step, got {steps}")
    return Hook(steps, fn)


@dataclasses.dataclass(frozen=True)
class Window:
    """A closed window of steps (first, last], its sums (on the device until fetched) and the seconds it took.

    `timed` steps took them: the first step of a process compiles and is left out.
    """

    first: int
    last: int
    sums: Sums
    seconds: float
    timed: int

    def values(self, batch_size: int, loss_weights: Mapping[str, float]) -> dict[str, Any]:
        """Host values: the objective's metrics, `loss`, examples and counted targets a second."""
        sums = jax.tree.map(np.asarray, self.sums)  # device_get takes ten times as long for small arrays
        out = finalize(sums)
        counts = {n: float(s.count) for n, s in sums.items() if n.startswith(LOSS) and isinstance(s, Sum)}
        each = self.seconds / self.timed
        out["targets_per_s"] = max(counts.values(), default=0.0) / (self.last - self.first) / each
        terms = [loss_weights.get(name, 1.0) * out[name] for name, count in counts.items() if count]
        out["loss"] = sum(terms) if terms else float("nan")
        out["examples_per_s"] = batch_size / each
        out["step_ms"] = 1e3 * each
        return out


class _Windows:
    """Windows on their way to `on_window`, and the clock between them.

    A window ends when its sums are ready. Where the device is behind, that is seen at the next boundary, when they
    are fetched; where it is not, at once. So neither running ahead nor waiting falsifies a rate.
    """

    def __init__(self, start: int, on_window: Callable[[Window], dict[str, Any]]):
        self._on_window = on_window
        self._opened, self._clock = start, time.perf_counter()
        self._untimed = 0
        self._closed: list[tuple[int, int, Sums, float]] = []
        self._values: dict[str, Any] = {}

    def compiled(self, window: int) -> None:
        """The first step is done: the clock begins after it, unless it is a window of its own."""
        if window > 1:
            self._untimed, self._clock = 1, time.perf_counter()

    def close(self, at: int, sums: Sums | None) -> None:
        if sums is not None and at > self._opened:
            self._closed.append((self._opened, at, sums, time.perf_counter()))
        self._opened = at

    def deliver(self, keep: int = 0) -> dict[str, Any]:
        """Fetches all but the newest `keep` closed windows; the newest values."""
        while len(self._closed) > keep:
            first, last, sums, ended = self._closed.pop(0)
            # A device that keeps up was done when the window was closed; one that is behind is waited for.
            if ended <= self._clock or not _ready(sums):
                jax.block_until_ready(sums)
                ended = time.perf_counter()
            seconds, self._clock = max(ended - self._clock, 1e-9), ended
            timed, self._untimed = max(last - first - self._untimed, 1), 0
            self._values = self._on_window(Window(first, last, sums, seconds, timed))
        return self._values

    def hooks_done(self, at: int) -> None:
        """Where a hook flushed, nothing is under way: the next window begins now."""
        if not self._closed and self._opened == at:
            self._clock = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Ended:
    """Where and why the loop ended: `finished`, `interrupted`, or the reason a hook gave."""

    state: State
    step: int
    cursor: int
    reason: str


def _ready(sums: Sums) -> bool:
    """Whether the device is done with them; never waits."""
    leaves: list[Any] = [leaf for leaf in jax.tree.leaves(sums) if isinstance(leaf, jax.Array)]
    return all(leaf.is_ready() for leaf in leaves)


def check_finite(values: dict[str, Any], window: Window, policy: NonFinite) -> None:
    """Turns the step's own count of non-finite steps into `skipped`, or stops the run.

    Raises:
      RunFailed: the policy is `raise` and there was one.
      GoBack: the policy is `rollback` and there was one.
    """
    first = values.pop("nonfinite_first", float("-inf"))
    share = values.pop("nonfinite", 0.0)
    count = round(share * (window.last - window.first))
    bad = int(-first) + 1 if count else 0
    what = f"loss or gradient is not finite at step {bad} ({count} of steps {window.first + 1} to {window.last})"
    if count and policy == "rollback":
        raise GoBack(bad, bad, what)
    if count and policy == "raise":
        raise RunFailed(
            f"{what}; the parameters were left as they were before it. Look at the batch; lower optimizer.lr or set"
            " optimizer.clip in another run (init_from takes parameters over), or go on here with nonfinite=rollback"
            " (back to the last checkpoint, past the batch) or nonfinite=skip"
        )
    values["skipped"] = count


def run_loop(
    step: Step,
    state: State,
    batches: Iterator[Batch],
    mesh: Mesh,
    *,
    start: int,
    cursor: int,
    steps: int,
    batch_size: int,
    window: int = 50,
    hooks: Sequence[Hook] = (),
    on_window: Callable[[Window], dict[str, Any]] = lambda window: {},
    poll: Callable[[], bool] = lambda: False,
) -> Ended:
    """Runs steps `start` + 1 to `steps`; call it inside `jax.set_mesh(mesh)`.

    Args:
      batches: one global batch a step, from `cursor` on.
      window: steps between fetches of metrics; the window fetched is the previous one.
      on_window: gets each closed window, one boundary late or when a hook flushes, and returns the values hooks see.
      poll: asked before every step; true ends the loop as `interrupted`.

    A hook's error passes through, after the windows before it are delivered.
    """
    wait = serialise_dispatch(mesh)
    at = start
    sums: Sums | None = None
    windows = _Windows(start, on_window)

    def flush() -> dict[str, Any]:
        nonlocal sums
        windows.close(at, sums)
        sums = None
        return windows.deliver()

    def end(reason: str) -> Ended:
        flush()
        return Ended(state, at, cursor + (at - start) * batch_size, reason)

    while at < steps and not poll():
        due = min((at // n + 1) * n for n in (window, *(hook.every for hook in hooks)))
        for _ in range(min(due, steps) - at):
            state, sums = step(state, next(batches), sums, poll)  # type: ignore[arg-type]
            at += 1
            if wait or at == start + 1:
                jax.block_until_ready(sums)
            if at == start + 1:
                windows.compiled(window)
            if poll():
                break
        if at % window == 0:
            windows.close(at, sums)
            sums = None
            windows.deliver(keep=1)
        snapshot = Snapshot(at, cursor + (at - start) * batch_size, state, flush)
        try:
            for hook in hooks:
                if at % hook.every == 0 and not poll():
                    hook.fn(snapshot)
        except GoBack:
            raise
        except Exception:
            flush()
            raise
        windows.hooks_done(at)
        if snapshot.stop:
            return end(snapshot.stop)
    return end("finished" if at >= steps else "interrupted")
