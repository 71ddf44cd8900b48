"""`fit` takes a task to a finished run. It sees to mesh, run folder and lock; training_run.py does the training.

`train_task` is `fit` for commands, which tell by the state of the run how it ended.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxops.config.secrets import secrets_in
from jaxops.core import distributed
from jaxops.core.alarms import stop_reason_of
from jaxops.core.compiles import enable_compilation_cache, forgo_cache_of_one
from jaxops.core.failures import UserError
from jaxops.core.interrupt import Interrupt
from jaxops.core.loop import Hook
from jaxops.core.mesh import make_mesh
from jaxops.core.step import Step
from jaxops.run.build import completed
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.own_code import check_code, code_paths, write_code
from jaxops.run.progress import Progress
from jaxops.run.summary import FinishedRun, report_again
from jaxops.run.task import StepParts, Task
from jaxops.run.training import accumulation_of, build_training
from jaxops.run.training_run import TrainingRun
from jaxops.run.trust import named_code, record_own
from jaxops.run.validation import stop_reason


def fit(
    task: Task,
    mesh: Mesh | None = None,
    hooks: Sequence[Hook] = (),
    *,
    quiet: bool = False,
    folder: str | Path | None = None,
    step: Callable[[StepParts], Step] | None = None,
    accept_code: bool = False,
) -> FinishedRun:
    """Trains a task to its end. A run that was stopped resumes; Ctrl-C and SIGTERM save before the run ends.

    After Ctrl-C it raises KeyboardInterrupt once the run is saved, so that a loop over learning rates ends too. A
    second Ctrl-C raises it without waiting for the save; the run resumes from the save before.
    Compiled programs are kept in the jaxops cache between processes, unless jax has a cache folder already.

    Example:
      loaded = jaxops.load_config("configs/rec/my_interactions.yaml", ["data.path=plays.parquet"])
      run = jaxops.fit(jaxops.build_task(loaded))
      print(run.state, run.dir)  # finished runs/my-interactions

    Args:
      task: a task of `build_task`.
      mesh: by default the config's mesh over all devices.
      hooks: further hooks of the loop, made by `jaxops.every`.
      quiet: true to print nothing but warnings.
      folder: the run folder, by default `run.dir/run.name`.
      step: makes the step that the loop drives, in place of the task's own: a step of several programs (core/turn.py),
        whose inner update is the built one, and which advances `state.step` itself.
      accept_code: go on with a run whose code by import path has changed since; the run folder records it.

    Raises:
      UserError: the config does not fit the machine or the folder, or the code has changed.
      RunFailed: a non-finite loss, out of memory, a lost save.
      KeyboardInterrupt: Ctrl-C or a closed terminal, here or in another process of the job; the run is saved.
    """
    run = train_task(
        task, mesh, hooks, quiet=quiet, folder=folder, step=step, accept_code=accept_code, ctrl_c_exits=False
    )
    # Ctrl-C came to one process, and the loops of all have to end: they were all stopped at the same step.
    stopped = run.state in ("interrupted", "preempted")
    if stopped and "interrupted" in distributed.gather("how the run was stopped", run.state):
        step_saved = run.summary["step"]
        raise KeyboardInterrupt(f"{run.dir} is saved at step {step_saved}; the same call goes on from there")
    return run


def train_task(
    task: Task,
    mesh: Mesh | None = None,
    hooks: Sequence[Hook] = (),
    *,
    quiet: bool = False,
    folder: str | Path | None = None,
    step: Callable[[StepParts], Step] | None = None,
    accept_code: bool = False,
    ctrl_c_exits: bool = True,
) -> FinishedRun:
    """Trains a task as `fit` does, but returns after Ctrl-C, with the state `interrupted`.

    Args: those of `fit`, and
      ctrl_c_exits: whether a second Ctrl-C ends the process at once, as it should a command's.

    Raises:
      UserError: as `fit`.
      RunFailed: as `fit`.
    """
    config = task.config
    if step is not None:
        task = dataclasses.replace(task, step=step)
    enable_compilation_cache()
    mesh = mesh or make_mesh(**dataclasses.asdict(config.mesh))
    forgo_cache_of_one(mesh)
    path = folder or os.path.join(config.run.dir, config.run.name)
    where = RunFolder(path, config.may_change_on_resume, functools.partial(completed, task=config.task))
    progress = Progress(quiet or not distributed.is_primary())
    distributed.announce_phase("open the run folder")
    if (
        finished := distributed.run_on_primary(
            "open the run folder", lambda: _finished(task, where, progress, accept_code)
        )
    ) is not None:
        return FinishedRun(where.dir, finished, "finished")
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        accumulation = accumulation_of(task, mesh)
        training = build_training(task, mesh, accumulation)
        run = TrainingRun(task, mesh, where, progress, training, accumulation)
        run.interrupt = Interrupt(progress.say, ctrl_c_exits)
        run.measure()

        def lock() -> None:
            stack.enter_context(where.locked(progress.say))
            where.check(task.resolved, task.inspection)  # again: now nobody else can begin it
            check_code(where, code_paths(task.resolved), accept_code)
            if any(secrets_in(task.resolved)):
                where.path.chmod(0o700)

        distributed.run_on_primary("lock the run folder", lock)
        if not distributed.is_primary():
            stack.enter_context(where.beside())
        _require_shared(where)
        run.recorded = functools.partial(_record, task, where, progress, accept_code)
        return run.go(hooks)


def _record(task: Task, folder: RunFolder, progress: Progress, accept_code: bool) -> None:
    """Keeps, in the run folder, what code it is trained with and, in the user's state folder, that it is their own."""
    write_code(folder, check_code(folder, code_paths(task.resolved), accept_code))
    if trouble := record_own(folder.config(), folder.where):
        progress.warn(trouble)


def _finished(task: Task, folder: RunFolder, progress: Progress, accept_code: bool) -> dict[str, Any] | None:
    """Returns the summary of a run that needs no more training: it has its steps, or something ended it for good.

    Raises:
      UserError: the folder is not one that this task may go on in, or was trained with other code.
    """
    if not folder.check(task.resolved, task.inspection):
        return None
    code = check_code(folder, code_paths(task.resolved), accept_code)
    summary, stop = folder.summary(), task.config.evaluate.stop
    ends = {stop_reason(stop) if stop else None, stop_reason_of(task.alarms, summary.get("alarms"))} - {None}
    early = summary.get("reason") in ends
    if summary.get("state") != "finished" or not (early or summary.get("step", 0) >= task.steps):
        return None
    if code["accepted"]:
        write_code(folder, code)
    there = folder.config()
    # What may differ, such as loggers, may be somebody else's: then it is not recorded as one's own.
    if named_code(there) == named_code(task.resolved) and {*secrets_in(there)} == {*secrets_in(task.resolved)}:
        record_own(there, folder.where)
    why = f", {summary['reason']}" if early else ""
    if not folder.has("report.html") or folder.scraps():  # killed after the summary
        with folder.locked(progress.say):  # which sweeps what the kill left
            if not folder.has("report.html"):
                report_again(folder.dir)
    progress.say(f"{folder.where} is finished (step {summary['step']}{why}); nothing to do")
    progress.table(summary, task.config.evaluate.metrics, task.about.note)
    progress.say(f"report: {folder.shown('report.html')}")
    return summary


def _require_shared(folder: RunFolder) -> None:
    """Checks that all processes see the folder that process 0 has locked, since each of them saves its part there.

    Raises:
      UserError: some do not see it, as on several machines with a folder that only one of them has.
    """
    if distributed.is_distributed() and "://" not in str(folder.checkpoints):
        blind = distributed.gather("see the run folder", folder.path.is_dir())
        if missing := [rank for rank, sees in enumerate(blind) if not sees]:
            raise UserError(
                f"run folder {folder.path}: process 0 has it, but {distributed.named(missing)} cannot see it: run.dir"
                " must be on a file system that all machines share, or in an object store (s3://, gs://)",
                shared=True,
            )
