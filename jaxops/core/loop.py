"""The one loop: it calls steps on batches, fetches windows of metrics one window late, and calls hooks when due.

Between two boundaries (a window's end or a hook's turn) the loop takes a batch, calls the step, and waits only where
more than a few steps are in flight (core/flight.py). At a boundary it reads the window before the one that ends. The
next batch begins where the examples consumed so far end; its cursor is never computed from the step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxops.core.failures import RunFailed, UserError
from jaxops.core.flight import OpenWindow, Window, Windows
from jaxops.core.interrupt import Interrupted
from jaxops.core.mesh import serialise_dispatch
from jaxops.core.recovery import GoBack
from jaxops.core.state import State
from jaxops.core.sums import Sum, Sums
from jaxops.core.turn import Batches, Step, Turn

__all__ = ["Ended", "Hook", "NonFinite", "Snapshot", "Window", "check_finite", "every", "run_loop"]

NonFinite = Literal["raise", "skip", "rollback"]


@dataclasses.dataclass
class Snapshot:
    """The view of the run that a hook is called with.

    Attributes:
      step: the step just finished.
      cursor: the position of the next example in the stream.
      state: is donated to the next step: use it inside the hook, do not keep it.
      flush: waits for the device, delivers every window up to this step and returns the newest values. A hook that
        takes long or saves calls it first: then the steps before it are recorded, and no window includes its time.
      stop: a hook sets it to a reason to end the run.
    """

    step: int
    cursor: int
    state: State
    flush: Callable[[], dict[str, Any]] = dict
    stop: str | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """The values of the window that ends at this step; reading them flushes."""
        return self.flush()


@dataclasses.dataclass(frozen=True)
class Hook:
    """A function called after every `every`-th step; `flushes` where it always ends the window there."""

    every: int
    fn: Callable[[Snapshot], None]
    flushes: bool = False


def every(steps: int, fn: Callable[[Snapshot], None]) -> Hook:
    """Returns a hook that calls `fn(snapshot)` after every `steps` steps.

    Raises:
      ValueError: `steps` is below one.

    Example:
      hook = jaxops.every(50, lambda snapshot: print(snapshot.step, snapshot.metrics.get("loss")))
      run = jaxops.fit(task, hooks=[hook])
    """
    if steps < 1:
        raise ValueError(f"every: expected at least one step, got {steps}")
    return Hook(steps, fn)


@dataclasses.dataclass(frozen=True)
class Ended:
    """The end of the loop: the state there, and the reason (`finished`, `interrupted`, or what a hook gave).

    `window` is the one that an interrupt cut short, for the run that goes on from there.
    """

    state: State
    step: int
    cursor: int
    reason: str
    window: OpenWindow | None = None


def check_finite(values: dict[str, Any], window: Window, policy: NonFinite) -> None:
    """Replaces the count of non-finite updates in a window's `values` by `skipped`, or stops the run.

    Raises:
      RunFailed: the policy is `raise` and an update was not finite.
      GoBack: the policy is `rollback` and an update was not finite.
    """
    first = values.pop("nonfinite_first", float("-inf"))
    values.pop("nonfinite", None)  # a share of the updates; their number is exact in the window's sums
    entry = window.sums.get("nonfinite")
    count, updates = (round(float(entry.total)), round(float(entry.count))) if isinstance(entry, Sum) else (0, 0)
    values["skipped"] = count
    if not count or policy == "skip":
        return
    bad = int(-first) + 1
    steps = f"steps {window.first + 1} to {window.last}"
    among = steps if updates == window.last - window.first else f"{updates} updates in {steps}"
    what = f"loss or gradient is not finite at step {bad} ({count} of {among})"
    if policy == "rollback":
        raise GoBack(bad, bad, window.cursor_after(bad), what)
    raise RunFailed(
        f"{what}; the parameters were left as they were before it. Look at the batch; lower optimizer.lr or set"
        " optimizer.clip in another run (init_from takes parameters over), or go on here with nonfinite=rollback"
        " (back to the last checkpoint, past the batch) or nonfinite=skip"
    )


def run_loop(
    step: Step,
    state: State,
    batches: Batches,
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
    on_step: Callable[[int], None] = lambda step: None,
    begun: OpenWindow | None = None,
    on_open: Callable[[Window], object] | None = None,
) -> Ended:
    """Runs steps `start` + 1 to `steps`; call it inside `jax.set_mesh(mesh)`.

    Args:
      step: the step to call, by the protocol `jaxops.core.turn.Step`.
      state: the state after step `start`; it is donated.
      batches: `batches(cursor, size)` returns the global batch of `size` examples at a cursor.
      mesh: the mesh of the state.
      start: the number of steps that are already done.
      cursor: where the first batch begins; it advances by the examples that each step consumes.
      steps: the number of the last step.
      batch_size: the examples of each batch.
      window: steps between fetches of metrics; the window fetched is the previous one.
      hooks: are called in this order after the steps at which they are due.
      on_window: gets each closed window, one boundary late or when a hook flushes, and returns the values hooks see.
      poll: asked before every step; true ends the loop as `interrupted`. So does `Interrupted`, raised by a step.
      on_step: told the number of each step before its batch is taken.
      begun: the window that an interrupt cut short at `start`, which this run ends where it was due.
      on_open: sees the window that an interrupt cuts short, and may refuse it by an error; the window is then returned
        in `Ended`. Without it such a window is delivered as it is.

    A hook's error passes through after the windows before it are delivered.

    Raises:
      UserError: the step violates the protocol: it does not advance `state.step` by one.
      RunFailed: the step raised `Interrupted` after it had donated its state, or it donated a window.
    """
    at = start
    sums: Sums | None = None
    windows = Windows(start, cursor, serialise_dispatch(mesh), on_window, begun)
    turn = Turn(batches, poll)

    def flush() -> dict[str, Any]:
        nonlocal sums
        windows.close(at, sums)
        sums = None
        return windows.deliver()

    def end(reason: str) -> Ended:
        cut = reason == "interrupted" and on_open is not None
        if cut and at == start:
            return Ended(state, at, cursor, reason, begun)
        if not cut or at % window == 0 or any(at % hook.every == 0 for hook in hooks if hook.flushes):
            flush()
            return Ended(state, at, cursor, reason)
        assert on_open is not None
        return Ended(state, at, cursor, reason, windows.leave(at, sums, on_open))

    while at < steps and not poll():
        due = min((at // n + 1) * n for n in (window, *(hook.every for hook in hooks)))
        for _ in range(min(due, steps) - at):
            on_step(at + 1)
            before = int(state.step) if at == start else 0
            batch = batches(cursor, batch_size)
            turn.cursor, turn.examples, turn.updates = cursor, batch_size, 1
            try:
                state, sums = step(state, batch, sums, turn)
            except Interrupted:
                _require_intact(state, at + 1)
                return end("interrupted")
            at += 1
            cursor += int(turn.examples)
            if begun is not None and at == start + 1:
                sums = begun.merged(sums) or sums
            windows.add(sums, cursor, turn.updates)
            if at == start + 1:
                _require_one_step(before, state)
                windows.compiled(window)
            if poll():
                break
        if at % window == 0:
            windows.close(at, sums)
            sums = None
            windows.deliver(keep=1)
        snapshot = Snapshot(at, cursor, state, flush)
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


def _require_one_step(before: int, state: State) -> None:
    """Refuses a step that does not advance `state.step`, or whose inner updates advance it too.

    Raises:
      UserError: `state.step` did not advance by exactly one.
    """
    if (moved := int(np.asarray(state.step)) - before) != 1:
        raise UserError(
            f"the first step moved state.step by {moved}: a step of several programs makes its inner update by"
            " build_step(..., advance_step=False) and advances the step once, by jaxops.core.turn.advanced(state)"
        )


def _require_intact(state: State, step: int) -> None:
    """Refuses an `Interrupted` that was raised too late to take the step back.

    Raises:
      RunFailed: the state was donated.
    """
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)):
        raise RunFailed(
            f"step {step} raised Interrupted after its first update had taken the state over: a step may give up only"
            " before that, and must come to its end afterwards; the run goes on from its last checkpoint"
        )
