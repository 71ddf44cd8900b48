"""State is a value: one pytree of plain dicts and arrays holds everything that a step reads and writes."""

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
    """The state of training: parameters, optimizer state and everything else that updates read and write.

    In supervised training `step` and `updates` are equal; a PPO step makes many updates. Schedules and checkpoints read
    `step`, and the random keys of an update are derived from `updates`.

    Attributes:
      params: the trained parameters.
      frozen: parameters that are held out of training; disjoint from `params`.
      tables: the state of embedding tables.
      opt_state: the optimizer's state for `params`.
      extra: further pytrees by name: a moving average of the parameters, a KL coefficient.
      step: the number of steps that the loop has finished (int32).
      updates: the number of updates that the optimizer has made, skipped ones included (int32).

    Example:
      state = jaxops.init_state(init, jax.random.key(0), optax.adam(1e-3), mesh, rules)  # a jaxops.State
      changed = dataclasses.replace(state, extra={**state.extra, "kl": jnp.float32(0.1)})
      print(int(state.step), jax.tree.map(jnp.shape, state.params))
    """

    params: Params
    frozen: Params
    tables: PyTree
    opt_state: PyTree
    extra: dict[str, PyTree]
    step: Int[Array, ""]
    updates: Int[Array, ""]


def split(params: Params, frozen: Sequence[str]) -> tuple[Params, Params]:
    """Splits parameters into (trainable, frozen): leaves whose path matches one of the patterns are frozen.

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
    """Splits parameters into (leaves whose path matches one of the patterns, all other leaves)."""
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
    """Joins two trees of parameters without a common leaf; the inverse of `split`."""
    out = dict(params)
    for key, value in frozen.items():
        out[key] = join(out[key], dict(value)) if key in out and isinstance(value, Mapping) else value
    return out


def without_updates(state: State) -> State:
    """Returns the tree of a checkpoint from before updates were counted apart from steps; it only serves to restore."""
    return dataclasses.replace(state, updates=None)  # type: ignore[arg-type]


def updates_from_step(state: State) -> State:
    """Completes a state restored from such a checkpoint: every step was one update, so `updates` is `step`."""
    return dataclasses.replace(state, updates=jnp.copy(state.step))
