"""The one step builder: (state, batch) -> (state, Sums), jitted, donated, pure; metrics accumulate on the device.

Recommendation, reward and policy updates all pass through here. What differs comes in as values: the objective, an
optax transformation, tables by a protocol (`lookup`, `apply`) and extras (EMA, running statistics) by (init, update).
"""

import contextlib
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
from jaxops.core.failures import UserError, nearest
from jaxops.core.mesh import batch_axes, batch_sharding, serialise_dispatch
from jaxops.core.sharding import Axes, Rule, axes_in, logical_axes, parameter_shardings
from jaxops.core.state import Params, State, join, select, split
from jaxops.core.sums import LOSS, Max, Sum, Sums, merge
from jaxops.core.turn import Program as Program
from jaxops.core.turn import Step as Step
from jaxops.core.turn import Turn
from jaxops.core.weights import cast_by_path


class Tables(Protocol):
    """What the core knows of embedding tables: rows come out before differentiation, row gradients go in after it.

    A batch for tables carries "plan", which is the tables' own and is not cut into microbatches.
    """

    def init(self, key: Array) -> PyTree: ...

    def lookup(self, tables: PyTree, batch: Batch) -> PyTree:
        """The rows that the whole batch reads, each once; what is differentiated."""
        ...

    def expand(self, rows: PyTree, batch: Batch) -> PyTree:
        """What an objective sees as `batch["rows"]`, of a microbatch."""
        ...

    def metrics(self, batch: Batch) -> Sums:
        """What a step says of its own exchanges: whether capacities were enough."""
        ...

    def apply(self, tables: PyTree, batch: Batch, row_grads: PyTree, keep: Bool[Array, ""]) -> PyTree:
        """Writes the touched rows; where `keep` is false (a skipped step) every row update is masked."""
        ...


def _unchanged(value: PyTree, *_: Any) -> PyTree:
    return value


@dataclasses.dataclass(frozen=True)
class Extra:
    """One entry of `State.extra`: `init(params)` and a pure `update(value, params, sums, updates, batch)`.

    `updates` is the number of updates before this one. Without `update` the value stays until somebody else changes
    it: a step of several programs its KL coefficient, say. `read(value, batch)` gives entries that the objective finds
    in its batch, as they were before the update: statistics of a group are no function of the parameters.
    """

    init: Callable[[Params], PyTree]
    update: Callable[[PyTree, Params, Sums, Array, Batch], PyTree] = _unchanged
    read: Callable[[PyTree, Batch], Mapping[str, Array]] | None = None


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Floating leaves in `dtype` (None: as they are)."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def specs_of(tree: PyTree) -> PyTree:
    """The PartitionSpecs that the types of traced arrays carry."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


class TrainStep:
    """An update as one jitted program; built by `build_step`.

    It is the whole step of supervised training, and with `advance_step=False` the inner update of a step of several
    programs: `state, window = update(state, minibatch, window)`.
    """

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
        self.update = update
        # Its collectives must not meet those of the next update: the loop waits only between steps.
        self._waits = serialise_dispatch(mesh) and not advance_step

        def train_step(state: State, batch: Batch, window: Sums) -> tuple[State, Sums]:
            new, sums = update(state, batch)
            if advance_step:
                new = dataclasses.replace(new, step=state.step + 1)
            return new, merge(window, sums)

        # The window is not donated: the loop waits on the sums of earlier steps.
        self._jitted = jax.jit(train_step, in_shardings=(None, batch_sharding(mesh), None), donate_argnums=0)
        self._empty: Callable[[], Sums] | None = None

    def empty_window(self, state: State, batch: Mapping[str, Any]) -> Sums:
        """The identity of `merge`, on the device."""
        if self._empty is None:
            shapes = jax.eval_shape(self.update, self._needed(state)[0], batch)[1]
            self._empty = jax.jit(lambda: zeros_like_sums(shapes), out_shardings=NamedSharding(self.mesh, P()))
        return self._empty()

    def __call__(
        self, state: State, batch: Mapping[str, Any], window: Sums | None = None, turn: Turn | None = None
    ) -> tuple[State, Sums]:
        if window is None:
            window = self.empty_window(state, batch)
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
        """The state as the program takes it, and the frozen leaves that it has no use for."""
        if self.reads is None:
            return state, {}
        read, unread = select(state.frozen, self.reads)
        return dataclasses.replace(state, frozen=read), unread

    def programs(self, state: PyTree, batch: PyTree) -> list[Program]:
        """The jitted pieces with their arguments: what FLOPs, plan, audit and warm-up read."""
        state, _ = self._needed(state)
        shapes = jax.eval_shape(self.update, state, batch)[1]
        window = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(self.mesh, P())), shapes
        )
        return [Program("train_step", self._jitted, (state, batch, window))]


def init_state(
    init: Callable[[Array], Params],
    key: Array,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: list[Rule],
    *,
    frozen: tuple[str, ...] = (),
    tables: Tables | None = None,
    extras: Mapping[str, Extra] | None = None,
    dtype: Any = jnp.float32,
    dtypes: Sequence[tuple[str, Any]] = (),
) -> State:
    """A fresh state on the mesh: parameters created in place by their sharding rules, the rest typed after them.

    Args:
      init: gives fresh parameters for a key.
      key: the key of all that is drawn.
      tx: the optimizer, whose state is made for the trained parameters.
      mesh: what everything lies on.
      rules: sharding rules.
      frozen: patterns of the paths of parameters that are held out of training.
      tables: embedding tables.
      extras: further entries of the state.
      dtype: of the parameters.
      dtypes: (pattern, dtype) of parameters that have another (adapters in float32 over a base in bfloat16).

    Raises:
      UserError: what `sharding.place` and `state.split` raise.
    """
    shapes = jax.eval_shape(init, key)
    where = parameter_shardings(shapes, rules, mesh)
    # Under jax.eval_shape the caller has set the mesh, and jax refuses to set it again.
    with contextlib.nullcontext() if isinstance(key, jax.core.Tracer) else jax.set_mesh(mesh):
        # Initialisers know nothing of shardings: they run with the axes auto, and come out typed by the rules.
        specs = jax.tree.map(lambda s: s.spec, where)
        made = jax.jit(jax.sharding.auto_axes(lambda k: cast_by_path(init(k), dtypes, dtype), out_sharding=specs))(key)
        params, held = split(made, frozen)

        def rest(params: Params) -> tuple[PyTree, dict[str, PyTree]]:
            with jax.numpy_dtype_promotion("standard"):
                return tx.init(params), {name: extra.init(params) for name, extra in (extras or {}).items()}

        opt_state, extra = jax.jit(rest)(params)
        rows = tables.init(jax.random.fold_in(key, 1)) if tables else {}
        step, updates = (jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, P())) for _ in range(2))
        # jit leaves what depends on no parameter (counters) on one device
        opt_state, extra = jax.tree.map(lambda x: _on_mesh(x, mesh), (opt_state, extra))
    return State(params, held, rows, opt_state, extra, step, updates)


def _on_mesh(x: Array, mesh: Mesh) -> Array:
    if jax.typeof(x).sharding.mesh == mesh.abstract_mesh:
        return x
    return jax.device_put(x, NamedSharding(mesh, P()))


def abstract_state(state: State) -> State:
    """The state's shapes, dtypes and shardings, without its arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


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
    """A training step for `objective(params, batch, key) -> Sums` on this mesh.

    Args:
      objective: pure; sees whole arrays (its axes are auto), parameters in `compute_dtype`, `key` the same for every
        microbatch of a step: per-example randomness folds in `batch["id"]`.
      tx: gets gradients in the parameters' dtype, already clipped, and the loop's step as the extra argument `step`
        (`optax.GradientTransformationExtraArgs`): schedules count steps, however many updates a step makes.
      rules: the sharding rules the state was made with; decide, with the mesh, where gradients are reduced.
      accumulation: microbatches per step; the batch's leading dimension is divided by it, never inside a `block`.
      clip: the largest global norm of the gradients of dense parameters, or one for each group of paths
        (`clipping.Clip`: `{"^policy/": 1.0, "^value/": 0.5}`).
      extras: what updates the entries of `state.extra`, by their names.
      replicated: whether all parameters are replicated, where the caller knows better than the rules.
      reads: patterns of the paths of frozen leaves that the objective reads (default: all). Other frozen leaves are no
        arguments of the program and stay where they are, whatever the update does: a reference model, say.
      advance_step: whether a call is a whole step of the loop. False for the inner update of a step that makes several:
        it advances `state.updates` and leaves `state.step` to that step.

    An update whose loss or gradient is not finite changes nothing but `step` and `updates`; whether the run goes on is
    the loop's to say (`check_finite`). The metrics are the objective's own and `grad_norm`, `grad_norm_max`,
    `grad_norm/GROUP` where `clip` has groups, `nonfinite` (a count of updates) and `nonfinite_first` (negated, the step
    of the loop, counted from zero).

    Raises:
      UserError: (when it is traced) `clip`, `extras` or the batch do not fit the state, the objective or each other.
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
    """Refuses entries of `state.extra` that nothing updates, and the other way round.

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
    """The batch with what extras give the objective to read."""
    for name, extra in extras.items():
        if extra.read is not None:
            read = jax.sharding.auto_axes(extra.read, out_sharding=P(batch_axes(mesh)))
            batch = {**batch, **read(values[name], batch)}
    return batch


def _finite(sums: Sums, norm: Float[Array, ""], row_grads: PyTree) -> Bool[Array, ""]:
    """Whether all gradients and all terms of the loss are."""
    finite = jnp.isfinite(norm) & jnp.isfinite(global_norm(row_grads))
    for name, entry in sums.items():
        if name.startswith(LOSS) and isinstance(entry, Sum):
            finite &= jnp.isfinite(entry.total)
    return finite


def _transformed(tx: optax.GradientTransformationExtraArgs, grads: PyTree, state: State) -> tuple[Params, PyTree]:
    """Parameters and optimizer state after the update; where they lie stays."""

    def transform(grads: PyTree, opt_state: PyTree, params: Params, step: Array) -> tuple[Params, PyTree]:
        with jax.numpy_dtype_promotion("standard"):  # optax trips strict promotion
            updates, opt_state = tx.update(grads, opt_state, params, step=step)
            return optax.apply_updates(params, updates), opt_state

    out = specs_of((state.params, state.opt_state))
    return jax.sharding.auto_axes(transform, out_sharding=out)(grads, state.opt_state, state.params, state.step)


def _remembered(
    extras: Mapping[str, Extra], state: State, params: Params, sums: Sums, batch: Batch
) -> dict[str, PyTree]:
    """The extras after the update that led to `params`."""
    return {
        name: jax.sharding.auto_axes(extras[name].update, out_sharding=specs_of(value))(
            value, params, sums, state.updates, batch
        )
        for name, value in state.extra.items()
    }


def _counted(finite: Bool[Array, ""], step: Array) -> Sums:
    """What an update says of itself where it was skipped: how many were, and (negated) the first one's loop step."""
    bad = jnp.where(finite, 0.0, 1.0).astype(jnp.float32)
    first = jnp.where(finite, -jnp.inf, -step.astype(jnp.float32))
    return {"nonfinite": Sum(bad, jnp.ones((), jnp.float32)), "nonfinite_first": Max(first)}
