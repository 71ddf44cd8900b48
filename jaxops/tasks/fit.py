"""From a task to a finished run: mesh, state, resume, the loop, evaluation, checkpoints, summary and report.

Resume is the default: the same task in the same folder goes on from the newest checkpoint with the same global
batches. Held by tests/tasks/test_resume.py (bitwise on the same mesh).
"""

import contextlib
import dataclasses
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxops.config.dump import dump_yaml
from jaxops.config.types import ByPath
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.compiles import Compiles, enable_compilation_cache
from jaxops.core.evaluation import Evaluator, Interrupted, evaluated_params
from jaxops.core.failures import UserError
from jaxops.core.interrupt import Interrupt
from jaxops.core.loop import Ended, Hook, Snapshot, Window, check_finite, run_loop
from jaxops.core.memory import explained
from jaxops.core.mesh import batch_shards, describe_devices, make_mesh
from jaxops.core.optimizer import build_schedule
from jaxops.core.profiler import profiled
from jaxops.core.sharding import place as placements
from jaxops.core.state import Params, State, join
from jaxops.core.step import Step
from jaxops.core.writers import JsonlWriter, TensorBoardWriter, WandbWriter, Writer, Writers
from jaxops.data.loader import Loader
from jaxops.tasks.accounting import Accounting
from jaxops.tasks.config import EarlyStop, TensorBoard, Wandb
from jaxops.tasks.progress import Progress
from jaxops.tasks.run_folder import RunFolder
from jaxops.tasks.seams import require_callable
from jaxops.tasks.summary import write_failure, write_summary
from jaxops.tasks.task import Task
from jaxops.tasks.training import abstract, accumulation_of, build_training
from jaxops.tasks.warm_start import warm_start

FORMAT = 1
"""Of the metadata in a checkpoint."""
NO_HISTORY = {"metric": None, "best": None, "best_step": None, "since": 0, "at": 0, "wall_s": 0.0}
"""What early stopping remembers: the best value so far, evaluations since, and the last step that counted."""


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What `fit` returns: the folder, the final numbers, and how it ended (`finished`, `interrupted`, ...)."""

    dir: Path
    summary: dict[str, Any]
    state: str


def fit(
    task: Task,
    mesh: Mesh | None = None,
    hooks: Sequence[Hook] = (),
    *,
    quiet: bool = False,
    folder: str | Path | None = None,
    step: Step | None = None,
) -> FinishedRun:
    """Trains a task to its end, or on from where it stopped; Ctrl-C and SIGTERM save first.

    Compiled programs are kept in the jaxops cache between processes, unless jax has a cache folder already.

    Args:
      mesh: by default the config's, over all devices.
      hooks: made by `jaxops.every`.
      folder: the run folder, by default `run.dir/run.name`.

    Raises:
      UserError: the config does not fit the machine or the folder.
      RunFailed: a non-finite loss, out of memory, a lost save.
    """
    config = task.config
    if jax.process_count() > 1:
        raise UserError(f"a run of {jax.process_count()} processes is not possible yet: start one")
    enable_compilation_cache()
    mesh = mesh or make_mesh(**dataclasses.asdict(config.mesh))
    place = RunFolder(folder or Path(config.run.dir) / config.run.name)
    progress = Progress(quiet)
    if place.check(task.resolved, task.inspection) and (finished := _finished(task, place, progress)):
        return finished
    with jax.set_mesh(mesh):
        accumulation = accumulation_of(task, mesh)
        built, fresh = build_training(task, mesh, accumulation)
        run = _Run(task, mesh, place, progress, step or built, fresh, accumulation)
        # Traces the whole step: what is wrong with an objective or a rule is said before anything is written.
        run.accounting.measure(run.step, abstract(fresh, mesh), task.source.batch(0, config.batch.global_))
        with place.locked():
            place.check(task.resolved, task.inspection)  # again: now nobody else can begin it
            return run.go(hooks)


def _finished(task: Task, place: RunFolder, progress: Progress) -> FinishedRun | None:
    """The run as it is, where it has its steps already or was stopped early by the rule that still holds."""
    summary, stop = place.summary(), task.config.evaluate.stop
    stopped = stop is not None and summary.get("reason") == _stopped(stop)
    if summary.get("state") != "finished" or not (stopped or summary.get("step", 0) >= task.steps):
        return None
    why = f", {summary['reason']}" if stopped else ""
    progress.say(f"{place.path} is finished (step {summary['step']}{why}); nothing to do")
    progress.table(summary, task.config.evaluate.metrics)
    progress.say(f"report: {place.path / 'report.html'}")
    return FinishedRun(place.path, summary, "finished")


def _stopped(stop: EarlyStop) -> str:
    return f"no better valid/{stop.metric} in {stop.patience} evaluations"


class _Run:
    """One call of `fit`: what the hooks share. It lives as long as the call."""

    def __init__(
        self,
        task: Task,
        mesh: Mesh,
        place: RunFolder,
        progress: Progress,
        step: Step,
        fresh: Callable[[], State],
        accumulation: int,
    ):
        self.task, self.config, self.mesh, self.place, self.progress = task, task.config, mesh, place, progress
        self.step, self.fresh = step, fresh
        self.accounting = Accounting(task, mesh, accumulation)
        self.interrupt = Interrupt(progress.say)
        self.compiles = Compiles(on_compile=progress.compiled)
        self.evaluator = Evaluator(task.metrics, mesh, jnp.dtype(self.config.precision.compute), task.logical)
        # all at once: asking the device for one in the middle of a run would wait for every step before it
        with jax.numpy_dtype_promotion("standard"):  # optax trips strict promotion
            rates = build_schedule(self.config.optimizer, task.steps)(jnp.arange(task.steps))
        self.lr = np.broadcast_to(rates, task.steps)
        self.began = time.time()
        self.saved_at = time.monotonic()
        self.saved = (-1, False)
        self.history: dict[str, Any] = dict(NO_HISTORY)
        self.loggers = _own_loggers(self.config.run.loggers)
        self.values: dict[str, float] = {}
        self.values_step = -1
        self.warm = False
        self.logged = 0

    def go(self, hooks: Sequence[Hook]) -> FinishedRun:
        keep = self.config.checkpoint
        best = f"valid/{keep.best}" if keep.best else None
        with Checkpoints(
            self.place.checkpoints, keep=keep.keep, keep_every=keep.keep_every, best=best
        ) as self.checkpoints:
            state, start, cursor = self._begin()
            if not self.place.exists:
                self.place.create(self.task.resolved, self.task.transform, self.task.inspection)
            self.writers = self._writers(start)
            self.place.write_text("config.yaml", dump_yaml(self.task.resolved))  # what a resumed run may change
            try:
                with (
                    explained(lambda: abstract(self.fresh, self.mesh)),
                    self.interrupt.installed(),
                    self.compiles.watching(),
                ):
                    return self._train(state, start, cursor, hooks)
            except BaseException as error:
                self._failed(error)
                raise
            finally:
                self.writers.close()

    def _begin(self) -> tuple[State, int, int]:
        """The state to go on from: the newest good checkpoint, else a fresh one."""
        self.progress.say(
            f"{self.config.run.name}: {describe_devices(self.mesh)}, {self.accounting.describe(self.step)}"
        )
        for placement in placements(self.task.model.shapes, self.task.rules, self.mesh):
            if placement.dropped:
                self.progress.say(f"sharding of {placement.path} {placement.shape}: {'; '.join(placement.dropped)}")
        latest = self.checkpoints.latest_good(self.progress.say)
        if latest is None:
            state = self.fresh()
            if self.config.init_from:
                state, report = warm_start(state, self.config.init_from)
                self.progress.say(f"init_from {self.config.init_from.run}: {report}")
            return state, 0, 0
        meta = self.checkpoints.meta(latest)
        state = self.checkpoints.restore(latest, abstract(self.fresh, self.mesh))
        self.history = {**self.history, **meta["history"]}
        self.saved = (latest, bool(self.checkpoints.metrics(latest)))
        self.progress.say(f"resumed from step {latest} of {self.place.checkpoints}")
        return state, latest, meta["cursor"]

    def _writers(self, start: int) -> Writers:
        resume = start if self.place.metrics.exists() else None
        self.jsonl = JsonlWriter(self.place.metrics, resume_step=start)
        writers: list[Any] = [self.jsonl, *self.loggers]
        try:
            for logger in self.config.run.loggers:
                if isinstance(logger, TensorBoard):
                    writers.append(TensorBoardWriter(self.place.path, resume_step=resume))
                elif isinstance(logger, Wandb):
                    names = {"project": logger.project, "entity": logger.entity, "name": self.config.run.name}
                    writers.append(WandbWriter(self.place.path, **names, config=self.task.resolved))
        except BaseException:
            Writers(writers).close()
            raise
        return Writers(writers)

    def _train(self, state: State, start: int, cursor: int, hooks: Sequence[Hook]) -> FinishedRun:
        config, task = self.config, self.task
        if start:
            self.writers.event(start, "resumed", f"on {describe_devices(self.mesh)}")
        if self._owed(start):
            snapshot = Snapshot(start, cursor, state)
            self._evaluate_hook(snapshot)
            if snapshot.stop:
                return self._conclude(Ended(state, start, cursor, snapshot.stop))
        if self._patience_spent():  # decided before the run was interrupted
            return self._conclude(Ended(state, start, cursor, _stopped(config.evaluate.stop)))
        if start < task.steps and self.accounting.programs:
            self.progress.compiling(self.accounting.programs[0])
        with contextlib.ExitStack() as stack:
            hooks = [*self._hooks(), *hooks]
            if profile := config.run.profile:
                folder = self.place.path / "profile"
                hooks += stack.enter_context(profiled(folder, profile.start, profile.steps))
            batches = stack.enter_context(Loader(task.source, cursor, config.batch.global_))
            ended = run_loop(
                self.step,
                state,
                batches,
                self.mesh,
                start=start,
                cursor=cursor,
                steps=task.steps,
                batch_size=config.batch.global_,
                window=config.run.log_every,
                hooks=hooks,
                on_window=self._on_window,
                poll=self._poll,
            )
        return self._conclude(ended)

    def _owed(self, start: int) -> bool:
        """Whether the run was interrupted after step `start` and before the evaluation that was due there."""
        due = "valid" in self.task.evaluations and start % self.config.evaluate.every == 0
        return 0 < start < self.task.steps and due and self.history["at"] < start

    def _patience_spent(self) -> bool:
        stop, history = self.config.evaluate.stop, self.history
        return stop is not None and history["metric"] == stop.metric and history["since"] >= stop.patience

    def _conclude(self, ended: Ended) -> FinishedRun:
        """After the last step: the last save and, unless interrupted, the final evaluation."""
        if ended.reason == "interrupted":
            self._save(ended.state, ended.step, ended.cursor, wait=True)
            self.writers.event(ended.step, "interrupted", f"{self.interrupt.signal}: saved at step {ended.step}")
            self.progress.say(f"saved at step {ended.step}; the same command goes on from there")
            return self._finish(ended.step, "interrupted", {})
        values = self._final(ended.state, ended.step, ended.cursor)
        if self.interrupt():
            return self._finish(ended.step, "interrupted", {})
        if ended.reason != "finished":
            self.writers.event(ended.step, "stopped", ended.reason)
        return self._finish(ended.step, "finished", values, reason=ended.reason)

    def _poll(self) -> bool:
        """Asked every step: raises the error of a save that failed, says whether someone asked to stop."""
        self.checkpoints.check()
        if not self.warm and self.compiles.count:  # the first step is done
            self.compiles.warm()
            self.warm = True
        return self.interrupt()

    def _hooks(self) -> list[Hook]:
        config = self.config
        hooks = []
        if "valid" in self.task.evaluations:
            hooks.append(Hook(config.evaluate.every, self._evaluate_hook))
        steps = config.checkpoint.every.steps
        hooks.append(Hook(steps or config.run.log_every, self._save_if_due))
        return hooks

    def _on_window(self, window: Window) -> dict[str, Any]:
        values = window.values(self.config.batch.global_, self.task.loss_weights)
        check_finite(values, window, self.config.nonfinite)
        if values["skipped"]:
            self.writers.event(window.last, "skipped", f"{values['skipped']} non-finite steps left out")
        again = self.compiles.again([*self.accounting.programs, "evaluate_step"])
        if again:
            text = ", ".join(f"{name} ({n} times)" for name, n in again.items())
            self.writers.event(window.last, "recompiled", f"after warm-up: {text}")
            self.progress.say(f"step {window.last}: recompiled after warm-up: {text}; do batches change shape?")
        self.compiles.warm()
        values["lr"] = float(self.lr[window.last - 1])
        values |= self.accounting.rates(window)
        scalars = {f"train/{name}": value for name, value in values.items() if isinstance(value, float | int)}
        self.writers.write(window.last, scalars)
        self.logged = window.last
        self.progress.step(window.last, self.task.steps, values)
        return values

    def _evaluate(self, params: Params, part: str, step: int, note: str = "") -> dict[str, float]:
        if self.evaluator.fresh:
            self.progress.compiling("evaluate_step")
        shards = batch_shards(self.mesh)
        size = -(-self.config.evaluate.batch // shards) * shards
        found = self.evaluator(params, self.task.evaluations[part](size), self.interrupt)
        values = {name: found[name] for name in self.config.evaluate.metrics}
        self.progress.evaluated(step, part, values, note)
        return {f"{part}/{name}": value for name, value in values.items()}

    def _evaluate_hook(self, snapshot: Snapshot) -> None:
        """Validation, early stopping, and a checkpoint where the best is kept."""
        snapshot.flush()
        try:
            values = self._evaluate(evaluated_params(snapshot.state), "valid", snapshot.step)
        except Interrupted:
            return
        self.writers.write(snapshot.step, values)
        self.values, self.values_step = values, snapshot.step
        stop, best = self.config.evaluate.stop, self.config.checkpoint.best
        metric = stop.metric if stop else best or self.config.evaluate.metrics[0]
        value, history = values[f"valid/{metric}"], self.history
        if history["metric"] != metric:
            history |= {**NO_HISTORY, "metric": metric, "wall_s": history["wall_s"]}
        if history["best"] is None or value > history["best"]:
            history |= {"best": value, "best_step": snapshot.step, "since": 0}
        elif snapshot.step > history["at"]:  # a step that is evaluated again does not count twice
            history["since"] += 1
        history["at"] = snapshot.step
        if stop and self._patience_spent():
            snapshot.stop = _stopped(stop)
        if best:
            self._save(snapshot.state, snapshot.step, snapshot.cursor)

    def _save_if_due(self, snapshot: Snapshot) -> None:
        seconds = self.config.checkpoint.every.seconds
        if seconds is None or time.monotonic() - self.saved_at >= seconds:
            snapshot.flush()
            self._save(snapshot.state, snapshot.step, snapshot.cursor)

    def _save(self, state: State, step: int, cursor: int, wait: bool = False) -> None:
        self.saved_at = time.monotonic()
        metrics = self.values if self.values_step == step else None
        # What was saved before it was evaluated is saved again, so that the best can be told.
        again = self.config.checkpoint.best is not None and metrics is not None and not self.saved[1]
        if step != self.saved[0] or again:
            meta = {
                "format": FORMAT,
                "cursor": cursor,
                "seed": self.config.run.seed,
                "config": self.task.resolved,
                "history": {**self.history, "wall_s": self._wall()},
            }
            self.checkpoints.save(step, state, meta, metrics)
            self.saved = (step, metrics is not None)
        if wait:
            self.checkpoints.wait()

    def _wall(self) -> float:
        return self.history["wall_s"] + time.time() - self.began

    def _final(self, state: State, step: int, cursor: int) -> dict[str, float]:
        """The last save, and validation and test with the parameters that are kept: the best, else the last."""
        evaluations = self.task.evaluations
        try:
            if "valid" in evaluations and self.values_step != step:
                self._evaluate_hook(Snapshot(step, cursor, state))
            self._save(state, step, cursor, wait=True)
            best = self.checkpoints.best() if self.config.checkpoint.best else None
            params, note = evaluated_params(state), ""
            if best is not None and best != step:
                params, note = self._kept(best, params), f"(best: step {best})"
            out: dict[str, float] = {"best_step": step if best is None else best}
            for part in ("valid", "test"):
                if part == "valid" and self.values_step == step and not note:
                    out |= self.values  # just evaluated, with these very parameters
                elif part in evaluations:
                    out |= self._evaluate(params, part, step, note)
            return out
        except Interrupted:
            self._save(state, step, cursor, wait=True)
            return {}

    def _kept(self, step: int, like: Params) -> Params:
        """The evaluated parameters of a checkpoint, without the rest of its state, placed as `like` is."""
        prefix = "extra/ema" if self.config.optimizer.ema else "params"
        params = self.checkpoints.load_params(step, prefix)
        if self.config.optimizer.frozen:
            params = join(params, self.checkpoints.load_params(step, "frozen"))
        return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, like)

    def _finish(self, step: int, state: str, values: Mapping[str, float], reason: str = "") -> FinishedRun:
        """Baselines, summary, report."""
        found: dict[str, Any] = {
            "name": self.config.run.name,
            "reason": reason,
            "step": step,
            "steps": self.task.steps,
            "wall_s": round(self._wall(), 2),
            "device": describe_devices(self.mesh),
            "seed": self.config.run.seed,
            **values,
        }
        if state == "finished":
            if values:
                self.writers.write(step, {k: v for k, v in values.items() if k.startswith("test/")})
            for name, figures in (self.task.baselines() if self.task.baselines else {}).items():
                found |= {f"baseline/{name}/{key}": value for key, value in figures.items()}
        summary, report = write_summary(self.place, state, found)
        if state == "finished":
            self.progress.table(summary, self.config.evaluate.metrics)
        self.progress.say(f"report: {report}")
        return FinishedRun(self.place.path, summary, state)

    def _failed(self, error: BaseException) -> None:
        step = max(self.saved[0], self.logged)
        values = {"name": self.config.run.name, "step": step, "device": describe_devices(self.mesh)}
        write_failure(self.place, error, values)


def _own_loggers(configs: Sequence[TensorBoard | Wandb | ByPath]) -> list[Writer]:
    """The loggers that come by import path, made before anything is written.

    Raises:
      UserError: one has no `write(step, values)`; wandb is asked for and not installed.
    """
    if any(isinstance(config, Wandb) for config in configs) and importlib.util.find_spec("wandb") is None:
        raise UserError("run.loggers: the wandb logger needs a package: pip install 'jaxops[wandb]'")
    loggers = []
    for config in (config for config in configs if isinstance(config, ByPath)):
        logger = config.call()
        what = f"run.loggers {config.fn}: write of what it returned ({type(logger).__name__})"
        require_callable(what, getattr(logger, "write", None), "step", "values")
        loggers.append(logger)
    return loggers
