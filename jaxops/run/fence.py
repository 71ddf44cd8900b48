"""The check of `jaxops.core.fence` on a task: its objective is traced as a step would trace it on this mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxops.core.fence import Unconstrained, over_fsdp, refuse_unconstrained, unconstrained_kernels
from jaxops.core.mesh import batch_axes
from jaxops.core.sharding import logical_axes, place
from jaxops.run.task import Task
from jaxops.tables.tables import EmbeddingTables

Batch = Mapping[str, Any]


def require_constrained_kernels(
    task: Task, mesh: Mesh, tables: EmbeddingTables | None = None, batch: Batch | None = None
) -> None:
    """Refuses a task with a parameter that is still sharded over fsdp where it is multiplied.

    Its gradients may be wrong without any error. The check only traces, and it does nothing where no parameter is
    sharded over fsdp. Call it outside `jit`.

    Args:
      task: the task to check.
      mesh: the mesh that the task would train on.
      tables: the tables of the task, built for this mesh (`tables_on`).
      batch: a batch as a step gets it, with its plan where there are tables; by default that of an update.

    Raises:
      UserError: the message names each such parameter, the line of its product, and the cure; or it is `place`'s own.
    """
    refuse_unconstrained(find_unconstrained(task, mesh, tables, batch))


def find_unconstrained(
    task: Task, mesh: Mesh, tables: EmbeddingTables | None = None, batch: Batch | None = None
) -> list[Unconstrained]:
    """Returns the parameters that `require_constrained_kernels` would refuse, each with its product.

    Args:
      task: the task to check.
      mesh: the mesh that the task would train on.
      tables: the tables of the task, built for this mesh.
      batch: a batch as a step gets it; by default that of an update.
    """
    placed = place(task.model.shapes, task.rules, mesh)
    if not over_fsdp(placed):
        return []
    seen = seen_shapes(task, mesh, tables, batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with logical_axes(task.logical):
        return unconstrained_kernels(task.objective, task.model.shapes, seen, key, mesh=mesh, placed=placed)


def seen_shapes(task: Task, mesh: Mesh, tables: EmbeddingTables | None, batch: Batch | None = None) -> dict[str, Any]:
    """Returns the shapes of the batch that an objective gets: examples, rows of its tables, and entries of extras."""
    if batch is None and task.update_batch is not None:
        batch = task.update_batch(task.config.batch.global_)
    if batch is not None:
        whole: dict[str, Any] = jax.tree.map(lambda x: _shape(x.shape, x), dict(batch))
    elif tables is not None:
        planned = tables.plan(task.source.batch(0, task.config.batch.global_))
        whole = jax.tree.map(lambda x: _shape(x.shape, x), planned)
    else:
        size = task.config.batch.global_
        whole = jax.tree.map(lambda x: _shape((size, *x.shape[1:]), x), dict(task.source.batch(0, 1)))
    for extra in task.extras.values():
        if (read := extra.read) is not None:
            whole |= jax.eval_shape(lambda p, batch, e=extra, r=read: r(e.init(p), batch), task.model.shapes, whole)
    if tables is None:
        return whole

    def rows(batch: dict[str, Any]) -> dict[str, Any]:
        batch = jax.tree.map(lambda x: jax.sharding.reshard(x, P(batch_axes(mesh))), batch)
        return tables.expand(tables.lookup(tables.init(jax.random.key(0)), batch), batch)

    with jax.set_mesh(mesh):
        found = jax.eval_shape(rows, whole)
    return {**{name: x for name, x in whole.items() if name != "plan"}, "rows": found}


def _shape(shape: tuple[int, ...], like: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(np.asarray(like).dtype))
