"""Plans a run for an accelerator that is not here: memory, FLOPs, a roofline, and what the compiler says.

What is compiled are the very programs that `train` runs, for the devices of the accelerator; no array is made and no
chip is asked. Tested in tests/plan/.
"""

import dataclasses
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxops.config.load import Loaded
from jaxops.core.failures import UserError, nearest
from jaxops.core.flops import peak_flops
from jaxops.core.memory import WAYS_OUT, bytes_per_device, device_memory, readable, state_groups
from jaxops.core.mesh import batch_shards, make_mesh
from jaxops.core.rows import abstract_placed
from jaxops.core.state import State
from jaxops.core.step import Step
from jaxops.launch.accelerators import Accelerator
from jaxops.plan.devices import ADVICE, has_compiler, planned_devices
from jaxops.plan.program import ProgramPlan, Traced, shards_of
from jaxops.plan.roofline import Roofline, roofline
from jaxops.run.build import build_task
from jaxops.run.family import Given, family_of
from jaxops.run.task import StepParts, Task
from jaxops.run.training import (
    Training,
    abstract,
    abstract_batch,
    abstract_update_batch,
    build_training,
    microbatches_of,
    update_rows,
)

ROOM = 0.9
"""The share of a device's memory that a plan fills: the runtime and fragments need the rest."""
MOST_HALVINGS = 12


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run as it is known before it begins.

    Attributes:
      accelerator: where it would run.
      mesh: sizes of the mesh axes.
      memory: bytes that a program may use on a device; None where it is unknown.
      groups: bytes of the state on a device, by group.
      gradients: bytes of the gradients on a device.
      microbatches: number of microbatches of an update.
      microbatch_sizes: the sizes that a microbatch may have on this mesh, in examples, ascending.
      programs: the programs of a step.
      roofline: a lower bound of the time of a step.
      rows: examples that a step consumes.
      tokens: tokens that its updates read, where its batch has any.
      steps: steps of the run; None where the data would tell.
      notes: what was assumed, for people.
      compiles: whether a compiler was there.
    """

    accelerator: Accelerator
    mesh: Mapping[str, int]
    memory: int | None
    groups: Mapping[str, int]
    gradients: int
    microbatches: int
    microbatch_sizes: Sequence[int]
    programs: Sequence[ProgramPlan]
    roofline: Roofline | None
    rows: int
    tokens: int | None
    steps: int | None
    notes: Sequence[str]
    compiles: bool

    @property
    def update(self) -> ProgramPlan:
        """The program that makes an update, the only one that accumulates.

        Raises:
          UserError: a step of one's own has none that takes the state first and differentiates.
        """
        found = next((program for program in self.programs if program.gradients), None)
        if found is None:
            raise UserError(
                f"none of the programs of this step is an update: {', '.join(p.name for p in self.programs)}"
            )
        return found

    @property
    def state(self) -> int:
        """The bytes of the state on a device."""
        return sum(self.groups.values())

    def held(self, program: ProgramPlan) -> int:
        """Returns the bytes that are surely on a device while a program runs: no compiler can do with less."""
        return self.state + sum(program.beside.values()) + program.inputs + program.gradients

    def peak(self, program: ProgramPlan) -> int:
        """Returns the bytes on a device while a program runs: the compiler's, where it was asked, else an estimate."""
        found = program.compiled
        if found is None or found.problem is not None:
            return self.held(program) + program.temporaries
        # What the program is not given lies there all the same: the rest of the state.
        rest = self.state - program.of_state
        return max(rest, 0) + found.peak

    @property
    def problem(self) -> str | None:
        """Why the run does not fit, with what would help; None where it does, as far as is known."""
        if self.memory is None or not self.programs:
            return None
        for program in self.programs:
            if program.compiled is not None and program.compiled.problem is not None:
                return self._told(program, f"the compiler refuses it: {program.compiled.problem}")
            need = self.peak(program) if program.compiled is not None else self.held(program)
            if need > self.memory:
                what = "takes" if program.compiled is not None else "takes, activations apart,"
                over = readable(need - self.memory)
                return self._told(
                    program, f"it {what} {readable(need)} of {readable(self.memory)}, {over} too much on each device"
                )
        return None

    def _told(self, program: ProgramPlan, why: str) -> str:
        return f"{self.accelerator.type} cannot run {program.name}: {why}. {WAYS_OUT}"


def plan(
    loaded: Loaded[Any],
    accelerator: Accelerator,
    *,
    compiling: bool = True,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Plans the run of a config on an accelerator.

    Args:
      loaded: a config of `load_config`.
      accelerator: one of the table, `find_accelerator("v5e-64")`.
      compiling: whether programs are compiled; else everything is predicted.
      only: names of the programs to compile; all where there are none.
      say: is called with lines for people while it works.

    Raises:
      UserError: the config does not fit the mesh, something of it cannot be opened, or it has no such program.

    Example:
      found = plan(jaxops.load_config("language/sft_7b"), find_accelerator("v5e-64"))
      print(found.problem or "fits")
    """
    devices = planned_devices(accelerator)
    compiles = has_compiler(accelerator)
    with tempfile.TemporaryDirectory(prefix="jaxops-plan-") as folder:
        task = outlined_task(loaded, Path(folder))
        mesh = make_mesh(**dataclasses.asdict(task.config.mesh), devices=devices)
        if mesh.shape["replica"] % accelerator.slices:
            raise UserError(
                f"mesh.replica: {mesh.shape['replica']}, and {accelerator.type} is {accelerator.slices} slices: make it"
                f" a multiple of {accelerator.slices}, so that no other axis crosses the network between them"
            )
        with jax.set_mesh(mesh):
            return _planned(task, mesh, accelerator, compiles and compiling, tuple(only), say)


def outlined_task(loaded: Loaded[Any], folder: Path) -> Task:
    """Returns a task of which only shapes and programs count, over stand-ins in `folder` where its family has any.

    Raises:
      UserError: something cannot be opened.
    """
    outline = family_of(loaded.config.task).outline
    return build_task(loaded) if outline is None else outline(loaded, Given(), folder)


def _planned(
    task: Task, mesh: Mesh, accelerator: Accelerator, compiling: bool, only: tuple[str, ...], say: Callable[[str], None]
) -> Plan:
    memory = (
        int(accelerator.per_device(accelerator.chip.hbm)) if accelerator.chip is not None else device_memory(mesh)[0]
    )
    notes = [*_assumed(task, accelerator)]
    count, training, step, state = _fitting(task, mesh, memory, notes)
    groups = state_groups(state, task.models)
    rows = task.config.batch.global_
    batch = abstract_batch(task, training.tables)
    update = abstract_update_batch(task, training.tables)
    traced = list(trace_programs(task, mesh, step, state, batch, count))
    unknown = [name for name in only if name not in {one.plan.name for one in traced}]
    if unknown:
        names = [one.plan.name for one in traced]
        raise UserError(f"--programs: no {unknown[0]!r}{nearest(unknown[0], names)} (there are: {', '.join(names)})")
    found = Plan(
        accelerator,
        dict(mesh.shape),
        memory,
        groups,
        bytes_per_device(state.params),
        count,
        _microbatch_sizes(task, mesh),
        [one.plan for one in traced],
        None,
        rows,
        int(update["tokens"].size) if "tokens" in update else None,
        task.config.run.steps,
        notes,
        compiling,
    )
    if compiling and found.problem is None:
        version = version_of(accelerator)
        for at, one in enumerate(traced):
            if only and one.plan.name not in only:
                continue
            say(f"compiling {one.plan.name} for {accelerator.type} ...")
            found = dataclasses.replace(
                found, programs=_with(found.programs, at, one.compiled(version, accelerator.slices))
            )
    return dataclasses.replace(found, roofline=_roofline(found, task, mesh))


def _with(programs: Sequence[ProgramPlan], at: int, one: ProgramPlan) -> list[ProgramPlan]:
    return [*programs[:at], one, *programs[at + 1 :]]


def _assumed(task: Task, accelerator: Accelerator) -> Iterator[str]:
    yield from task.notices
    if not has_compiler(accelerator):
        yield f"libtpu is not installed, so that nothing is compiled and all is predicted ({ADVICE})"


def _fitting(task: Task, mesh: Mesh, memory: int | None, notes: list[str]) -> tuple[int, Training, Step, State]:
    """Returns the number of microbatches, as configured or the least whose estimate fits, and what is built with it."""
    if task.config.batch.microbatch != "auto":
        return microbatches_of(task), *build_on(task, mesh, microbatches_of(task))
    count = 1
    for _ in range(MOST_HALVINGS):
        built = build_on(task, mesh, count)
        training, _, state = built
        rows = update_rows(task)
        more = rows % (2 * count * batch_shards(mesh) * task.block) == 0
        if not memory or not more or _estimated(task, mesh, training, state, count) < ROOM * memory:
            break
        count *= 2
    notes.append(
        f"batch.microbatch is auto: {update_rows(task) // count} examples at a time by the estimate; `train` compiles"
        " until an update fits"
    )
    return count, *built


def _microbatch_sizes(task: Task, mesh: Mesh) -> list[int]:
    """Returns the divisors of an update's examples that the mesh and the objective's blocks divide."""
    rows, unit = update_rows(task), batch_shards(mesh) * task.block
    return [size for size in range(unit, rows + 1, unit) if rows % size == 0]


def build_on(task: Task, mesh: Mesh, count: int) -> tuple[Training, Step, State]:
    """Returns the training, the step and the abstract state of a task whose updates have `count` microbatches.

    Call it inside `jax.set_mesh(mesh)`.
    """
    training = build_training(task, mesh, count)
    parts = StepParts(training.update, training.fresh, mesh, "")
    step: Step = training.update if task.step is None else task.step(parts)
    return training, step, abstract(training.fresh, mesh)


def _estimated(task: Task, mesh: Mesh, training: Training, state: State, count: int) -> int:
    """Returns the estimated bytes of an update on a device."""
    (program,) = training.update.programs(state, abstract_placed(abstract_update_batch(task, training.tables), mesh))
    one = Traced(program, state, mesh, _shards(task, mesh, state, count)).plan
    return bytes_per_device(state) + one.inputs + one.gradients + one.temporaries


def _shards(task: Task, mesh: Mesh, state: State, count: int) -> Any:
    size = update_rows(task)
    sizes = {size, size // count, task.config.batch.global_, getattr(task.config, "completions", size)}
    return shards_of((state.params, state.frozen), sorted(sizes), batch_shards(mesh))


def trace_programs(task: Task, mesh: Mesh, step: Step, state: State, batch: Any, count: int) -> Iterator[Traced]:
    """Yields the programs of a step, traced for a mesh but not compiled; call it inside `jax.set_mesh(mesh)`.

    Args:
      task: the task.
      mesh: the mesh of the devices.
      step: the step, of `build_on`.
      state: the abstract state, of `build_on`.
      batch: shapes and dtypes of a global batch.
      count: the number of microbatches.
    """
    for program in step.programs(state, abstract_placed(batch, mesh)):
        yield Traced(program, state, mesh, _shards(task, mesh, state, count))


def version_of(accelerator: Accelerator) -> str:
    """Returns what tells compilers and topologies apart."""
    package = "libtpu" if accelerator.chip is not None else "jaxlib"
    named = [accelerator.type, accelerator.topology, jax.__version__, importlib.metadata.version(package)]
    return " ".join(named)


def _roofline(found: Plan, task: Task, mesh: Mesh) -> Roofline | None:
    chip = found.accelerator.chip
    if chip is None:
        return None
    peak = peak_flops(chip.kind, task.config.precision.compute)
    assert peak is not None
    return roofline(found.programs, found.accelerator, peak, mesh.size)
