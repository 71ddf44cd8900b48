"""The one step builder: a step is a pure jitted function (state, batch) -> (state, Sums) that donates its state.

Recommendation, reward and policy updates use it. Objective, optax transformation, tables and extras (EMA, running
statistics) are passed in as values. Metrics accumulate on the device between two boundaries of the loop.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, PyTree

from jaxops.core.accumulate import Batch, Objective, build_gradients, choose_reduction, zeros_like_sums
from jaxops.core.clipping import Clip, clip_gradients
from jaxops.core.clipping import global_norm as global_norm
from jaxops.core.compiles import compile_together
from jaxops.core.failures import UserError, nearest
from jaxops.core.mesh import batch_axes, batch_sharding, serialise_dispatch
from jaxops.core.sharding import Axes, Rule, axes_in, logical_axes
from jaxops.core.state import Params, State, join, select
from jaxops.core.sums import LOSS, Max, Sum, Sums, merge
from jaxops.core.turn import Program as Program
from jaxops.core.turn import Step as Step
from jaxops.core.turn import Turn


class Tables(Protocol):
    """The protocol of embedding tables: rows are looked up before differentiation, row gradients are applied after it.

    A batch for tables has an entry "plan", which only the tables read and which is not divided into microbatches.
    """

    def init(self, key: Array) -> PyTree: ...

    def lookup(self, tables: PyTree, batch: Batch) -> PyTree:
        """Returns the rows that the whole batch reads, each once; gradients are taken with respect to them."""
        ...

    def expand(self, rows: PyTree, batch: Batch) -> PyTree:
        """Returns the rows of a microbatch as the objective sees them in `batch["rows"]`."""
        ...

    def metrics(self, batch: Batch) -> Sums:
        """Returns metrics of the exchange between devices, for example whether capacities were sufficient."""
        ...

    def apply(self, tables: PyTree, batch: Batch, row_grads: PyTree, keep: Bool[Array, ""]) -> PyTree:
        """Returns the tables with the touched rows updated.

        Args:
          tables: the state of the tables.
          batch: the whole batch, with its plan.
          row_grads: gradients with respect to the rows of `lookup`.
          keep: false in a skipped step, where every row update is masked.
        """
        ...


def _unchanged(value: PyTree, *_: Any) -> PyTree:
    return value


@dataclasses.dataclass(frozen=True)
class Extra:
    """One entry of `State.extra`: `init(params)` creates it, a pure `update` returns its next value.

    `updates` counts the updates before this one. Without `update` the value stays until other code changes it (a KL
    coefficient). `read(value, batch)` returns entries for the objective's batch; no gradient flows through them.
    """

    init: Callable[[Params], PyTree]
    update: Callable[[PyTree, Params, Sums, Array, Batch], PyTree] = _unchanged
    read: Callable[[PyTree, Batch], Mapping[str, Array]] | None = None


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Casts the floating leaves to `dtype`; None leaves them as they are."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def specs_of(tree: PyTree) -> PyTree:
    """Returns the PartitionSpecs that the types of traced arrays carry."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


class TrainStep:
    """An update as one jitted program, made by `build_step`: `state, window = update(state, batch, window)`."""

    def __init__(
        self,
        update: Callable[[State, Batch], tuple[State, Sums]],
        mesh: Mesh,
        reduction: tuple[str, str],
        *,
        advance_step: bool = True,
        reads: Sequence[str] | None = None,
    ):
        self.mesh, self.reads = mesh, reads
        self.reduction, self.reason = reduction
        # Jitted, so that the shapes of its sums and the whole program share one trace of the objective.
        self.update = jax.jit(update, inline=True)
        # Collectives of two updates must not overlap on such a mesh, and the loop waits only between steps.
        self._waits = serialise_dispatch(mesh) and not advance_step

        def train_step(state: State, batch: Batch, window: Sums) -> tuple[State, Sums]:
            new, sums = self.update(state, batch)
            if advance_step:
                new = dataclasses.replace(new, step=state.step + 1)
            return new, merge(window, sums)

        # The window is not donated: the loop waits on the sums of earlier steps.
        self._jitted = jax.jit(train_step, in_shardings=(None, batch_sharding(mesh), None), donate_argnums=0)
        self._empty: Callable[[], Sums] | None = None
        self._begun = False

    def empty_window(self, state: State, batch: Mapping[str, Any]) -> Sums:
        """Returns the sums of no update (the identity of `merge`), on the device."""
        if self._empty is None:
            shapes = jax.eval_shape(self.update, self._needed(state)[0], batch)[1]
            self._empty = jax.jit(lambda: zeros_like_sums(shapes), out_shardings=NamedSharding(self.mesh, P()))
        return self._empty()

    def __call__(
        self, state: State, batch: Mapping[str, Any], window: Sums | None = None, turn: Turn | None = None
    ) -> tuple[State, Sums]:
        if window is None:
            window = self.empty_window(state, batch)
        if not self._begun:
            self._begun = True
            compile_together(self._jitted, self.mesh, self._needed(state)[0], batch, window)
        if self.reads is None:
            out: tuple[State, Sums] = self._jitted(state, batch, window)
        else:
            needed, unread = self._needed(state)
            new, sums = self._jitted(needed, batch, window)
            out = dataclasses.replace(new, frozen=join(new.frozen, unread)), sums
        if self._waits:
            jax.block_until_ready(out[1])
        return out

    def _needed(self, state: State) -> tuple[State, Params]:
        """Returns the state that the program takes, and the frozen leaves that it does not read."""
        if self.reads is None:
            return state, {}
        read, unread = select(state.frozen, self.reads)
        return dataclasses.replace(state, frozen=read), unread

    def programs(self, state: PyTree, batch: PyTree) -> list[Program]:
        """Returns the jitted program with its arguments, for FLOPs, plan, audit and warm-up."""
        state, _ = self._needed(state)
        shapes = jax.eval_shape(self.update, state, batch)[1]
        window = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(self.mesh, P())), shapes
        )
        return [Program("train_step", self._jitted, (state, batch, window))]


def build_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int = 0,
    rules: list[Rule] | None = None,
    accumulation: int = 1,
    block: int = 1,
    loss_weights: Mapping[str, float] | None = None,
    clip: Clip = None,
    compute_dtype: Any = None,
    tables: Tables | None = None,
    extras: Mapping[str, Extra] | None = None,
    logical: Mapping[str, Axes] | None = None,
    replicated: bool | None = None,
    reads: Sequence[str] | None = None,
    advance_step: bool = True,
) -> TrainStep:
    """Builds a training step for `objective(params, batch, key) -> Sums` on this mesh.

    Args:
      objective: a pure function. It sees whole arrays (its axes are auto) and parameters in `compute_dtype`. `key` is
        the same for every microbatch, so per-example randomness folds in `batch["id"]`.
      tx: the optimizer. It gets clipped gradients in the parameters' dtype, and the loop's step as the extra argument
        `step` (`optax.GradientTransformationExtraArgs`): schedules count steps, however many updates a step makes.
      mesh: the mesh of the state and the batch.
      seed: the seed of `key`, which also folds in `state.updates`.
      rules: the sharding rules of the state; with the mesh they decide where gradients are reduced.
      accumulation: the number of microbatches that the leading dimension of the batch is divided into.
      block: the number of neighbouring examples that no microbatch splits.
      loss_weights: the weight of each loss term (default 1).
      clip: the largest global norm of the dense gradients, or one for each group of paths (`clipping.Clip`).
      compute_dtype: the floating dtype of parameters and rows inside the objective; None keeps theirs.
      tables: embedding tables.
      extras: the entries of `state.extra`, by name.
      logical: mesh axes of the logical names in `constrain`, over the defaults.
      replicated: whether all parameters are replicated, where the caller knows better than the rules.
      reads: path patterns of the frozen leaves that the objective reads (default: all); the program gets no others.
      advance_step: False makes the inner update of a step with several: it leaves `state.step` to that step.

    An update whose loss or gradient is not finite changes `step` and `updates` only; the loop decides whether the run
    goes on (`check_finite`). The metrics are the objective's own, `grad_norm`, `grad_norm_max`, `grad_norm/GROUP` where
    `clip` has groups, `nonfinite` (skipped updates) and `nonfinite_first` (minus the loop's step, counted from zero).

    Raises:
      UserError: (while tracing) `clip`, `extras` or the batch do not fit the state, the objective or each other.

    Example:
      step = jaxops.build_step(objective, optax.adam(1e-3), mesh, accumulation=2)
      state, sums = step(state, batch)  # inside jax.set_mesh(mesh); `state` is donated
    """
    extras = extras or {}
    tx = optax.with_extra_args_support(tx)
    if replicated is None:
        replicated = all(mesh.shape.get(axis, 1) == 1 for _, axes in rules or () for axis in axes_in(axes))
    reduction = choose_reduction(
        dict(mesh.shape), replicated=replicated, accumulation=accumulation, tables=tables is not None
    )

    def joined(both: tuple[Params, Params], batch: Batch, key: Array | None) -> Sums:
        if tables:
            batch = {**batch, "rows": cast(tables.expand(batch["rows"], batch), compute_dtype)}
        with logical_axes(logical or {}):
            try:
                return objective(cast(join(*both), compute_dtype), batch, key)
            except KeyError as error:
                if reads is not None:
                    error.add_note(f"the objective gets those frozen leaves alone that match reads={list(reads)}")
                raise

    gradients = build_gradients(
        joined, mesh, accumulation=accumulation, block=block, weights=loss_weights, reduction=reduction[0]
    )

    def update(state: State, batch: Batch) -> tuple[State, Sums]:
        batch = jax.tree.map(lambda x: jax.sharding.reshard(x, P(batch_axes(mesh))), batch)
        _check_extras(state.extra, extras)
        batch = _with_extras(batch, state.extra, extras, mesh)
        key = jax.random.fold_in(jax.random.key(seed), state.updates)
        rows = tables.lookup(state.tables, batch) if tables else None
        examples = {name: x for name, x in batch.items() if name != "plan"}
        sums, grads, row_grads = gradients(state.params, state.frozen, rows, examples, key)
        grads, norm, norms = clip_gradients(grads, clip)
        finite = _finite(sums, norm, row_grads)

        def keep(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        params, opt_state = _transformed(tx, grads, state)
        new = State(
            keep(params, state.params),
            state.frozen,
            tables.apply(state.tables, batch, row_grads, finite) if tables else state.tables,
            keep(opt_state, state.opt_state),
            keep(_remembered(extras, state, params, sums, batch), state.extra),
            state.step,
            state.updates + 1,
        )
        sums = {**sums, **norms}
        sums = keep(sums, zeros_like_sums(sums)) | _counted(finite, state.step)
        return new, sums | (tables.metrics(batch) if tables else {})

    return TrainStep(update, mesh, reduction, advance_step=advance_step, reads=reads)


def _check_extras(values: Mapping[str, PyTree], extras: Mapping[str, Extra]) -> None:
    """Refuses entries of `state.extra` that are not among the extras, and extras without an entry.

    Raises:
      UserError: the names differ.
    """
    for name in values:
        if name not in extras:
            raise UserError(
                f"state.extra[{name!r}] is not among build_step(extras=...) (there: {', '.join(extras) or 'none'})"
                f"{nearest(name, extras)}; an entry that only a step of your own changes is registered as Extra(init)"
            )
    for name in extras:
        if name not in values:
            raise UserError(
                f"extras[{name!r}] is not in state.extra (there: {', '.join(values) or 'none'}){nearest(name, values)};"
                " init_state takes the same extras as build_step"
            )


def _with_extras(batch: Batch, values: Mapping[str, PyTree], extras: Mapping[str, Extra], mesh: Mesh) -> Batch:
    """Returns the batch with the entries that extras add to it."""
    for name, extra in extras.items():
        if extra.read is not None:
            read = jax.sharding.auto_axes(extra.read, out_sharding=P(batch_axes(mesh)))
            batch = {**batch, **read(values[name], batch)}
    return batch


def _finite(sums: Sums, norm: Float[Array, ""], row_grads: PyTree) -> Bool[Array, ""]:
    """Returns whether all gradients and all loss terms are finite."""
    finite = jnp.isfinite(norm) & jnp.isfinite(global_norm(row_grads))
    for name, entry in sums.items():
        if name.startswith(LOSS) and isinstance(entry, Sum):
            finite &= jnp.isfinite(entry.total)
    return finite


def _transformed(tx: optax.GradientTransformationExtraArgs, grads: PyTree, state: State) -> tuple[Params, PyTree]:
    """Returns parameters and optimizer state after the update, in the shardings that they had."""

    def transform(grads: PyTree, opt_state: PyTree, params: Params, step: Array) -> tuple[Params, PyTree]:
        with jax.numpy_dtype_promotion("standard"):  # optax trips strict promotion
            updates, opt_state = tx.update(grads, opt_state, params, step=step)
            return optax.apply_updates(params, updates), opt_state

    out = specs_of((state.params, state.opt_state))
    return jax.sharding.auto_axes(transform, out_sharding=out)(grads, state.opt_state, state.params, state.step)


def _remembered(
    extras: Mapping[str, Extra], state: State, params: Params, sums: Sums, batch: Batch
) -> dict[str, PyTree]:
    """Returns the extras after the update that led to `params`."""
    return {
        name: jax.sharding.auto_axes(extras[name].update, out_sharding=specs_of(value))(
            value, params, sums, state.updates, batch
        )
        for name, value in state.extra.items()
    }


def _counted(finite: Bool[Array, ""], step: Array) -> Sums:
    """Returns the metrics of skipped updates: their number, and minus the loop's step of the first one."""
    bad = jnp.where(finite, 0.0, 1.0).astype(jnp.float32)
    first = jnp.where(finite, -jnp.inf, -step.astype(jnp.float32))
    return {"nonfinite": Sum(bad, jnp.ones((), jnp.float32)), "nonfinite_first": Max(first)}
