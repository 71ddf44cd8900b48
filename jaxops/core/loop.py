"""The one loop: steps over batches, windows of metrics fetched one late, hooks that cost nothing when not due.

Between two boundaries (a window's end or a hook's turn) the loop does nothing but take a batch and call the step; it
never waits for the device, because the window it reads at a boundary is the one before.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxops.core.failures import RunFailed
from jaxops.core.mesh import serialise_dispatch
from jaxops.core.sharding import named_leaves
from jaxops.core.state import State
from jaxops.core.step import NonFinite, Step
from jaxops.core.sums import LOSS, Sum, Sums, finalize

Batch = Mapping[str, Any]


@dataclasses.dataclass
class Snapshot:
    """What a hook sees: the step just finished, the next example's cursor, the newest metrics, the state.

    `state` is donated to the next step: use it inside the hook, do not keep it. Set `stop` to a reason to end the run.
    `flush()` closes the open window and delivers all closed ones: what is saved at this step then has its metrics
    on record, and a run resumed from it continues them without a gap.
    """

    step: int
    cursor: int
    state: State
    metrics: dict[str, Any]
    stop: str | None = None
    flush: Callable[[], None] = lambda: None


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
    """A closed window of steps (first, last], its sums (on the device until fetched) and when it was closed."""

    first: int
    last: int
    sums: Sums
    seconds: float

    def values(self, batch_size: int, loss_weights: Mapping[str, float]) -> dict[str, Any]:
        """Host values: the objective's metrics, `loss`, examples and counted targets a second."""
        sums = jax.device_get(self.sums)
        out = finalize(sums)
        counts = [float(s.count) for name, s in sums.items() if name.startswith(LOSS) and isinstance(s, Sum)]
        out["targets_per_s"] = max(counts) / self.seconds
        out["loss"] = sum(loss_weights.get(name, 1.0) * v for name, v in out.items() if name.startswith(LOSS))
        out["examples_per_s"] = (self.last - self.first) * batch_size / self.seconds
        out["step_ms"] = 1e3 * self.seconds / (self.last - self.first)
        return out


@dataclasses.dataclass(frozen=True)
class Ended:
    """Where and why the loop ended: `finished`, `interrupted`, or the reason a hook gave."""

    state: State
    step: int
    cursor: int
    reason: str


def check_finite(values: dict[str, Any], window: Window, policy: NonFinite) -> None:
    """Turns the step's own count of non-finite steps into `skipped`, or stops the run.

    Raises:
      RunFailed: the policy is `raise` and there was one.
    """
    first = values.pop("nonfinite_first", float("-inf"))
    share = values.pop("nonfinite", 0.0)
    count = round(share * (window.last - window.first))
    if count and policy == "raise":
        raise RunFailed(
            f"loss or gradient is not finite at step {int(-first) + 1} ({count} of steps {window.first + 1} to"
            f" {window.last}); the parameters were left as they were before it. Lower optimizer.lr, set"
            f" optimizer.clip, look at the batch, or set nonfinite: skip"
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
      on_window: gets each closed window, one boundary late, and returns the values hooks see as `metrics`.
      poll: asked before every step; true ends the loop as `interrupted`.

    Raises:
      RunFailed: the device ran out of memory, or `on_window` raised it.
    """
    wait = serialise_dispatch(mesh)
    at, metrics = start, {}
    sums: Sums | None = None
    opened, opened_at = start, time.perf_counter()
    pending: list[Window] = []

    def close() -> None:
        nonlocal sums, opened, opened_at
        now = time.perf_counter()
        if sums is not None and at > opened:
            pending.append(Window(opened, at, sums, now - opened_at))
        sums, opened, opened_at = None, at, now

    def flush() -> None:
        nonlocal metrics
        close()
        while pending:
            metrics = on_window(pending.pop(0))

    def end(reason: str) -> Ended:
        flush()
        return Ended(state, at, cursor + (at - start) * batch_size, reason)

    try:
        while at < steps and not poll():
            due = min((at // n + 1) * n for n in (window, *(hook.every for hook in hooks)))
            for _ in range(min(due, steps) - at):
                state, sums = step(state, next(batches), sums, poll)  # type: ignore[arg-type]
                at += 1
                if wait:
                    jax.block_until_ready(sums)
                if poll():
                    break
            if at % window == 0:
                if pending:
                    metrics = on_window(pending.pop(0))
                close()
            snapshot = Snapshot(at, cursor + (at - start) * batch_size, state, metrics, flush=flush)
            for hook in hooks:
                if at % hook.every == 0 and not poll():
                    before = time.perf_counter()  # a hook's time is not the window's
                    hook.fn(snapshot)
                    opened_at += time.perf_counter() - before
            if snapshot.stop:
                return end(snapshot.stop)
        return end("finished" if at >= steps else "interrupted")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
            raise RunFailed(out_of_memory(state, at)) from error
        raise


def out_of_memory(state: State, step: int) -> str:
    """A message with bytes by group and the settings that would help."""
    lines = [f"out of device memory at step {step + 1}. The state takes, over all devices:"]
    for name in ("params", "frozen", "tables", "opt_state", "extra"):
        size = sum(leaf.size * leaf.dtype.itemsize for _, leaf in named_leaves(getattr(state, name)))
        if size:
            lines.append(f"  {name:<10} {size / 2**20:10.1f} MiB")
    lines.append(
        "The rest is activations and temporaries. What would help, cheapest first: a smaller batch.microbatch (the"
        " update stays the same), model.remat=full, precision.compute=bfloat16, mesh.fsdp=-1 with mesh.data=1 (shards"
        " parameters and optimizer), optimizer.kind=adafactor."
    )
    return "\n".join(lines)
