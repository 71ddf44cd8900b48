"""The audit of a task on the mesh of its config: every check, in an order in which a failure explains later ones.

Tested in tests/audit/.
"""

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxops.audit.contract import contract_findings
from jaxops.audit.finding import Finding, failures
from jaxops.audit.layouts import mesh_of
from jaxops.audit.programs import (
    collectives_finding,
    donation_finding,
    fence_finding,
    host_finding,
    promotions_finding,
    replicated_finding,
    types_finding,
)
from jaxops.audit.runs import STEPS, batches_finding, recompiles_finding
from jaxops.audit.updates import (
    UpdateBatches,
    audited_rows,
    case_of,
    packing_finding,
    update_findings,
    with_update_batches,
)
from jaxops.core.failures import UserError
from jaxops.core.fence import over_fsdp
from jaxops.core.memory import readable
from jaxops.core.mesh import MeshConfig, batch_shards, describe_devices, make_mesh
from jaxops.core.rows import abstract_placed
from jaxops.core.sharding import logical_axes, named_leaves, place
from jaxops.launch.accelerators import find_accelerator
from jaxops.plan.plan import build_on, trace_programs, version_of
from jaxops.run.fence import find_unconstrained, seen_shapes
from jaxops.run.task import Task
from jaxops.run.training import abstract_batch, abstract_update_batch, build_training, microbatches_of, tables_on

MOST_DEVICES = 8
"""The most virtual devices that programs run on; a larger mesh is compiled only."""
COPIES = 6
"""How many arrays as large as the parameters a device holds at a time, in comparisons of updates."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of an audit: its findings, and the meshes that they were made on.

    Attributes:
      mesh: sizes of the axes of the mesh above one, for which programs were compiled.
      ran_on: the same of the mesh that updates ran on.
      devices: the devices, in words.
      rows: the number of examples of the batches that ran.
      findings: the findings, in order.
      notes: what was assumed, for people.
    """

    mesh: Mapping[str, int]
    ran_on: Mapping[str, int]
    devices: str
    rows: int
    findings: Sequence[Finding]
    notes: Sequence[str] = ()

    @property
    def failed(self) -> list[Finding]:
        """The findings that failed."""
        return failures(self.findings)

    def lines(self) -> list[str]:
        """Returns the report as lines for people."""
        counts = {verdict: sum(one.verdict == verdict for one in self.findings) for verdict in ("passed", "failed")}
        rest = len(self.findings) - sum(counts.values())
        return [
            f"compiled for {_axes(self.mesh)}; ran on {_axes(self.ran_on)} ({self.devices}), batches of {self.rows}",
            *(f"note: {note}" for note in self.notes),
            *(one.line() for one in self.findings),
            f"{counts['passed']} passed, {counts['failed']} failed, {rest} not applicable",
        ]


def _axes(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device"


def devices_needed(mesh: MeshConfig, at_hand: int) -> int:
    """Returns the number of devices that a mesh takes where its -1 stands for the rest of `at_hand`."""
    sizes = dataclasses.asdict(mesh).values()
    known = math.prod(size for size in sizes if size != -1)
    return known * max(at_hand // known, 1) if -1 in sizes else known


def shrunk(sizes: Mapping[str, int], most: int) -> dict[str, int]:
    """Returns the axes above one, the largest divided until there are at most `most` devices; no axis is lost early."""
    found = {axis: size for axis, size in sizes.items() if size > 1}
    while math.prod(found.values()) > most:
        axis = max(found, key=lambda name: found[name])
        factor = next(n for n in range(2, found[axis] + 1) if found[axis] % n == 0)
        found[axis] //= factor
    return {axis: size for axis, size in found.items() if size > 1}


def audit(
    task: Task, *, runs: bool = True, most: int = MOST_DEVICES, say: Callable[[str], None] = lambda line: None
) -> Report:
    """Audits a task on the mesh of its config, of virtual CPU devices.

    Args:
      task: the task.
      runs: whether updates run; False for a task over stand-ins, of which only shapes and programs count.
      most: the most devices that updates run on.
      say: is called with the name of each group of checks before it begins.

    Raises:
      UserError: the config does not fit its mesh, or its objective cannot be traced.

    Example:
      task = jaxops.build_task(jaxops.load_config("rec/movielens_sasrec", ["mesh.data=8"]))
      for finding in jaxops.testing.audit(task).failed: print(finding.line())
    """
    devices = jax.devices("cpu")
    needed = devices_needed(task.config.mesh, len(devices))
    if needed > len(devices):
        raise UserError(
            f"mesh: {needed} devices are needed, and jax was started with {len(devices)}: use_cpu_devices({needed})"
        )
    mesh = make_mesh(**dataclasses.asdict(task.config.mesh), devices=devices[:needed])
    layout = shrunk(mesh.shape, most)
    updates = with_update_batches(task)
    shards = batch_shards(mesh_of(layout))
    rows = audited_rows(updates, shards, _update_rows(updates))
    notes = list(_notes(task, mesh, layout))
    findings: list[Finding] = []
    say("programs")
    findings += _guarded("programs", _programs(task, mesh))
    refused = any(one.check == "fence" and one.verdict == "failed" for one in findings)
    why = _too_large(task, layout) if runs else "the data or weights are stand-ins"
    if why:
        findings += [Finding.skipped(name, why) for name in (*_OBJECTIVE, *_STEPPED)]
    else:
        say("the objective")
        findings += _guarded("objective", _objective(updates, rows))
        say("updates")
        if refused:
            findings += [Finding.skipped(name, "the fence refuses this mesh") for name in _STEPPED]
        else:
            findings += _guarded("updates", update_findings(updates, layout, rows))
            findings += _guarded("steps", _stepped(task, updates, layout, rows))
    kept = {axis: size for axis, size in mesh.shape.items() if size > 1}
    return Report(kept, layout, describe_devices(mesh_of(layout)), rows, findings, notes)


def _guarded(group: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yields the findings of a group; where code of a user's own raises, the last one is what it raised.

    Raises:
      UserError: as it is.
    """
    try:
        yield from findings
    except UserError:
        raise
    except Exception as error:  # an objective, a model or a step raises what it likes
        words = (str(error).splitlines() or [""])[0][:300]
        yield Finding(group, "failed", f"the rest of these checks could not be made: {type(error).__name__}: {words}")


def _objective(updates: Task, rows: int) -> Iterator[Finding]:
    """Yields the findings about the objective on one device."""
    case = case_of(updates, rows)
    yield from contract_findings(case)
    yield packing_finding(case)


_STEPPED = ("one device", "accumulation", "batches", "recompiles")
_OBJECTIVE = ("counts", "sums", "examples", "keys", "gradients", "packing")


def _update_rows(task: Task) -> int:
    """Returns the number of examples of one update of a task as its updates see it."""
    return task.source.examples if isinstance(task.source, UpdateBatches) else task.config.batch.global_


def _notes(task: Task, mesh: Mesh, layout: Mapping[str, int]) -> Iterator[str]:
    if mesh.size > math.prod(layout.values()):
        yield f"the mesh has {mesh.size} devices: it is compiled for them, and updates run on {_axes(layout)}"
    if task.update_batch is not None:
        yield "the batches of updates are drawn: nothing was sampled or judged"
    if task.start is not None:
        yield "parameters are fresh ones, not the weights that training begins with"


def _too_large(task: Task, layout: Mapping[str, int]) -> str:
    """Returns why updates cannot run here, or nothing."""
    size = sum(math.prod(x.shape) * 4 for _, x in named_leaves(task.model.shapes))
    devices = math.prod(layout.values())
    need = size * COPIES * (devices + 1)
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if need <= room:
        return ""
    return f"{readable(size)} of parameters take {readable(need)} on {devices} devices: more than half of this machine"


def _programs(task: Task, mesh: Mesh) -> Iterator[Finding]:
    """Yields the findings about the programs of a step, traced and compiled."""
    tables = tables_on(task, mesh)
    placed = place(task.model.shapes, task.rules, mesh)
    unconstrained = find_unconstrained(task, mesh, tables) if over_fsdp(placed) else None
    yield fence_finding(unconstrained)
    batch = seen_shapes(task, mesh, tables)
    with jax.set_mesh(mesh), logical_axes(task.logical):
        whole = jax.sharding.auto_axes(task.objective, out_sharding=P())
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), task.model.shapes)
        yield promotions_finding(whole, shapes, batch, jnp.dtype(task.config.precision.compute))
    if unconstrained:
        names = ("host", "types", "donation", "replicated", "collectives")
        yield from (Finding.skipped(name, "the fence refuses this mesh") for name in names)
        return
    yield from _compiled(task, mesh)


def _compiled(task: Task, mesh: Mesh) -> Iterator[Finding]:
    count = 1 if task.config.batch.microbatch == "auto" else microbatches_of(task)
    with jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")  # `donation` tells it
        training, step, state = build_on(task, mesh, count)
        traced = list(trace_programs(task, mesh, step, state, abstract_batch(task, training.tables), count))
        yield host_finding({one.plan.name: one.jaxpr for one in traced})
        given = abstract_placed(abstract_update_batch(task, training.tables), mesh)
        (update,) = training.update.programs(state, given)
        yield types_finding(update.args[0], jax.eval_shape(update.fn, *update.args)[0])
        version = version_of(find_accelerator(f"cpu-{mesh.size}"))
        compiled = {one.plan.name: one.compiled(version, 1).compiled for one in traced}
        donating = {name: one for name, one in compiled.items() if one is not None and one.problem is None}
        yield donation_finding(donating)
        main = next((one for one in traced if one.plan.gradients), None)
        if main is None:
            why = "none of the programs of this step takes the state and differentiates"
            yield from (Finding.skipped(name, why) for name in ("replicated", "collectives"))
            return
        yield replicated_finding(state, main.jaxpr, dict(mesh.shape))
        exchanged = compiled[main.plan.name]
        assert exchanged is not None
        sizes = dict(mesh.shape)
        yield collectives_finding(exchanged.collectives, state, count, sizes, coupled=task.block > 1)


def _stepped(task: Task, updates: Task, layout: Mapping[str, int], rows: int) -> Iterator[Finding]:
    """Yields the findings of a few real steps of the config's own update."""
    yield batches_finding(updates, rows)
    config = task.config
    if any(field.name == "global_" for field in dataclasses.fields(config.batch)):
        config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, global_=rows, microbatch="auto"))
    mesh = mesh_of(layout)
    config = dataclasses.replace(config, mesh=MeshConfig(**{"data": 1, **layout}))
    small = dataclasses.replace(task, config=config)
    with jax.set_mesh(mesh):
        training = build_training(small, mesh, 1)
        batches: list[Any] = [updates.source.batch(at * rows, rows) for at in range(STEPS)]
        if training.tables is not None:
            batches = [training.tables.plan(batch) for batch in batches]
        state = training.fresh()
    yield recompiles_finding(training.update, state, batches, mesh)
