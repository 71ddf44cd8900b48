"""From a task to a finished run: mesh, state, resume, the loop, evaluation, checkpoints, summary and report.

Resume is the default: the same task in the same folder goes on from the newest checkpoint with the same global
batches. Held by tests/tasks/test_resume.py (bitwise on the same mesh).
"""

import dataclasses
import importlib.metadata
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxops.config.types import ByPath
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.compiles import Compiles
from jaxops.core.evaluation import Evaluator, Interrupted, evaluated_params
from jaxops.core.interrupt import Interrupt
from jaxops.core.loop import Hook, Snapshot, Window, check_finite, run_loop
from jaxops.core.mesh import batch_shards, describe_devices, make_mesh
from jaxops.core.optimizer import build_schedule
from jaxops.core.state import State
from jaxops.core.step import Step, abstract_state
from jaxops.core.writers import JsonlWriter, TensorBoardWriter, WandbWriter, Writers
from jaxops.data.loader import Loader
from jaxops.tasks.accounting import Accounting
from jaxops.tasks.config import TensorBoard, Wandb
from jaxops.tasks.progress import Progress
from jaxops.tasks.run_folder import SUMMARY_VERSION, RunFolder
from jaxops.tasks.task import Task
from jaxops.tasks.training import accumulation_of, build_training

FORMAT = 1
"""Of the metadata in a checkpoint."""
VERSIONS = ("jaxops", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
"""Packages whose versions a run's summary holds."""


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

    Args:
      mesh: by default the config's, over all devices.
      hooks: made by `jaxops.every`.
      folder: the run folder, by default `run.dir/run.name`.

    Raises:
      UserError: the config does not fit the machine or the folder.
      RunFailed: a non-finite loss, out of memory, a lost save.
    """
    config = task.config
    mesh = mesh or make_mesh(**dataclasses.asdict(config.mesh))
    place = RunFolder(folder or Path(config.run.dir) / config.run.name)
    resuming = place.check(task.resolved)
    progress = Progress(quiet)
    with jax.set_mesh(mesh):
        accumulation = accumulation_of(task, mesh)
        built, fresh = build_training(task, mesh, accumulation)
        run = _Run(task, mesh, place, progress, step or built, fresh, accumulation)
        if not resuming:
            place.create(task.resolved, task.transform, task.inspection)
        with place.locked():
            return run.go(resuming, hooks)


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
        self.evaluator = Evaluator(task.metrics, mesh, jnp.dtype(self.config.precision.compute))
        self.schedule = build_schedule(self.config.optimizer, task.steps)
        self.programs = ["train_step", "evaluate_step"]
        self.began = time.time()
        self.saved_at = time.monotonic()
        self.saved_step = -1
        self.history: dict[str, Any] = {"best": None, "best_step": None, "since": 0, "wall_s": 0.0}
        self.values: dict[str, float] = {}
        self.values_step = -1

    def go(self, resuming: bool, hooks: Sequence[Hook]) -> FinishedRun:
        summary = self.place.summary()
        if resuming and summary.get("state") == "finished" and summary.get("step", 0) >= self.task.steps:
            self.progress.say(f"{self.place.path} is finished (step {summary['step']}); nothing to do")
            self.progress.table(summary, self.config.evaluate.metrics)
            self.progress.say(f"report: {self.place.path / 'report.html'}")
            return FinishedRun(self.place.path, summary, "finished")
        keep = self.config.checkpoint
        best = f"valid/{keep.best}" if keep.best else None
        with Checkpoints(
            self.place.checkpoints, keep=keep.keep, keep_every=keep.keep_every, best=best
        ) as self.checkpoints:
            state, start, cursor = self._begin()
            self.writers = self._writers(start)
            try:
                with self.interrupt.installed(), self.compiles.watching():
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
        state = self.fresh()
        latest = self.checkpoints.latest_good(self.progress.say)
        if latest is None:
            return state, 0, 0
        meta = self.checkpoints.meta(latest)
        state = self.checkpoints.restore(latest, abstract_state(state))
        self.history = {**self.history, **meta["history"]}
        self.saved_step = latest
        self.progress.say(f"resumed from step {latest} of {self.place.checkpoints}")
        return state, latest, meta["cursor"]

    def _writers(self, start: int) -> Writers:
        resume = start or None
        self.jsonl = JsonlWriter(self.place.metrics, resume_step=start)
        writers: list[Any] = [self.jsonl]
        for logger in self.config.run.loggers:
            if isinstance(logger, TensorBoard):
                writers.append(TensorBoardWriter(self.place.path, resume_step=resume))
            elif isinstance(logger, Wandb):
                writers.append(
                    WandbWriter(
                        self.place.path,
                        project=logger.project,
                        entity=logger.entity,
                        name=self.config.run.name,
                        config=self.task.resolved,
                    )
                )
            else:
                assert isinstance(logger, ByPath)
                writers.append(logger.call())
        return Writers(writers)

    def _train(self, state: State, start: int, cursor: int, hooks: Sequence[Hook]) -> FinishedRun:
        config, task = self.config, self.task
        self.abstract = abstract_state(state)
        if start:
            self.writers.event(start, "resumed", f"on {describe_devices(self.mesh)}")
        if start < task.steps:
            self.progress.compiling("train_step")
        with Loader(task.source, cursor, config.batch.global_) as batches:
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
                hooks=[*self._hooks(), *hooks],
                on_window=self._on_window,
                poll=self.interrupt,
            )
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

    def _hooks(self) -> list[Hook]:
        config = self.config
        hooks = []
        if "valid" in self.task.evaluations:
            hooks.append(Hook(config.evaluate.every, self._evaluate_hook))
        steps = config.checkpoint.every.steps
        hooks.append(Hook(steps or config.run.log_every, self._save_if_due))
        if config.run.profile:
            hooks += profile_hooks(config.run.profile, self.place.path / "profile")
        return hooks

    def _on_window(self, window: Window) -> dict[str, Any]:
        values = window.values(self.config.batch.global_, self.task.loss_weights)
        check_finite(values, window, self.config.nonfinite)
        if values["skipped"]:
            self.writers.event(window.last, "skipped", f"{values['skipped']} non-finite steps left out")
        again = self.compiles.again(self.programs)
        if again:
            text = ", ".join(f"{name} ({n} times)" for name, n in again.items())
            self.writers.event(window.last, "recompiled", f"after warm-up: {text}")
            self.progress.say(f"step {window.last}: recompiled after warm-up: {text}; do batches change shape?")
        self.compiles.warm()
        if self.accounting.flops is None:
            self.accounting.measure(self.step, self.abstract, self.task.source.batch(0, self.config.batch.global_))
        values["lr"] = float(self.schedule(jnp.asarray(window.last - 1)))
        values |= self.accounting.rates(window)
        scalars = {f"train/{name}": value for name, value in values.items() if isinstance(value, float | int)}
        self.writers.write(window.last, scalars)
        self.progress.step(window.last, self.task.steps, values)
        return values

    def _evaluate(self, state: State, part: str, step: int, note: str = "") -> dict[str, float]:
        if self.evaluator.fresh:
            self.progress.compiling("evaluate_step")
        shards = batch_shards(self.mesh)
        size = -(-self.config.evaluate.batch // shards) * shards
        found = self.evaluator(evaluated_params(state), self.task.evaluations[part](size), self.interrupt)
        values = {name: found[name] for name in self.config.evaluate.metrics}
        self.progress.evaluated(step, part, values, note)
        return {f"{part}/{name}": value for name, value in values.items()}

    def _evaluate_hook(self, snapshot: Snapshot) -> None:
        """Validation, early stopping, and a checkpoint where the best is kept."""
        try:
            values = self._evaluate(snapshot.state, "valid", snapshot.step)
        except Interrupted:
            return
        self.writers.write(snapshot.step, values)
        self.values, self.values_step = values, snapshot.step
        stop, best = self.config.evaluate.stop, self.config.checkpoint.best
        metric = stop.metric if stop else best or self.config.evaluate.metrics[0]
        value, history = values[f"valid/{metric}"], self.history
        if history["best"] is None or value > history["best"]:
            history |= {"best": value, "best_step": snapshot.step, "since": 0}
        else:
            history["since"] += 1
        if stop and history["since"] >= stop.patience:
            snapshot.stop = f"no better valid/{metric} in {stop.patience} evaluations"
        if best:
            snapshot.flush()
            self._save(snapshot.state, snapshot.step, snapshot.cursor)

    def _save_if_due(self, snapshot: Snapshot) -> None:
        seconds = self.config.checkpoint.every.seconds
        if seconds is None or time.monotonic() - self.saved_at >= seconds:
            snapshot.flush()
            self._save(snapshot.state, snapshot.step, snapshot.cursor)

    def _save(self, state: State, step: int, cursor: int, wait: bool = False) -> None:
        self.saved_at = time.monotonic()
        if step != self.saved_step:
            meta = {
                "format": FORMAT,
                "cursor": cursor,
                "seed": self.config.run.seed,
                "config": self.task.resolved,
                "history": {**self.history, "wall_s": self._wall()},
            }
            metrics = self.values if self.values_step == step else None
            self.checkpoints.save(step, state, meta, metrics)
            self.saved_step = step
        if wait:
            self.checkpoints.wait()

    def _wall(self) -> float:
        return self.history["wall_s"] + time.time() - self.began

    def _final(self, state: State, step: int, cursor: int) -> dict[str, float]:
        """The last save, and validation and test with the parameters that are kept: the best, else the last."""
        evaluations = self.task.evaluations
        try:
            if "valid" in evaluations and self.values_step != step:
                self._evaluate_hook(Snapshot(step, cursor, state, {}))
            self._save(state, step, cursor, wait=True)
            best = self.checkpoints.best() if self.config.checkpoint.best else None
            note = ""
            if best is not None and best != step:
                state, note = self.checkpoints.restore(best, abstract_state(state)), f"(best: step {best})"
            out: dict[str, float] = {"best_step": step if best is None else best}
            for part in ("valid", "test"):
                if part == "valid" and self.values_step == step and not note:
                    out |= self.values  # just evaluated, with these very parameters
                elif part in evaluations:
                    out |= self._evaluate(state, part, step, note)
            return out
        except Interrupted:
            self._save(state, step, cursor, wait=True)
            return {}

    def _finish(self, step: int, state: str, values: Mapping[str, float], reason: str = "") -> FinishedRun:
        """Baselines, summary, report."""
        summary: dict[str, Any] = {
            "version": SUMMARY_VERSION,
            "name": self.config.run.name,
            "state": state,
            "reason": reason,
            "step": step,
            "steps": self.task.steps,
            "wall_s": round(self._wall(), 2),
            "device": describe_devices(self.mesh),
            "finished": time.time(),
            "versions": {name: _version(name) for name in VERSIONS},
            "seed": self.config.run.seed,
            "command": " ".join(["jaxops", *sys.argv[1:]]) if sys.argv[0].endswith("jaxops") else "jaxops.fit",
            **values,
        }
        if state == "finished":
            if values:
                self.writers.write(step, {k: v for k, v in values.items() if k.startswith("test/")})
            for name, figures in (self.task.baselines() if self.task.baselines else {}).items():
                summary |= {f"baseline/{name}/{key}": value for key, value in figures.items()}
        self.place.write_json("summary.json", summary)
        from jaxops.report.page import write_report  # matplotlib takes a second to import

        report = write_report(self.place.path)
        if state == "finished":
            self.progress.table(summary, self.config.evaluate.metrics)
        self.progress.say(f"report: {report}")
        return FinishedRun(self.place.path, summary, state)

    def _failed(self, error: BaseException) -> None:
        """Leaves word of why the run ended, without getting in the way of the error itself."""
        summary = {
            "version": SUMMARY_VERSION,
            "name": self.config.run.name,
            "state": "failed",
            "reason": f"{type(error).__name__}: {error}".split("\n")[0],
            "step": max(self.saved_step, 0),
            "device": describe_devices(self.mesh),
        }
        try:
            self.place.write_json("summary.json", summary)
        except OSError as lost:
            self.progress.say(f"summary.json could not be written: {lost}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def profile_hooks(profile: Any, folder: Path) -> list[Hook]:
    """Hooks that trace `profile.steps` steps after step `profile.start`, once."""
    start = max(profile.start, 1)
    running: list[bool] = []

    def begin(snapshot: Snapshot) -> None:
        if snapshot.step == start and not running:
            jax.profiler.start_trace(str(folder))
            running.append(True)

    def end(snapshot: Snapshot) -> None:
        if snapshot.step == start + profile.steps and running:
            jax.block_until_ready(snapshot.state.step)
            jax.profiler.stop_trace()

    return [Hook(start, begin), Hook(start + profile.steps, end)]
