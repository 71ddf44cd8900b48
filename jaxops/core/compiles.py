"""Counts and times of compiles by function name: a compile after warm-up is a bug that shows only as slowness."""

import collections
import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxops.core import distributed
from jaxops.core.cache import cache_root

_EVENT = "/jax/core/compile/backend_compile_duration"


class Compiles:
    """Counts compiles by function name, and calls `on_compile(name)` after each, while `watching`."""

    def __init__(self, on_compile: Callable[[str], None] = lambda name: None) -> None:
        self._on_compile = on_compile
        self.count: collections.Counter[str] = collections.Counter()
        self.seconds = 0.0
        self._warm: collections.Counter[str] | None = None

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _EVENT:
            name = re.sub(r"^jit\((.*)\)$", r"\1", str(kwargs.get("fun_name", "?")))
            self.count[name] += 1
            self.seconds += duration_secs
            self._on_compile(name)

    def warm(self) -> None:
        """Marks everything compiled until now as expected."""
        self._warm = self.count.copy()

    def again(self, programs: Iterable[str]) -> dict[str, int]:
        """Returns the programs among these that were compiled again since `warm`, with the number of times."""
        if self._warm is None:
            return {}
        since = self.count - self._warm
        return {name: since[name] for name in programs if self._warm[name] and since[name]}

    @contextlib.contextmanager
    def watching(self) -> Iterator["Compiles"]:
        """Listens to jax's compile events inside."""
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        try:
            yield self
        finally:
            jax.monitoring.unregister_event_duration_listener(self._listen)


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the jaxops cache between processes, unless jax has a cache folder already."""
    if getattr(jax.config, "jax_compilation_cache_dir") is None:  # noqa: B009 (mypy knows no flags)
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def forgo_cache_of_one(mesh: jax.sharding.Mesh) -> None:
    """Gives up the compilation cache where it would serve process 0 alone: with several processes on CPU devices.

    Only process 0 writes into jax's cache, and on CPUs the key of a program differs between processes. From the second
    start on process 0 would be ready at once and wait for the others, longer than gloo does (`compile_together`).
    """
    if _waits_by_gloo(mesh):
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # jax asks the flag once, at its first compile


def compile_together(fn: Any, mesh: jax.sharding.Mesh, *args: Any) -> None:
    """Compiles a jitted function, and waits until all processes have, where a process must not run it alone.

    That is so on CPU devices: at the first collective between processes gloo waits for the others for 30 s.

    Raises:
      Lost: a process has not compiled within JAXOPS_BARRIER_SECONDS.
      RunFailed: another process failed meanwhile.
    """
    if _waits_by_gloo(mesh):
        fn.lower(*args).compile()
        distributed.barrier("compiled")


def _waits_by_gloo(mesh: jax.sharding.Mesh) -> bool:
    devices = mesh.devices.flat
    return devices[0].platform == "cpu" and len({device.process_index for device in devices}) > 1
