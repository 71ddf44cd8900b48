"""The one step builder: (state, batch) -> (state, Sums), jitted, donated, pure; metrics accumulate on the device.

Recommendation, reward and policy updates all pass through here. What differs comes in as values: the objective, an
optax transformation, tables by a protocol (`lookup`, `apply`) and extras (EMA, running statistics) by (init, update).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, PyTree

from jaxops.core.accumulate import Batch, Objective, build_gradients, choose_reduction, zeros_like_sums
from jaxops.core.mesh import batch_axes, batch_sharding
from jaxops.core.sharding import Axes, Rule, axes_in, logical_axes, shardings
from jaxops.core.state import Params, State, join, split
from jaxops.core.sums import LOSS, Max, Sum, Sums, merge


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


@dataclasses.dataclass(frozen=True)
class Extra:
    """One entry of `State.extra`: `init(params)` and a pure `update(value, params, sums, step, batch)`.

    `read(value, batch)` gives entries that the objective finds in its batch, as they were before the update: statistics
    of a group are no function of the parameters.
    """

    init: Callable[[Params], PyTree]
    update: Callable[[PyTree, Params, Sums, Array, Batch], PyTree]
    read: Callable[[PyTree, Batch], Mapping[str, Array]] | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted piece of a step and the arguments (abstract or not) it is called with."""

    name: str
    fn: Any
    args: tuple[Any, ...]


class Step(Protocol):
    """What the loop drives. A step may be several programs with host work between them (PPO)."""

    def __call__(
        self, state: State, batch: Batch, window: Sums | None = None, poll: Callable[[], bool] | None = None
    ) -> tuple[State, Sums]:
        """The next state, and this step's sums merged into `window` (which is donated)."""
        ...

    def programs(self, state: PyTree, batch: PyTree) -> list[Program]: ...


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Floating leaves in `dtype` (None: as they are)."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """The Euclidean norm of all leaves together, in float32."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)), jnp.float32(0)))


def specs_of(tree: PyTree) -> PyTree:
    """The PartitionSpecs that the types of traced arrays carry."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


class TrainStep:
    """A supervised update as one jitted program; built by `build_step`."""

    def __init__(self, update: Callable[[State, Batch], tuple[State, Sums]], mesh: Mesh, reduction: tuple[str, str]):
        self.mesh = mesh
        self.reduction, self.reason = reduction
        self.update = update

        def train_step(state: State, batch: Batch, window: Sums) -> tuple[State, Sums]:
            state, sums = update(state, batch)
            return state, merge(window, sums)

        self._jitted = jax.jit(train_step, in_shardings=(None, batch_sharding(mesh), None), donate_argnums=(0, 2))
        self._empty: Callable[[], Sums] | None = None

    def empty_window(self, state: State, batch: Batch) -> Sums:
        """The identity of `merge`, on the device."""
        if self._empty is None:
            shapes = jax.eval_shape(self.update, state, batch)[1]
            self._empty = jax.jit(lambda: zeros_like_sums(shapes), out_shardings=NamedSharding(self.mesh, P()))
        return self._empty()

    def __call__(
        self, state: State, batch: Batch, window: Sums | None = None, poll: Callable[[], bool] | None = None
    ) -> tuple[State, Sums]:
        if window is None:
            window = self.empty_window(state, batch)
        return self._jitted(state, batch, window)

    def programs(self, state: PyTree, batch: PyTree) -> list[Program]:
        """The jitted pieces with their arguments: what FLOPs, plan, audit and warm-up read."""
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
) -> State:
    """A fresh state on the mesh: parameters created in place by their sharding rules, the rest typed after them.

    Raises:
      UserError: what `sharding.place` and `state.split` raise.
    """
    shapes = jax.eval_shape(init, key)
    where = shardings(shapes, rules, mesh)
    # Under jax.eval_shape the caller has set the mesh, and jax refuses to set it again.
    with contextlib.nullcontext() if isinstance(key, jax.core.Tracer) else jax.set_mesh(mesh):
        # Initialisers know nothing of shardings: they run with the axes auto, and come out typed by the rules.
        specs = jax.tree.map(lambda s: s.spec, where)
        made = jax.jit(jax.sharding.auto_axes(lambda k: cast(init(k), dtype), out_sharding=specs))(key)
        params, held = split(made, frozen)

        def rest(params: Params) -> tuple[PyTree, dict[str, PyTree]]:
            with jax.numpy_dtype_promotion("standard"):
                return tx.init(params), {name: extra.init(params) for name, extra in (extras or {}).items()}

        opt_state, extra = jax.jit(rest)(params)
        rows = tables.init(jax.random.fold_in(key, 1)) if tables else {}
        step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, P()))
        # jit leaves what depends on no parameter (counters) on one device
        opt_state, extra = jax.tree.map(lambda x: _on_mesh(x, mesh), (opt_state, extra))
    return State(params, held, rows, opt_state, extra, step)


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
    clip: float | None = None,
    compute_dtype: Any = None,
    tables: Tables | None = None,
    extras: Mapping[str, Extra] | None = None,
    logical: Mapping[str, Axes] | None = None,
    replicated: bool | None = None,
) -> TrainStep:
    """A training step for `objective(params, batch, key) -> Sums` on this mesh.

    Args:
      objective: pure; sees whole arrays (its axes are auto), parameters in `compute_dtype`, `key` the same for every
        microbatch of a step: per-example randomness folds in `batch["id"]`.
      tx: gets gradients in the parameters' dtype, already clipped to the global norm `clip`.
      rules: the sharding rules the state was made with; decide, with the mesh, where gradients are reduced.
      accumulation: microbatches per step; the batch's leading dimension is divided by it, never inside a `block`.
      replicated: whether all parameters are replicated, where the caller knows better than the rules.

    A step whose loss or gradient is not finite changes nothing but `step`; whether the run goes on is the loop's to
    say (`check_finite`). The metrics are the objective's own and `grad_norm`, `grad_norm_max`, `nonfinite` (a count)
    and `nonfinite_first`.
    """
    extras = extras or {}
    if replicated is None:
        replicated = all(mesh.shape.get(axis, 1) == 1 for _, axes in rules or () for axis in axes_in(axes))
    reduction = choose_reduction(
        dict(mesh.shape), replicated=replicated, accumulation=accumulation, tables=tables is not None
    )

    def joined(both: tuple[Params, Params], batch: Batch, key: Array | None) -> Sums:
        if tables:
            batch = {**batch, "rows": cast(tables.expand(batch["rows"], batch), compute_dtype)}
        with logical_axes(logical or {}):
            return objective(cast(join(*both), compute_dtype), batch, key)

    gradients = build_gradients(
        joined, mesh, accumulation=accumulation, block=block, weights=loss_weights, reduction=reduction[0]
    )

    def update(state: State, batch: Batch) -> tuple[State, Sums]:
        batch = jax.tree.map(lambda x: jax.sharding.reshard(x, P(batch_axes(mesh))), batch)
        batch = _with_extras(batch, state.extra, extras, mesh)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        rows = tables.lookup(state.tables, batch) if tables else None
        examples = {name: x for name, x in batch.items() if name != "plan"}
        sums, grads, row_grads = gradients(state.params, state.frozen, rows, examples, key)
        grads, norm = _clipped(grads, clip)
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
            state.step + 1,
        )
        sums = {**sums, "grad_norm": Sum.of(norm), "grad_norm_max": Max(norm)}
        sums = keep(sums, zeros_like_sums(sums)) | _counted(finite, state.step)
        return new, sums | (tables.metrics(batch) if tables else {})

    return TrainStep(update, mesh, reduction)


def _with_extras(batch: Batch, values: Mapping[str, PyTree], extras: Mapping[str, Extra], mesh: Mesh) -> Batch:
    """The batch with what extras give the objective to read."""
    for name, extra in extras.items():
        if extra.read is not None:
            read = jax.sharding.auto_axes(extra.read, out_sharding=P(batch_axes(mesh)))
            batch = {**batch, **read(values[name], batch)}
    return batch


def _clipped(grads: PyTree, clip: float | None) -> tuple[PyTree, Float[Array, ""]]:
    """Gradients of a global norm of `clip` at the most, and the norm that they had."""
    norm = global_norm(grads)
    if clip is None:
        return grads, norm
    scale = clip / jnp.maximum(norm, clip)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), norm


def _finite(sums: Sums, norm: Float[Array, ""], row_grads: PyTree) -> Bool[Array, ""]:
    """Whether all gradients and all terms of the loss are."""
    finite = jnp.isfinite(norm) & jnp.isfinite(global_norm(row_grads))
    for name, entry in sums.items():
        if name.startswith(LOSS) and isinstance(entry, Sum):
            finite &= jnp.isfinite(entry.total)
    return finite


def _transformed(tx: optax.GradientTransformation, grads: PyTree, state: State) -> tuple[Params, PyTree]:
    """Parameters and optimizer state after the update; where they lie stays."""

    def transform(grads: PyTree, opt_state: PyTree, params: Params) -> tuple[Params, PyTree]:
        with jax.numpy_dtype_promotion("standard"):  # optax trips strict promotion
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

    out = specs_of((state.params, state.opt_state))
    return jax.sharding.auto_axes(transform, out_sharding=out)(grads, state.opt_state, state.params)


def _remembered(
    extras: Mapping[str, Extra], state: State, params: Params, sums: Sums, batch: Batch
) -> dict[str, PyTree]:
    """The extras after the update that led to `params`."""
    return {
        name: jax.sharding.auto_axes(extras[name].update, out_sharding=specs_of(value))(
            value, params, sums, state.step, batch
        )
        for name, value in state.extra.items()
    }


def _counted(finite: Bool[Array, ""], step: Array) -> Sums:
    """What a step says of itself where it was skipped: how many were, and (negated) the first."""
    bad = jnp.where(finite, 0.0, 1.0).astype(jnp.float32)
    first = jnp.where(finite, -jnp.inf, -step.astype(jnp.float32))
    return {"nonfinite": Sum(bad, jnp.ones((), jnp.float32)), "nonfinite_first": Max(first)}
