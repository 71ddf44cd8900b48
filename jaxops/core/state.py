"""State is a value: everything a step reads and writes, as one pytree of plain dicts and arrays."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from jaxops.core.failures import UserError
from jaxops.core.sharding import named_leaves

Params = dict[str, Any]
"""Nested dicts with arrays at the leaves."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What is trained and what training remembers.

    `step` counts steps of the loop, `updates` those of the optimizer (both int32). In supervised training they are the
    same; a step of PPO makes many updates. Schedules and checkpoints read `step`, keys of an update read `updates`.
    """

    params: Params
    frozen: Params
    tables: PyTree
    opt_state: PyTree
    extra: dict[str, PyTree]
    step: Int[Array, ""]
    updates: Int[Array, ""]


def split(params: Params, frozen: Sequence[str]) -> tuple[Params, Params]:
    """(trainable, frozen): leaves whose path matches one of the patterns go to the second.

    Raises:
      UserError: a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in named_leaves(params)]
    for pattern in frozen:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(
                f"optimizer.frozen: {pattern!r} matches no parameter (there are: {', '.join(names[:12])}, ...)"
            )
    held = {name for name in names if any(re.search(pattern, name) for pattern in frozen)}
    if len(held) == len(names):
        raise UserError(f"optimizer.frozen: {list(frozen)} leaves nothing to train")
    return _pick(params, lambda name: name not in held), _pick(params, lambda name: name in held)


def select(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """(leaves whose path matches one of the patterns, the rest)."""
    matches = functools.cache(lambda name: any(re.search(pattern, name) for pattern in patterns))
    return _pick(params, matches), _pick(params, lambda name: not matches(name))


def _pick(tree: Params, keep: Callable[[str], bool], prefix: str = "") -> Params:
    out: Params = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            inner = _pick(dict(value), keep, path + "/")
            if inner:
                out[key] = inner
        elif keep(path):
            out[key] = value
    return out


def join(params: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    out = dict(params)
    for key, value in frozen.items():
        out[key] = join(out[key], dict(value)) if key in out and isinstance(value, Mapping) else value
    return out


def without_updates(state: State) -> State:
    """The state as checkpoints held it before updates were counted apart from steps: nothing but a tree to restore."""
    return dataclasses.replace(state, updates=None)  # type: ignore[arg-type]


def updates_from_step(state: State) -> State:
    """The state restored from such a checkpoint: every step had been one update."""
    return dataclasses.replace(state, updates=jnp.copy(state.step))
