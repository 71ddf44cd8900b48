"""The training step of a task on a mesh: config in, jitted step and fresh state out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxops.core.failures import UserError
from jaxops.core.mesh import batch_shards
from jaxops.core.optimizer import build_optimizer, ema
from jaxops.core.state import State
from jaxops.core.step import TrainStep, build_step, init_state
from jaxops.tasks.task import Task


def build_training(task: Task, mesh: Mesh, accumulation: int = 1) -> tuple[TrainStep, Callable[[], State]]:
    """The jitted step of a task on this mesh, and a function that makes its fresh state.

    Raises:
      UserError: the batch does not divide over mesh and microbatches, or the config does not fit the model.
    """
    config = task.config
    problems = config.mesh_problems(mesh.shape)
    if problems:
        raise UserError("\n".join(f"{path}: {what}" for path, what in problems))
    shards = batch_shards(mesh)
    if config.batch.global_ % (shards * accumulation * task.block):
        raise UserError(
            f"batch.global: {config.batch.global_} examples do not divide over {shards} batch shards of the mesh"
            f" x {accumulation} microbatches" + (f" x blocks of {task.block}" if task.block > 1 else "")
        )
    tx = build_optimizer(config.optimizer, task.steps)
    extras = {"ema": ema(config.optimizer.ema)} if config.optimizer.ema else {}
    step = build_step(
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
        tables=task.tables,
        extras=extras,
        logical=task.logical,
    )

    def fresh() -> State:
        return init_state(
            task.model.init,
            jax.random.fold_in(jax.random.key(config.run.seed), 2**30),
            tx,
            mesh,
            task.rules,
            frozen=config.optimizer.frozen,
            tables=task.tables,
            extras=extras,
            dtype=jnp.dtype(config.precision.params),
        )

    return step, fresh


def abstract(fresh: Callable[[], State], mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of what `fresh` would make; computes nothing. Inside `jax.set_mesh(mesh)`."""

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, jax.eval_shape(fresh))


def abstract_batch(task: Task) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a global batch, from its first row alone."""
    size = task.config.batch.global_
    return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in task.source.batch(0, 1).items()}


def accumulation_of(task: Task, mesh: Mesh) -> int:
    """Microbatches a step: what the config says; `auto` doubles them until the compiled step fits the device."""
    batch = task.config.batch
    if batch.microbatch != "auto":
        return batch.global_ // batch.microbatch
    device = mesh.devices.flat[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    count = 1
    while limit and batch.global_ % (2 * count * batch_shards(mesh) * task.block) == 0:
        step, fresh = build_training(task, mesh, count)
        program = step.programs(abstract(fresh, mesh), abstract_batch(task))[0]
        try:
            memory = program.fn.lower(*program.args).compile().memory_analysis()
            if memory.argument_size_in_bytes + memory.temp_size_in_bytes < 0.9 * limit:
                break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        count *= 2
    return count
