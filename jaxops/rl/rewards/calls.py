"""Calls of functions that may be slow or never return: several at a time, each with a time-out, in the order they end.

Python cannot end a thread. So a call that is late is left to itself in its daemon thread, and what it returns later is
not read. A late coroutine is cancelled. Tested in tests/rl/test_host_rewards_faults.py.
"""

import asyncio
import concurrent.futures
import inspect
import itertools
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

ANSWERS_WITHIN = 1.0
"""Seconds after which an event loop that does not answer counts as blocked."""
Group = TypeVar("Group", bound=Hashable)
Tag = TypeVar("Tag")


class Limits(NamedTuple):
    """The largest number of calls of a group that run at a time, and the seconds that each may last."""

    workers: int
    seconds: float


class EndedCall(NamedTuple, Generic[Group, Tag]):
    """A call that ended or was given up.

    Attributes:
      group: the group that it was made in.
      tag: what it was added with.
      result: what it returned.
      error: what it raised; a `TimeOut` where it was late.
    """

    group: Group
    tag: Tag
    result: Any
    error: BaseException | None


class TimeOut(Exception):
    """The error of a call that was late."""


class _Call:
    """One call in its own daemon thread."""

    def __init__(self, number: int, function: Callable[[], Any], loop: "EventLoop", ended: queue.SimpleQueue) -> None:
        self._awaited: concurrent.futures.Future[Any] | None = None
        self._lock, self._late = threading.Lock(), False
        arguments = (number, function, loop, ended)
        threading.Thread(target=self._run, args=arguments, name="reward", daemon=True).start()

    def _run(self, number: int, function: Callable[[], Any], loop: "EventLoop", ended: queue.SimpleQueue) -> None:
        try:
            result = function()
            if inspect.isawaitable(result):
                result = self._wait_for(result, loop)
            ended.put((number, result, None))
        except BaseException as error:  # a SystemExit too: nobody else would learn of it
            ended.put((number, None, error))

    def _wait_for(self, awaitable: Awaitable[Any], loop: "EventLoop") -> Any:
        with self._lock:
            if self._late:
                if inspect.iscoroutine(awaitable):
                    awaitable.close()
                raise TimeOut
            self._awaited = loop.submit(awaitable)
        return self._awaited.result()

    def give_up(self) -> bool:
        """Stops waiting for it, and returns whether it is awaited in the loop, where it is cancelled."""
        with self._lock:
            self._late = True
            if self._awaited is not None:
                self._awaited.cancel()
            return self._awaited is not None


class EventLoop:
    """An event loop in a daemon thread, begun when it is first needed; it stays, so that clients may belong to it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def submit(self, awaitable: Awaitable[Any]) -> "concurrent.futures.Future[Any]":
        """Begins to await `awaitable` in the loop."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run_loop, args=(self._loop,), name="rewards", daemon=True).start()
                weakref.finalize(self, _stop, self._loop)
            return asyncio.run_coroutine_threadsafe(_result_of(awaitable), self._loop)

    def replace_blocked(self) -> None:
        """Leaves a loop that a coroutine blocks: it does not answer in time. The next call begins another."""
        answered = threading.Event()
        with self._lock:
            if self._loop is None:
                return
            self._loop.call_soon_threadsafe(answered.set)
            if not answered.wait(ANSWERS_WITHIN):
                self._loop = None


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)


async def _result_of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


class Calls(Generic[Group, Tag]):
    """Calls that wait, run and end; a group has limits of its own, and groups run side by side.

    Iterating yields calls as they end, and ends when none is left; more may be added meanwhile.
    """

    def __init__(self) -> None:
        self._waiting: dict[Group, deque[tuple[Tag, Callable[[], Any]]]] = {}
        self._limits: dict[Group, tuple[Limits, EventLoop]] = {}
        self._running: dict[int, tuple[Group, Tag, float, _Call]] = {}
        self._numbers = itertools.count()
        self._ended: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    def open(self, group: Group, limits: Limits, loop: EventLoop) -> None:
        """Begins a group, whose coroutines are awaited in `loop`."""
        self._limits[group] = limits, loop
        self._waiting[group] = deque()

    def add(self, group: Group, tag: Tag, function: Callable[[], Any]) -> None:
        """Adds a call, which begins when one of the group's workers is free."""
        self._waiting[group].append((tag, function))

    def clear(self, group: Group | None = None) -> list[Tag]:
        """Removes the calls that have not begun, of all groups or of one, and returns their tags."""
        removed = []
        for each in self._waiting if group is None else (group,):
            removed += [tag for tag, _ in self._waiting[each]]
            self._waiting[each].clear()
        return removed

    def __iter__(self) -> Iterator[EndedCall[Group, Tag]]:
        self._begin()
        while self._running:
            yield self._next()
            self._begin()

    def _begin(self) -> None:
        for group, (limits, loop) in self._limits.items():
            busy = sum(each == group for each, *_ in self._running.values())
            while busy < limits.workers and self._waiting[group]:
                tag, function = self._waiting[group].popleft()
                number, deadline = next(self._numbers), time.monotonic() + limits.seconds
                self._running[number] = group, tag, deadline, _Call(number, function, loop, self._ended)
                busy += 1

    def _next(self) -> EndedCall[Group, Tag]:
        while True:
            first = min(self._running, key=lambda number: self._running[number][2])
            try:
                left = max(self._running[first][2] - time.monotonic(), 0.0)
                number, result, error = self._ended.get(timeout=left)
            except queue.Empty:
                group, tag, _, call = self._running.pop(first)
                if call.give_up():
                    self._limits[group][1].replace_blocked()
                return EndedCall(group, tag, None, TimeOut())
            if number in self._running:  # else it was given up
                group, tag, *_ = self._running.pop(number)
                return EndedCall(group, tag, result, error)
