"""Warm start: parameters of another run, by path, with a report of what was loaded, skipped and left as it was."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxops.core.failures import UserError
from jaxops.core.rows import put
from jaxops.core.sharding import map_named, named_leaves
from jaxops.core.state import State
from jaxops.tasks.trained import load


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Paths of parameters: taken over, of another shape there (with both shapes), and not asked for or not there."""

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} parameters loaded"]
        if self.skipped:
            parts.append(f"skipped for their shape: {', '.join(self.skipped)}")
        if self.left:
            parts.append(f"left fresh: {', '.join(self.left)}")
        return "; ".join(parts)


def warm_start(state: State, config: Any) -> tuple[State, WarmStart]:
    """The state with the parameters of `config.run` whose path matches `config.match`; optimizer and step stay fresh.

    Raises:
      UserError: the run cannot be read, or nothing of it fits.
    """
    source = load(config.run, config.step)
    theirs = {path: np.asarray(leaf) for path, leaf in named_leaves(source.params)}
    loaded, skipped, left = [], [], []

    def take(path: str, leaf: Any) -> Any:
        if not re.search(config.match, path) or path not in theirs:
            left.append(path)
            return leaf
        value = theirs[path]
        if value.shape != leaf.shape:
            skipped.append(f"{path} {value.shape} there, {leaf.shape} here")
            return leaf
        loaded.append(path)
        return put(value.astype(leaf.dtype), leaf)

    params, frozen = map_named(take, state.params), map_named(take, state.frozen)
    if not loaded:
        raise UserError(
            f"init_from: nothing of {config.run} fits {config.match!r}: it has {', '.join(sorted(theirs)[:12])}"
            + (f"; skipped {'; '.join(skipped)}" if skipped else "")
        )
    extra = dict(state.extra)
    if "ema" in extra:
        extra["ema"] = jax.tree.map(lambda p: jnp.copy(p).astype(jnp.float32), params)
    report = WarmStart(tuple(loaded), tuple(skipped), tuple(left))
    return dataclasses.replace(state, params=params, frozen=frozen, extra=extra), report
