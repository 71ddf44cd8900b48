"""Evaluation on the mesh: batches have a fixed size, sums merge on the device, and one fetch ends it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxops.core.accumulate import zeros_like_sums
from jaxops.core.compiles import compile_together
from jaxops.core.interrupt import Interrupted as Interrupted
from jaxops.core.mesh import batch_axes, batch_sharding, serialise_dispatch
from jaxops.core.sharding import Axes, logical_axes
from jaxops.core.state import Params, State, join
from jaxops.core.step import Tables, cast
from jaxops.core.sums import Sums, finalize, merge

Batch = Mapping[str, Any]
Metrics = Callable[[PyTree, Batch], Sums]


def on_batches(
    function: Callable[[Params, Batch], Any],
    mesh: Mesh,
    out: P,
    compute_dtype: Any = None,
    logical: Mapping[str, Axes] | None = None,
    tables: Tables | None = None,
) -> Callable[[Params, PyTree, Batch], Any]:
    """Wraps `function(params, batch)` to run on the mesh, as (params, tables' state, batch) -> results.

    Args:
      function: any pure function; it sees whole arrays (its axes are auto).
      mesh: the mesh of parameters and batches.
      out: the sharding of its results.
      compute_dtype: the floating dtype of parameters and looked-up rows inside; None keeps theirs.
      logical: mesh axes of the logical names in `constrain`, over the defaults.
      tables: embedding tables; their rows are in `batch["rows"]`.
    """

    def whole(params: Params, rows: PyTree, batch: Batch) -> Any:
        if tables:
            batch = {**batch, "rows": cast(tables.expand(rows, dict(batch)), compute_dtype)}
        with logical_axes(logical or {}):
            return function(cast(params, compute_dtype), batch)

    run = jax.sharding.auto_axes(whole, out_sharding=out)

    def placed(params: Params, state: PyTree, batch: Batch) -> Any:
        batch = jax.tree.map(lambda x: jax.sharding.reshard(x, P(batch_axes(mesh))), dict(batch))
        rows = tables.lookup(state, dict(batch)) if tables else None
        return run(params, rows, {name: x for name, x in batch.items() if name != "plan"})

    return placed


class Evaluator:
    """Evaluates `metrics(params, batch) -> Sums` over batches whose examples are sharded over the mesh's batch axes.

    With `tables` every batch carries its plan already, and `state` is the state of the tables.
    """

    def __init__(
        self,
        metrics: Metrics,
        mesh: Mesh,
        compute_dtype: Any = None,
        logical: Mapping[str, Axes] | None = None,
        tables: Tables | None = None,
    ):
        self.mesh = mesh
        # Jitted, so that the shapes of the sums and the whole program share one trace of the metrics.
        sums_of = jax.jit(on_batches(metrics, mesh, P(), compute_dtype, logical, tables), inline=True)

        def evaluate_step(params: Params, state: PyTree, batch: Batch, total: Sums) -> Sums:
            return merge(total, sums_of(params, state, batch))

        self._sums_of = sums_of
        self._step = jax.jit(evaluate_step, in_shardings=(None, None, batch_sharding(mesh), None), donate_argnums=3)
        self._empty: Callable[[], Sums] | None = None

    def __call__(
        self,
        params: Params,
        batches: Iterable[Batch],
        poll: Callable[[], bool] = lambda: False,
        state: PyTree = None,
    ) -> dict[str, Any]:
        """Returns the host-side values over all batches; call it inside `jax.set_mesh(mesh)`.

        Args:
          params: all parameters, trained and frozen.
          batches: batches of one size, the last one padded.
          poll: is called before every batch; true raises `Interrupted`.
          state: the state of the tables.

        Raises:
          Interrupted: `poll` returned true.
          ValueError: there are no batches.
        """
        total: Sums | None = None
        for batch in batches:
            if poll():
                raise Interrupted
            if total is None:
                first, total = self.fresh, self._zeros(params, state, batch)
                if first:
                    compile_together(self._step, self.mesh, params, state, batch, total)
            total = self._step(params, state, batch, total)
            if serialise_dispatch(self.mesh):
                jax.block_until_ready(total)
        if total is None:
            raise ValueError("evaluation: no batches")
        return finalize(jax.device_get(total))

    @property
    def fresh(self) -> bool:
        """True before the first evaluation, which compiles."""
        return self._empty is None

    def _zeros(self, params: Params, state: PyTree, batch: Batch) -> Sums:
        if self._empty is None:
            shapes = jax.eval_shape(self._sums_of, params, state, batch)
            self._empty = jax.jit(lambda: zeros_like_sums(shapes), out_shardings=NamedSharding(self.mesh, P()))
        return self._empty()


def evaluated_params(state: State) -> Params:
    """Returns the parameters for evaluation and serving: the moving average if there is one, joined with the frozen."""
    return join(state.extra.get("ema", state.params), state.frozen)
