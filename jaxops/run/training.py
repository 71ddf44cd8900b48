"""The training step of a task on a mesh: a config becomes a jitted step and a fresh state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxops.core.failures import UserError
from jaxops.core.fresh_state import init_state
from jaxops.core.memory import device_memory
from jaxops.core.mesh import batch_shards
from jaxops.core.optimizer import build_optimizer, ema
from jaxops.core.state import State
from jaxops.core.step import TrainStep, build_step
from jaxops.run.fence import require_constrained_kernels
from jaxops.run.task import Task
from jaxops.tables.explain import require_room
from jaxops.tables.spec import check_specs, stack
from jaxops.tables.tables import EmbeddingTables


class Training(NamedTuple):
    """The update, the fresh state and the tables that train a task on a mesh.

    Attributes:
      update: the jitted update of the task's objective; its `reason` says where gradients are reduced.
      fresh: makes the fresh state.
      tables: the embedding tables on the mesh, if there are any.
    """

    update: TrainStep
    fresh: Callable[[], State]
    tables: EmbeddingTables | None


def tables_on(task: Task, mesh: Mesh, size: int | None = None) -> EmbeddingTables | None:
    """Builds the tables of a task for batches of `size` examples (default: the config's); similar tables are stacked.

    Raises:
      UserError: a spec is wrong, or does not fit the mesh or the batches.
    """
    if not task.tables:
        return None
    check_specs(dict(task.tables))
    first = task.source.batch(0, size or task.config.batch.global_)
    tables = EmbeddingTables(stack(task.tables), mesh, first)
    require_room(tables, *device_memory(mesh))
    return tables


def build_training(task: Task, mesh: Mesh, accumulation: int = 1) -> Training:
    """Builds what trains a task on this mesh, with `accumulation` microbatches an update.

    Raises:
      UserError: the batch does not divide over mesh and microbatches, the config does not fit the model, or a parameter
        is still sharded over fsdp where it is multiplied.
    """
    config = task.config
    problems = config.mesh_problems(mesh.shape)
    if problems:
        raise UserError("\n".join(f"{path}: {what}" for path, what in problems))
    shards = batch_shards(mesh)
    # A single microbatch is the whole batch, so that its blocks may extend across devices.
    parts = shards if accumulation == 1 else shards * accumulation * task.block
    rows = update_rows(task)
    if rows % parts or rows % task.block:
        blocks = f" x blocks of {task.block}" if task.block > 1 and accumulation > 1 else ""
        what = "batch.global" if task.update_batch is None else "the update's batch"
        raise UserError(
            f"{what}: {rows} examples do not divide over {shards} batch shards of the mesh"
            f" x {accumulation} microbatches{blocks}"
        )
    tx = build_optimizer(config.optimizer, task.steps)
    extras = {**task.extras, **({"ema": ema(config.optimizer.ema)} if config.optimizer.ema else {})}
    tables = tables_on(task, mesh)
    require_constrained_kernels(task, mesh, tables)
    update = build_step(
        task.objective,
        tx,
        mesh,
        seed=config.run.seed,
        rules=task.rules,
        accumulation=accumulation,
        block=task.block,
        loss_weights=task.loss_weights,
        clip=config.optimizer.clip,
        compute_dtype=jnp.dtype(config.precision.compute),
        tables=tables,
        extras=extras,
        logical=task.logical,
        reads=task.reads,
        advance_step=task.step is None,
    )

    def fresh() -> State:
        return init_state(
            task.model.init,
            jax.random.fold_in(jax.random.key(config.run.seed), 2**30),
            tx,
            mesh,
            task.rules,
            frozen=(*config.optimizer.frozen, *task.frozen),
            tables=tables,
            extras=extras,
            dtype=jnp.dtype(config.precision.params),
            dtypes=task.dtypes,
        )

    return Training(update, fresh, tables)


def abstract(fresh: Callable[[], State], mesh: Mesh) -> State:
    """Returns shapes, dtypes and shardings of the state that `fresh` makes, without computing it.

    Call it inside `jax.set_mesh(mesh)`.
    """

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else PartitionSpec()
        weak = leaf.weak_type  # as the arrays have it: what is traced is what runs
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec), weak_type=weak)

    return jax.tree.map(placed, jax.eval_shape(fresh))


def update_rows(task: Task) -> int:
    """Returns the number of examples of one update: the global batch's, unless the update has a batch of its own."""
    size = task.config.batch.global_
    return size if task.update_batch is None else len(task.update_batch(size)["id"])


def abstract_update_batch(task: Task, tables: EmbeddingTables | None = None) -> dict[str, Any]:
    """Returns shapes and dtypes of the batch that one update reads."""
    if task.update_batch is None:
        return abstract_batch(task, tables)
    batch = dict(task.update_batch(task.config.batch.global_))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def abstract_batch(task: Task, tables: EmbeddingTables | None = None) -> dict[str, Any]:
    """Returns shapes and dtypes of a global batch, with its plan where there are tables.

    Without tables only the first example is read.
    """
    size = task.config.batch.global_
    if tables is not None:
        planned = tables.plan(task.source.batch(0, size))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), planned)
    return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in task.source.batch(0, 1).items()}


def memory_limit(mesh: Mesh) -> int | None:
    """Returns the bytes that a program may use on each device of the mesh; None on CPUs, which swap, and if unknown."""
    return None if mesh.devices.flat[0].platform == "cpu" else device_memory(mesh)[0]


def microbatches_of(task: Task) -> int:
    """Returns the number of microbatches of an update where the config gives their size.

    Raises:
      UserError: batch.microbatch does not divide the update's batch.
    """
    rows, size = update_rows(task), task.config.batch.microbatch
    if rows % size:
        raise UserError(f"batch.microbatch: {size} does not divide the {rows} examples of an update")
    return rows // size


def accumulation_of(task: Task, mesh: Mesh) -> int:
    """Returns the number of microbatches of an update.

    The config gives it; `auto` doubles it until the compiled update fits into the device's memory.

    Raises:
      UserError: batch.microbatch does not divide the update's batch.
    """
    if task.config.batch.microbatch != "auto":
        return microbatches_of(task)
    rows, limit, count = update_rows(task), memory_limit(mesh), 1
    while limit and rows % (2 * count * batch_shards(mesh) * task.block) == 0:
        update, fresh, tables = build_training(task, mesh, count)
        program = update.programs(abstract(fresh, mesh), abstract_update_batch(task, tables))[0]
        try:
            memory = program.fn.lower(*program.args).compile().memory_analysis()
            if memory.argument_size_in_bytes + memory.temp_size_in_bytes < 0.9 * limit:
                break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        count *= 2
    return count
