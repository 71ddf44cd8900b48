"""Optimizers and schedules from the config, as optax chains; path patterns decide on decay and learning rates.

Clipping is not in the chain: the core clips by global norms of the dense trainables (core/clipping.py).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxops.core.accumulate import Batch
from jaxops.core.failures import UserError
from jaxops.core.sharding import map_named, named_leaves
from jaxops.core.state import Params
from jaxops.core.step import Extra
from jaxops.core.sums import Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """A constant learning rate after a linear warm-up of `warmup` steps."""

    kind: Literal["constant"] = "constant"
    warmup: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearDecay:
    """Linear warm-up, then linear decay; it would reach `end` times the learning rate one step after the last step."""

    kind: Literal["linear"] = "linear"
    warmup: int = 0
    end: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear warm-up, then a half cosine to `end` times the learning rate (Loshchilov & Hutter 2017)."""

    kind: Literal["warmup_cosine"] = "warmup_cosine"
    warmup: int = 0
    end: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wsd:
    """Warm-up, stable, decay: constant, then linear to `end` times the rate over the last `decay` share of the steps.

    Hu et al. 2024, "MiniCPM".
    """

    kind: Literal["wsd"] = "wsd"
    warmup: int = 0
    decay: float = 0.1
    end: float = 0.0


Schedule = Constant | LinearDecay | WarmupCosine | Wsd


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """The settings that all optimizers share; patterns are regular expressions, searched in parameter paths.

    Attributes:
      lr: the learning rate after warm-up.
      schedule: its course over the run.
      clip: the largest global norm of the gradients, or one for each group of paths:
        `{"^policy/": 1.0, "^value/": 0.5, default: 1.0}`. `default` is for paths that no pattern matches; without it
        those are not clipped. None clips nothing.
      weight_decay: the rate of decoupled weight decay.
      no_decay: patterns of parameters without weight decay.
      lr_multipliers: factors of the learning rate by pattern; those of all patterns that match are multiplied.
      frozen: patterns of parameters that are not trained.
      ema: the decay of an exponential moving average of the parameters, which evaluation then uses; None for none.
    """

    lr: float = 1e-3
    schedule: Schedule = Constant()
    clip: float | Mapping[str, float] | None = 1.0
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = (r"bias$", r"scale$")
    lr_multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    ema: float | None = None

    def problems(self) -> list[tuple[str, str]]:
        """Returns what is wrong with the values for any model, as (dotted path, message)."""
        found = []
        if self.lr <= 0:
            found.append(("lr", "expected a positive learning rate"))
        if isinstance(self.clip, Mapping):
            if not self.clip:
                found.append(("clip", "expected a norm, norms by pattern, or null for none; got an empty mapping"))
            for pattern, norm in self.clip.items():
                if norm <= 0:
                    found.append((f"clip.{pattern}", f"expected a positive norm, got {norm}"))
        elif self.clip is not None and self.clip <= 0:
            found.append(("clip", "expected a positive norm, or null for none"))
        if self.weight_decay < 0:
            found.append(("weight_decay", "expected zero or more"))
        if self.ema is not None and not 0 < self.ema < 1:
            found.append(("ema", "expected a decay in (0, 1), or null for none"))
        if self.schedule.warmup < 0:
            found.append(("schedule.warmup", "expected zero or more steps"))
        if isinstance(self.schedule, Wsd) and not 0 < self.schedule.decay <= 1:
            found.append(("schedule.decay", "expected a share of the steps in (0, 1]"))
        norms = tuple(self.clip) if isinstance(self.clip, Mapping) else ()
        named = {"no_decay": self.no_decay, "frozen": self.frozen, "lr_multipliers": self.lr_multipliers, "clip": norms}
        for name, patterns in named.items():
            found += [(name, problem) for problem in map(_no_pattern, patterns) if problem]
        return found


def _no_pattern(pattern: str) -> str | None:
    """Returns why this is no regular expression; None where it is one."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern!r} is not a regular expression: {error}"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Common):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Common):
    """Adafactor: factored second moments (Shazeer & Stern 2018)."""

    kind: Literal["adafactor"] = "adafactor"
    min_factored: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Common):
    """Lion: updates by the sign of an interpolated momentum (Chen et al. 2023)."""

    kind: Literal["lion"] = "lion"
    b1: float = 0.9
    b2: float = 0.99


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd(Common):
    """Stochastic gradient descent, with momentum where `momentum` is not zero."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = 0.0
    nesterov: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Common):
    """Muon for matrices (orthogonalised momentum; Jordan et al. 2024), AdamW for the rest and for `adam` paths.

    Attributes:
      momentum: the momentum of Muon.
      adam: patterns of matrices that AdamW trains.
      stacked: patterns of parameters whose first dimension counts layers that are stacked for a scan. For these, rank 3
        is a matrix for each layer and rank 2 a vector; for all others rank 2 is a matrix. The default matches
        `layers/up/kernel` and not `layers/0/kernel`.
      adam_lr: the learning rate of AdamW; None takes `lr`.
      b1: the first decay rate of AdamW.
      b2: the second decay rate of AdamW.
    """

    kind: Literal["muon"] = "muon"
    momentum: float = 0.95
    adam: tuple[str, ...] = ("embedding",)
    stacked: tuple[str, ...] = (r"(^|/)layers/(?!\d+(/|$))",)
    adam_lr: float | None = None
    b1: float = 0.9
    b2: float = 0.999

    def problems(self) -> list[tuple[str, str]]:
        """Returns what is wrong with the values for any model, as (dotted path, message)."""
        return super().problems() + [
            (name, problem)
            for name, patterns in (("adam", self.adam), ("stacked", self.stacked))
            for problem in map(_no_pattern, patterns)
            if problem
        ]


Optimizer = AdamW | Adafactor | Lion | Sgd | Muon


def build_schedule(config: Common, steps: int) -> Callable[[Array], Array]:
    """Builds the function from step to learning rate for a run of `steps` steps.

    Raises:
      UserError: the warm-up is longer than the run.
    """
    plan, lr = config.schedule, config.lr
    if plan.warmup > steps:
        raise UserError(
            f"optimizer.schedule.warmup: {plan.warmup} steps, but the run has {steps}: set it to at most {steps}, or"
            " train for longer (run.epochs, run.steps), or in smaller batches (batch.global)"
        )
    body = max(steps - plan.warmup, 1)
    after: Callable[[Array], Array]
    if isinstance(plan, Constant):
        after = optax.constant_schedule(lr)
    elif isinstance(plan, LinearDecay):
        after = optax.linear_schedule(lr, lr * plan.end, body)
    elif isinstance(plan, WarmupCosine):
        after = optax.cosine_decay_schedule(lr, body, plan.end)
    else:
        fall = min(max(round(steps * plan.decay), 1), body)
        after = optax.linear_schedule(lr, lr * plan.end, fall, transition_begin=body - fall)
    if not plan.warmup:
        return after
    # The rate is (step + 1) / warmup: the first update already moves, and the warmup-th has the full rate.
    rise = optax.linear_schedule(lr / plan.warmup, lr, max(plan.warmup - 1, 1))
    return optax.join_schedules([rise, after], [plan.warmup])


def _matches(patterns: tuple[str, ...], path: str) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)


def build_optimizer(config: Optimizer, steps: int) -> optax.GradientTransformation:
    """Builds the optax chain of the config: update rule, decoupled weight decay, learning rate, per-path multipliers.

    The learning rate is that of the loop's step where `update` gets one (`step=`), as it does from `build_step`.

    Raises:
      UserError: the warm-up is longer than the run, or (at `init`) a multiplier's pattern matches no parameter.
    """
    schedule = build_schedule(config, steps)

    def decayed(params: PyTree) -> PyTree:
        return map_named(lambda path, _: not _matches(config.no_decay, path), params)

    parts: list[optax.GradientTransformation] = []
    if isinstance(config, AdamW):
        parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    elif isinstance(config, Adafactor):
        parts += [optax.scale_by_factored_rms(min_dim_size_to_factor=config.min_factored), optax.clip_by_block_rms(1.0)]
    elif isinstance(config, Lion):
        parts.append(optax.scale_by_lion(config.b1, config.b2))
    elif isinstance(config, Sgd):
        if config.momentum:
            parts.append(optax.trace(config.momentum, config.nesterov))
    else:
        parts.append(_muon(config))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, decayed))
    if isinstance(config, Muon) and config.adam_lr is not None:
        parts.append(_scale_adam(config, config.adam_lr / config.lr))  # after the decay, which then uses adam_lr too
    parts.append(_scale_by_schedule(schedule))
    if config.lr_multipliers:
        parts.append(_multiply(dict(config.lr_multipliers)))
    return optax.chain(*parts)


def _scale_by_schedule(schedule: Callable[[Array], Array]) -> optax.GradientTransformationExtraArgs:
    """Scales by the learning rate of the loop's step, which `build_step` passes as the extra argument `step`.

    It is `optax.scale_by_learning_rate` otherwise, with the same state. A step that makes several updates makes all of
    them at one rate, and a skipped update shifts no schedule. Without `step` it counts updates, as optax does.
    """

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: optax.ScaleByScheduleState, params: PyTree = None, *, step: Any = None, **extra: Any
    ) -> tuple[PyTree, optax.ScaleByScheduleState]:
        del params, extra
        count = state.count if step is None else step
        rate = -1 * schedule(count)
        scaled = jax.tree.map(lambda u: jnp.array(rate, dtype=u.dtype) * u, updates)
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(count))

    return optax.GradientTransformationExtraArgs(init, update)


def _is_matrix(config: Muon, path: str, x: Array) -> bool:
    """Returns whether Muon trains a parameter: a matrix, or a stack of matrices, whose path `adam` does not match."""
    return x.ndim == (3 if _matches(config.stacked, path) else 2) and not _matches(config.adam, path)


def _muon(config: Muon) -> optax.GradientTransformation:
    """Builds Muon's updates of matrices, times sqrt(max(1, fan out / fan in)) as published, and Adam's of the rest.

    In a stack each matrix is orthogonalised and scaled on its own: optax treats the axes that are not named as a batch.
    """

    def label(params: PyTree) -> PyTree:
        return map_named(lambda path, x: "muon" if _is_matrix(config, path, x) else "adam", params)

    def matrices(updates: PyTree) -> PyTree:  # optax 0.2.8 fails without this: its default of None is no tree
        return jax.tree.map(lambda u: optax.contrib.MuonDimensionNumbers(u.ndim - 2, u.ndim - 1), updates)

    def scaled(updates: PyTree, params: PyTree) -> PyTree:
        del params
        return jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=matrices),
        optax.stateless(scaled),
    )
    return optax.partition({"muon": muon, "adam": optax.scale_by_adam(config.b1, config.b2)}, label)


def _scale_adam(config: Muon, ratio: float) -> optax.GradientTransformation:
    """Scales the updates of the parameters that Adam trains under Muon."""

    def scaled(updates: PyTree, params: PyTree) -> PyTree:
        del params
        return map_named(lambda path, u: u if _is_matrix(config, path, u) else u * ratio, updates)

    return optax.stateless(scaled)


def _multiply(multipliers: dict[str, float]) -> optax.GradientTransformation:
    """Scales each update by the product of the multipliers whose pattern its path matches."""

    def factor(path: str) -> float:
        product = 1.0
        for pattern, value in multipliers.items():
            product *= value if re.search(pattern, path) else 1.0
        return product

    def init(params: PyTree) -> optax.EmptyState:
        names = [name for name, _ in named_leaves(params)]
        for pattern in multipliers:
            if not any(re.search(pattern, name) for name in names):
                raise UserError(
                    f"optimizer.lr_multipliers: {pattern!r} matches no parameter"
                    f" (there are: {', '.join(names[:12])}, ...)"
                )
        return optax.EmptyState()

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree = None) -> tuple[PyTree, optax.EmptyState]:
        del params
        return map_named(lambda path, u: u * jnp.asarray(factor(path), u.dtype), updates), state

    return optax.GradientTransformation(init, update)


def ema(decay: float) -> Extra:
    """Builds an exponential moving average of the parameters, in float32: a bfloat16 average would not move.

    Its decay at update t is min(decay, (1 + t) / (10 + t)), so that early averages follow the parameters.
    """

    def wide(params: Params) -> Params:
        return jax.tree.map(lambda p: jnp.copy(p).astype(jnp.float32), params)

    def update(average: Params, params: Params, sums: Sums, updates: Array, batch: Batch) -> Params:
        del sums, batch
        t = updates.astype(jnp.float32)
        rate = jnp.minimum(decay, (1 + t) / (10 + t))
        return jax.tree.map(lambda a, p: a + (1 - rate) * (p.astype(jnp.float32) - a), average, params)

    return Extra(init=wide, update=update)
