"""The protocol between the loop and a step: the call, the requests a step may make, and its report.

A step of supervised training is one jitted program (`TrainStep`). A step of PPO is several programs with host work
between them, and its inner update is a `TrainStep` too. Tested in tests/core/test_step_of_programs.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from jaxtyping import PyTree

from jaxops.core.failures import UserError
from jaxops.core.state import State
from jaxops.core.sums import Sums

Batch = Mapping[str, Any]
Batches = Callable[[int, int], Batch]
"""`batches(cursor, size)` returns the global batch of `size` examples at a cursor; repeated calls return the same."""


class Turn:
    """One call of a step by the loop; the step polls and draws through it, and reports its examples and updates.

    A step that makes one update with its one batch, and asks for nothing, need not touch it.

    Attributes:
      poll: returns true where the run should stop. All processes must call it equally often: never in a wait loop.
      cursor: the position of this call's batch in the stream of examples.
      examples: the number of examples that the call consumes. It begins as the size of the batch, and `draw` adds to
        it. A step that did not use all of them may lower it: the next batch begins where this call ends.
      updates: the number of optimizer updates that the call makes. It begins as 1.
    """

    __slots__ = ("_batches", "cursor", "examples", "poll", "updates")

    def __init__(self, batches: Batches, poll: Callable[[], bool], cursor: int = 0, examples: int = 0):
        self._batches = batches
        self.poll = poll
        self.cursor, self.examples, self.updates = cursor, examples, 1

    def draw(self, size: int) -> Batch:
        """Returns the next `size` examples of the stream; this call consumes them too (dynamic sampling).

        All processes must make the same draws. Draws as large as the batch are prefetched; others are built while the
        step waits.

        Raises:
          UserError: `size` is below one.
        """
        if size < 1:
            raise UserError(f"draw: expected at least one example, got {size}")
        batch = self._batches(self.cursor + self.examples, size)
        self.examples += size
        return batch

    def __call__(self) -> bool:
        """Calls `poll()`, so that a step which only polls may name this argument `poll`."""
        return self.poll()


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted piece of a step.

    Attributes:
      name: the name for reports.
      fn: the jitted function.
      args: its arguments, abstract or not.
      times: the number of times that a step runs it, multiplied by the trips of a while loop if it is one: FLOP
        counting cannot know those.
      beside: by name for people, those of its arguments that lie on the devices beside the state (a KV cache).
    """

    name: str
    fn: Any
    args: tuple[Any, ...]
    times: int = 1
    beside: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)


class Step(Protocol):
    """A callable that the loop drives. It may be several programs with host work between them (PPO).

    Rules for a step of several programs:

    * The inner update is `build_step(..., advance_step=False)`: every call of it advances `state.updates`, and none
      advances `state.step`. The step itself advances that once a call, by `advanced(state)`. Schedules and the keys of
      sampling read `state.step`; keys of the inner update (dropout) read `state.updates`.
    * Every update donates the state that it is given. An array of it that is needed afterwards (`state.step`, an entry
      of `state.extra`) is copied to the host, or used, before the first update: reading it later raises "Array has been
      deleted". An entry of `state.extra` that only the step itself changes is registered all the same, as
      `Extra(init)`.
    * An early stop leaves updates out. It never makes updates with zero gradients, which would still move Adam. The
      sums of a call without any update are the inner update's `empty_window(state, minibatch)`.
    * The sums of a call are added up by themselves, and then merged into `window` once. A run that goes on from the
      middle of a window then adds the same numbers in the same order, and logs the very same bits.
    * It may raise `Interrupted` until the first donation, for example when `poll()` returned true. The call then counts
      as never made: its batch and its draws come again. After the first donation it must run to its end.
    * `window` must stay readable, because the loop waits on the sums of earlier calls. So it is not donated.
    * On a mesh of several virtual CPU devices (`serialise_dispatch(mesh)`) it waits for each of its programs.
      A `TrainStep` does so by itself.
    """

    def __call__(
        self, state: State, batch: Batch, window: Sums | None = None, turn: Turn | None = None
    ) -> tuple[State, Sums]:
        """Returns the next state, and this call's sums merged into `window`.

        Args:
          state: the state that the previous call returned; most of it is donated.
          batch: the next examples, as numpy or global arrays.
          window: the merged sums of the earlier calls in this window of metrics; None where it begins.
          turn: the step's requests to the loop, and its report of examples and updates.

        Raises:
          Interrupted: the step gives up before its first donation.
        """
        ...

    def programs(self, state: PyTree, batch: PyTree) -> list[Program]:
        """Returns all jitted pieces that one call runs, with their arguments, for FLOPs, plan, audit and warm-up."""
        ...


def _next_step(step: jax.Array) -> jax.Array:
    return step + 1


_advance = jax.jit(_next_step, donate_argnums=0)


def advanced(state: State) -> State:
    """Advances the loop's step by one, at the end of a step of several programs; donates `state.step`."""
    return dataclasses.replace(state, step=_advance(state.step))
