"""Steps in flight: the limit on their number, the time at which each was done, and their windows of metrics.

A host that only counted its own calls would run tens of steps ahead of one device: it would stop late, and its clock
would measure the speed of calls. So the loop waits for the oldest step where more than a few are not done, and every
rate is computed from the times at which steps were seen to be done. Tested in tests/core/test_loop.py.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxops.core.failures import RunFailed, UserError
from jaxops.core.sums import LOSS, Sum, Sums, finalize, merge

LONG_SECONDS, SHORT_SECONDS = 0.1, 0.001
"""Seconds above which a step is long and below which it is short. Long steps need not be queued far ahead: the host
prepares the next during one of them. For short steps waking up after each would cost more than the rest of the loop,
and a dozen of them end soon."""
SERIAL, LONG, USUAL, SHORT = (0, 0), (1, 1), (3, 3), (15, 8)
"""(most steps in flight when the loop goes on, steps left in flight where it waits), by the length of a step.
The step that the loop calls next is not counted."""


@dataclasses.dataclass(frozen=True)
class Window:
    """A closed window of steps, with its sums (on the device until fetched) and its time.

    Attributes:
      first: the step before the window.
      last: the last step of the window.
      sums: the merged sums of its steps.
      seconds: the time that its timed steps took.
      timed: the number of timed steps; the first step of a process compiles and is left out.
      cursors: the cursor before the window and after each of its steps.
      updates: the number of optimizer updates that its steps reported.
    """

    first: int
    last: int
    sums: Sums
    seconds: float
    timed: int
    cursors: Sequence[int]
    updates: int

    @property
    def examples(self) -> int:
        """The number of examples that the timed steps consumed."""
        return self.cursors[-1] - self.cursors[-1 - self.timed]

    def cursor_after(self, step: int) -> int:
        """Returns the cursor after one of the window's steps."""
        return self.cursors[step - self.first]

    def values(self, loss_weights: Mapping[str, float]) -> dict[str, Any]:
        """Returns host values: the objective's metrics, `loss`, `step_ms`, examples and counted targets a second.

        `updates` (the mean number of updates in a step) is included where it is not one.
        """
        sums = jax.tree.map(np.asarray, self.sums)  # device_get takes ten times as long for small arrays
        out = finalize(sums)
        counts = {n: float(s.count) for n, s in sums.items() if n.startswith(LOSS) and isinstance(s, Sum)}
        steps, each = self.last - self.first, self.seconds / self.timed
        out["targets_per_s"] = max(counts.values(), default=0.0) / steps / each
        terms = [loss_weights.get(name, 1.0) * out[name] for name, count in counts.items() if count]
        out["loss"] = sum(terms) if terms else float("nan")
        out["examples_per_s"] = self.examples / self.seconds
        out["step_ms"] = 1e3 * each
        if self.updates != steps:
            out["updates"] = self.updates / steps
        return out


@dataclasses.dataclass(frozen=True)
class OpenWindow:
    """A window that an interrupt cut short: the run that goes on from there takes it up and closes it where it was due.

    Attributes:
      first: the step after which it began.
      sums: what its steps have summed so far, by name: (total, count) of a Sum, (maximum,) of a Max.
      cursors: the cursor before the window and after each of its steps.
      updates: updates of the optimizer that each step made.
    """

    first: int
    sums: Mapping[str, tuple[np.ndarray, ...]]
    cursors: tuple[int, ...]
    updates: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.updates)

    def merged(self, sums: Sums) -> Sums | None:
        """Returns these sums merged with the window's; None where their names or shapes differ."""
        if sums.keys() != self.sums.keys():
            return None
        held: Sums = {}
        for name, entry in sums.items():
            leaves, structure = jax.tree.flatten(entry)
            kept = self.sums[name]
            if [np.shape(leaf) for leaf in leaves] != [leaf.shape for leaf in kept]:
                return None
            placed = [_placed(old, new) for old, new in zip(kept, leaves, strict=True)]
            held[name] = jax.tree.unflatten(structure, placed)
        return jax.block_until_ready(_merge(held, sums))


def _placed(old: np.ndarray, new: Any) -> Any:
    return jax.device_put(old, new.sharding) if isinstance(new, jax.Array) else old


_merge = jax.jit(merge)


class Windows:
    """The steps in flight, oldest first, and the windows that are not yet delivered to `on_window`.

    A window ends when its last step is seen to be done. Where `serial` is true a step begins only when the one before
    it is done.
    """

    def __init__(
        self,
        start: int,
        cursor: int,
        serial: bool,
        on_window: Callable[[Window], dict[str, Any]],
        begun: OpenWindow | None = None,
    ):
        self._serial, self._on_window = serial, on_window
        self._most, self._left = SERIAL if serial else USUAL
        self._flying: collections.deque[tuple[Any, ...]] = collections.deque()
        self._start, self._begun = start, begun.steps if begun else 0
        self._opened = start - self._begun
        # Of the steps that are not delivered: when each was done, the cursor before and after, updates.
        self._clock = self._seen = time.perf_counter()
        self._base, self._done = self._opened, [self._clock] * self._begun
        self._cursors = [*(begun.cursors[:-1] if begun else ()), cursor]
        self._updates = list(begun.updates if begun else ())
        self._untimed, self._untimed_clock = self._begun, self._clock
        self._closed: list[tuple[int, int, Sums]] = []
        self._values: dict[str, Any] = {}

    def add(self, sums: Sums | None, cursor: int, updates: int) -> None:
        """Adds a step that was called, and waits until few enough steps are in flight.

        Raises:
          UserError: the step returned no sums.
        """
        if sums is None:
            raise UserError(
                "a step returned None for its sums: where it makes no update and got no window, it returns"
                " update.empty_window(state, minibatch)"
            )
        flying = self._flying
        flying.append(_handles(sums))
        self._cursors.append(cursor)
        self._updates.append(updates)
        if len(flying) > self._most:
            _wait(flying[-1 - self._left])
            self._observe()

    def _observe(self) -> None:
        """Records the time of all steps that were done since the last call, and sets how far the host may run ahead.

        Where several steps are found done at once (the host was busy), they divide the time since then evenly.
        """
        flying, count = self._flying, 0
        while flying and _ready(flying[0]):
            flying.popleft()
            count += 1
        if not count:
            return
        now, before = time.perf_counter(), self._seen
        each = (now - before) / count
        self._done += [now] if count == 1 else [before + each * n for n in range(1, count + 1)]
        self._seen = now
        if not self._serial:
            self._most, self._left = LONG if each > LONG_SECONDS else USUAL if each > SHORT_SECONDS else SHORT

    def _settle(self, step: int) -> None:
        """Waits until this step is done."""
        while self._base + len(self._done) < step:
            _wait(self._flying[0])
            self._observe()

    def compiled(self, window: int) -> None:
        """The first step was called: waits for it. The clock begins after it, unless it is a window of its own."""
        self._settle(self._start + 1)
        if window > 1:
            self._untimed, self._clock = self._begun + 1, self._seen

    def close(self, at: int, sums: Sums | None) -> None:
        """Ends the window with the step `at`, whose call returned these sums."""
        if sums is not None and at > self._opened:
            self._closed.append((self._opened, at, sums))
        self._opened = at

    def leave(self, at: int, sums: Sums | None, check: Callable[[Window], object]) -> OpenWindow | None:
        """Delivers what is closed and returns the window that is not, as of the step `at`; `check` sees it before.

        A window that `check` refuses, by an error, is nobody's: the run goes back or ends.
        """
        self.deliver()
        if sums is None or at == self._opened:
            return None
        self._settle(at)
        cursors, updates = tuple(self._cursors), tuple(self._updates)
        check(Window(self._opened, at, sums, 1.0, at - self._opened, cursors, sum(updates)))
        held = {name: tuple(np.asarray(x) for x in jax.tree.leaves(entry)) for name, entry in sums.items()}
        return OpenWindow(self._opened, held, cursors, updates)

    def deliver(self, keep: int = 0) -> dict[str, Any]:
        """Delivers all but the newest `keep` closed windows, and returns the newest values."""
        while len(self._closed) > keep:
            first, last, sums = self._closed.pop(0)
            self._settle(last)
            count = last - first
            ended = self._done[count - 1]
            timed, since = count - self._untimed, self._clock
            if not timed:  # it holds the step that compiled alone, whose time is all that is known of its speed
                timed, since = 1, self._untimed_clock
            seconds, self._clock, self._untimed = max(ended - since, 1e-9), max(ended, self._clock), 0
            window = Window(
                first, last, sums, seconds, timed, tuple(self._cursors[: count + 1]), sum(self._updates[:count])
            )
            self._base = last
            del self._done[:count], self._cursors[:count], self._updates[:count]
            self._values = self._on_window(window)
        return self._values

    def hooks_done(self, at: int) -> None:
        """Restarts the clock where a hook flushed: no step is in flight, and the next window begins now."""
        if not self._closed and self._opened == at:
            self._clock = self._seen = time.perf_counter()


def _handles(sums: Sums) -> tuple[Any, ...]:
    """Returns the arrays to wait on for a call of a step: the count of `nonfinite` updates, else all of the sums."""
    counted = sums.get("nonfinite")
    if isinstance(counted, Sum):
        return (counted.total,) if hasattr(counted.total, "is_ready") else ()
    return tuple(leaf for leaf in jax.tree.leaves(sums) if hasattr(leaf, "is_ready"))


def _ready(handles: tuple[Any, ...]) -> bool:
    """Returns whether the device is done with these arrays, without waiting."""
    if len(handles) == 1:  # the usual case, fast because it is checked every step
        return bool(handles[0].is_ready())
    return all(handle.is_ready() for handle in handles)


def _wait(handles: tuple[Any, ...]) -> None:
    """Waits until the device is done with these arrays.

    Raises:
      RunFailed: the step donated the window that it was given.
    """
    for handle in handles:
        if handle.is_deleted():
            raise RunFailed(
                "a step donated the window it was given, or an array in it: the loop waits on those; copy it"
            )
        handle.block_until_ready()
