"""The protocol between the loop and a step: what is called, what it may ask, and what it reports.

A step of supervised training is one jitted program (`TrainStep`). A step of PPO is several, with host work between
them, and its inner update is a `TrainStep` too. Held by tests/core/test_step_of_programs.py.
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
"""`batches(cursor, size)`: the global batch of `size` examples at a cursor, the same however often it is asked."""


class Turn:
    """One call of a step by the loop: what the step may ask of the loop, and what it reports to it.

    A step that asks for nothing and makes one update with one batch leaves it alone.

    Attributes:
      poll: whether someone wants the run to stop. Among several processes all must ask equally often: never in a wait.
      cursor: where the batch of this call begins in the stream of examples.
      examples: how many examples the call has consumed. It begins as the size of the batch, and `draw` adds to it. A
        step that did not use all of them may lower it: the next batch begins where this call ends.
      updates: how many updates of the optimizer the call made. It begins as 1.
    """

    __slots__ = ("_batches", "cursor", "examples", "poll", "updates")

    def __init__(self, batches: Batches, poll: Callable[[], bool], cursor: int = 0, examples: int = 0):
        self._batches = batches
        self.poll = poll
        self.cursor, self.examples, self.updates = cursor, examples, 1

    def draw(self, size: int) -> Batch:
        """The next `size` examples of the stream, which this call consumes too (dynamic sampling).

        All processes must draw alike. Draws as large as the batch are prefetched, others are built while the step
        waits.

        Raises:
          UserError: `size` is below one.
        """
        if size < 1:
            raise UserError(f"draw: expected at least one example, got {size}")
        batch = self._batches(self.cursor + self.examples, size)
        self.examples += size
        return batch

    def __call__(self) -> bool:
        """The same as `poll()`, so that a step which does nothing but poll may name this argument `poll`."""
        return self.poll()


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted piece of a step, the arguments (abstract or not) it is called with, and how often a step runs it.

    `times` is also where the trips of a while loop belong, which FLOP counting cannot know.
    """

    name: str
    fn: Any
    args: tuple[Any, ...]
    times: int = 1


class Step(Protocol):
    """A callable that the loop drives. It may be several programs with host work between them (PPO).

    What a step of several programs has to keep:

    * The inner update is `build_step(..., advance_step=False)`: every call of it advances `state.updates`, and none
      advances `state.step`. The step itself does that once a call, by `advanced(state)`. Schedules, and keys of what is
      collected, read `state.step`; keys of the inner update (dropout) read `state.updates`.
    * Every update donates the state that it is given. What is still needed of it afterwards (`state.step`, an entry of
      `state.extra`) is copied to the host, or used, before the first update: reading it later raises "Array has been
      deleted". An entry of `state.extra` that only the step itself changes is registered all the same, as
      `Extra(init)`.
    * An early stop leaves updates out. It never makes updates with zero gradients, which would still move Adam. A call
      without any update returns the inner update's `empty_window(state, minibatch)` where `window` is None.
    * It may raise `Interrupted` (after `poll()` said so, say) until the first donation, and then counts as never
      called: its batch and its draws come again. After the first donation it must come to its end.
    * `window` must stay readable: the loop waits on the sums of earlier calls. So `window` is not donated.
    * On a mesh of several virtual CPU devices (`serialise_dispatch(mesh)`) it waits for each of its programs.
      A `TrainStep` does so by itself.
    """

    def __call__(
        self, state: State, batch: Batch, window: Sums | None = None, turn: Turn | None = None
    ) -> tuple[State, Sums]:
        """The next state, and this call's sums merged into `window`.

        Args:
          state: what the call before returned; most of it is donated.
          batch: the next examples, as numpy or global arrays.
          window: the sums of the calls before in this window of metrics; None where it begins.
          turn: what the step may ask of the loop, and where it reports what it consumed.

        Raises:
          Interrupted: the step gives up, before its first donation.
        """
        ...

    def programs(self, state: PyTree, batch: PyTree) -> list[Program]:
        """The jitted pieces with their arguments, all that one call runs: for FLOPs, plan, audit and warm-up."""
        ...


def _next_step(step: jax.Array) -> jax.Array:
    return step + 1


_advance = jax.jit(_next_step, donate_argnums=0)


def advanced(state: State) -> State:
    """The state with the loop's step one further: the end of a step of several programs. Donates `state.step`."""
    return dataclasses.replace(state, step=_advance(state.step))
