"""One run from its first step to its report, with the state that the hooks of the loop share.

Resume is the default: the same task in the same folder continues from the newest good checkpoint with the same global
batches. Tested in tests/run/test_resume.py (bitwise on the same mesh) and tests/recovery/.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxops.config.dump import dump_yaml
from jaxops.core import distributed
from jaxops.core.alarms import PAUSED, Alarms
from jaxops.core.compiles import Compiles
from jaxops.core.evaluation import Interrupted
from jaxops.core.failures import RunFailed
from jaxops.core.flight import OpenWindow
from jaxops.core.interrupt import Interrupt
from jaxops.core.journal import Journal
from jaxops.core.loop import Ended, Hook, Snapshot, Window, check_finite, run_loop
from jaxops.core.memory import explained
from jaxops.core.mesh import describe_devices
from jaxops.core.optimizer import build_schedule
from jaxops.core.profiler import profiled
from jaxops.core.recovery import GoBack, Spikes
from jaxops.core.rows import global_arrays, local_rows
from jaxops.core.sharding import place as placements
from jaxops.core.step import Step
from jaxops.core.watch import Watch
from jaxops.data.loader import Loader
from jaxops.run.accounting import Accounting, memory_line
from jaxops.run.attempts import Attempts, attempt_facts
from jaxops.run.checkpoints import open_checkpoints
from jaxops.run.ending import finish
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.open_window import window_from_json, window_to_json
from jaxops.run.progress import Progress
from jaxops.run.recording import open_writers, own_loggers, write_window
from jaxops.run.rescue import Rescue
from jaxops.run.saving import Position, Saving
from jaxops.run.summary import FinishedRun, about_of, write_failure
from jaxops.run.task import StepParts, Task
from jaxops.run.training import Training, abstract, abstract_batch
from jaxops.run.validation import Validation, short_epochs, undefined_notices
from jaxops.run.warm_start import first_state
from jaxops.run.weights import served_weights


class TrainingRun:
    """The state of one call of `fit` that the hooks share; it lives as long as the call."""

    def __init__(
        self,
        task: Task,
        mesh: Mesh,
        folder: RunFolder,
        progress: Progress,
        training: Training,
        accumulation: int,
    ):
        self.task, self.config, self.mesh, self.folder, self.progress = task, task.config, mesh, folder, progress
        self.fresh, self.tables = training.fresh, training.tables
        self.parts = StepParts(training.update, training.fresh, mesh, folder.dir)
        self.step: Step = training.update if task.step is None else task.step(self.parts)
        self.accounting = Accounting(task, mesh, accumulation)
        self.notices = [*undefined_notices(task), *short_epochs(task)]
        self.interrupt = Interrupt(progress.say)
        self.compiles = Compiles(on_compile=progress.compiled)
        self.rescue = Rescue(task, mesh, folder, progress.warn)
        self.watch = Watch(folder.path, progress.warn, self._ended)
        self.validation = Validation(task, mesh, progress, self.watch.at)
        self.alarms = Alarms(task.alarms)
        # All rates are computed here: to fetch one in the middle of a run would wait for every step before it.
        with jax.numpy_dtype_promotion("standard"):  # optax trips strict promotion
            rates = build_schedule(self.config.optimizer, task.steps)(jnp.arange(task.steps))
        self.lr = np.broadcast_to(rates, task.steps)
        self.began = time.monotonic()
        self.window: OpenWindow | None = None
        self.wall_before = 0.0
        self.rollbacks: list[dict[str, Any]] = []
        spike = self.config.rollback.spike
        self.spikes = Spikes(spike.zscore, spike.windows) if spike else None
        self.loggers = own_loggers(self.config.run.loggers)
        self.attempts = Attempts(folder, attempt_facts())
        self.warm = False
        self.logged = 0
        self.memory = ""
        self.recorded: Callable[[], None] = lambda: None

    def measure(self) -> None:
        """Traces the whole step, so that an error in an objective or a rule is raised before anything is written."""
        state = abstract(self.fresh, self.mesh)
        self.accounting.measure(self.step, state, abstract_batch(self.task, self.tables))
        self.memory = memory_line(state, self.task.models)

    def go(self, hooks: Sequence[Hook]) -> FinishedRun:
        """Runs the task to its end, with these hooks beside its own; a failure is recorded in the folder and raised."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.watch)
            stack.enter_context(self._explained())
            checkpoints = open_checkpoints(self.config, self.folder.checkpoints, self.folder.push)
            stack.enter_context(checkpoints)
            self.saving = Saving(self.task, self.mesh, checkpoints, self.fresh, self._history)
            at = self._begin()
            if self.task.step is not None:
                # Without a checkpoint a run that has begun goes on from step 0, and what it was answered still holds.
                begun = distributed.run_on_primary("look for the run", lambda: self.folder.exists)
                self.parts.journal = stack.enter_context(Journal(self.folder.dir, fresh=not begun))
            distributed.run_on_primary("find a place for the rescue", self.rescue.require_free)
            distributed.run_on_primary("write the run folder", self._write_folder)
            self.watch.begin()
            self._open_writers(at.step, self._evaluates_first(at.step))
            try:
                stack.enter_context(self.interrupt.installed())
                stack.enter_context(self.compiles.watching())
                return self._train(at, hooks)
            except BaseException as error:
                self._failed(error)
                raise
            finally:
                self.progress.rest()
                self.writers.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns errors of the backend into explained ones: out of memory, or another process that is gone."""
        try:
            with explained(lambda: abstract(self.fresh, self.mesh)):
                yield
        except jax.errors.JaxRuntimeError as error:
            told = distributed.explain_lost(error, self.watch.where())
            if told is error:
                raise
            self._failed(told)
            raise told from error

    def _begin(self) -> Position:
        """Returns the position to continue from: the newest good checkpoint, else a fresh state."""
        self.progress.say(
            f"{self.config.run.name}: {describe_devices(self.mesh)}, {self.accounting.describe(self.step)}"
        )
        self.progress.say(self.memory)
        for notice in (*self.task.notices, *self.notices):
            self.progress.say(notice)
        for placement in placements(self.task.model.shapes, self.task.rules, self.mesh):
            if placement.dropped:
                self.progress.say(f"sharding of {placement.path} {placement.shape}: {'; '.join(placement.dropped)}")
        self.watch.at("restore")
        at = self._restored()
        if at is not None:
            self.progress.say(f"resumed from step {at.step} of {self.folder.checkpoints}")
            return at
        return self._beginning()

    def _beginning(self) -> Position:
        """Returns the position before the first step: a fresh state with all weights that it takes from elsewhere."""
        self.alarms.restore(None)
        specs = self.tables.specs if self.tables else {}
        return Position(first_state(self.fresh(), self.task, specs, self.progress.say), 0, 0)

    def _restored(self) -> Position | None:
        found = self.saving.restore(self.progress.warn)
        if found is None:
            return None
        at, history = found
        self.wall_before = history["wall_s"]
        self.rollbacks = list(history.get("rollbacks", ()))
        self.validation.history |= {name: history[name] for name in self.validation.history}
        self.window = window_from_json(history.get("window"))
        self.alarms.restore(history.get("alarms"))
        return at

    def _history(self) -> dict[str, Any]:
        found = {**self.validation.history, "wall_s": self._wall(), "rollbacks": self.rollbacks}
        found |= {"alarms": self.alarms.history} if self.alarms.on else {}
        return found if self.window is None else {**found, "window": window_to_json(self.window)}

    def _evaluates_first(self, step: int) -> bool:
        """Returns true if a run resumed at `step` begins with an evaluation of it, or ends with one at once."""
        return step >= self.task.steps or self.validation.missed_evaluation(step) or bool(self._stop_reason())

    def _stop_reason(self) -> str | None:
        """Returns why the run ends before its last step, or None."""
        return self.validation.stop_reason() or self.alarms.stop_reason()

    def _write_folder(self) -> None:
        if not self.folder.exists:
            self.folder.create(self.task.resolved, self.task.transform, self.task.inspection)
        self.folder.write_about(about_of(self.task))  # what an older version did not write yet
        self.folder.write_text("config.yaml", dump_yaml(self.task.resolved))  # what a resumed run may change
        self.attempts.begin()
        self.recorded()

    def _open_writers(self, step: int, evaluates_again: bool = False) -> None:
        resumed = self.folder.metrics.exists()
        self.writers = open_writers(
            self.config, self.task.resolved, self.folder, self.loggers, step, resumed, evaluates_again
        )

    def _train(self, at: Position, hooks: Sequence[Hook]) -> FinishedRun:
        if at.step:
            self.writers.event(at.step, "resumed", f"on {describe_devices(self.mesh)}")
        if self.validation.missed_evaluation(at.step):
            snapshot = Snapshot(at.step, at.cursor, at.state)
            self._evaluate_hook(snapshot)
            if snapshot.stop:
                return self._conclude(Ended(*at, snapshot.stop))
        if reason := self._stop_reason():  # decided before the run was interrupted
            return self._conclude(Ended(*at, reason))
        if at.step < self.task.steps and self.accounting.programs:
            self.progress.compiling(self.accounting.programs[0])
        with contextlib.ExitStack() as stack:
            hooks = [*self._hooks(), *hooks]
            if profile := self.config.run.profile:
                folder = self.folder.path / "profile"
                hooks += stack.enter_context(profiled(folder, profile.start, profile.steps))
            while True:
                try:
                    ended = self._loop(at, hooks)
                    break
                except GoBack as bad:
                    at = self._go_back(bad)
        return self._conclude(ended)

    def _loop(self, at: Position, hooks: Sequence[Hook]) -> Ended:
        size = self.config.batch.global_
        self.watch.at("train")
        plan = self.tables.plan if self.tables else None
        begun, self.window = self.window, None
        rows, place = (
            functools.partial(local_rows, self.mesh),
            functools.cache(functools.partial(global_arrays, self.mesh)),
        )
        with Loader(self.task.source, at.cursor, size, rows=rows, finish=plan) as loader:
            return run_loop(
                self.step,
                at.state,
                lambda cursor, size: place(size)(loader.take(cursor, size)),
                self.mesh,
                start=at.step,
                cursor=at.cursor,
                steps=self.task.steps,
                batch_size=size,
                window=self.config.run.log_every,
                hooks=hooks,
                on_window=self._on_window,
                poll=self._poll,
                on_step=self._on_step,
                begun=begun,
                on_open=self._check,
            )

    def _go_back(self, bad: GoBack) -> Position:
        """Returns to the last good checkpoint (or the beginning) with the cursor past the bad batches, and saves that.

        Raises:
          RunFailed: the run has gone back as often as the config allows.
        """
        most = self.config.rollback.most
        if len(self.rollbacks) >= most:
            raise RunFailed(
                f"{bad.why}; the run went back {most} times already (rollback.most). Look at the batches of"
                f" {self.folder.metrics}'s rollback events; lower optimizer.lr or set optimizer.clip"
            )
        past = bad.cursor
        rollbacks = [*self.rollbacks, {"step": bad.first, "cursor": past, "why": bad.why}]
        self.writers.close()
        self.watch.at("roll back")
        to = self._restored() or self._beginning()
        self.rollbacks = rollbacks
        self._open_writers(to.step)
        text = (
            f"{bad.why}: back to step {to.step}, without the examples before {past:,}"
            f" ({len(rollbacks)} of {most} times)"
        )
        self.writers.event(to.step, "rollback", text)
        self.progress.warn(text)
        at = Position(to.state, to.step, past)
        self.saving.save(at, self.saving.metrics(to.step) if to.step == self.saving.last else None, again=True)
        return at

    def _conclude(self, ended: Ended) -> FinishedRun:
        """Ends the run after its last step: the last save and, unless interrupted, the final evaluation."""
        at = Position(ended.state, ended.step, ended.cursor)
        if ended.reason == "interrupted":
            self.window = ended.window
            self._save(at, wait=True, again=self._stopped == PAUSED)  # with the alarm, else it would pause there again
            self.writers.event(ended.step, self._stopped, f"{self.interrupt.signal}: saved at step {ended.step}")
            self.progress.say(f"saved at step {ended.step}; the same command goes on from there")
            return self._finish(ended.step, self._stopped, {}, self._pause_reason())
        values = self._final(at)
        if self.interrupt.signal is not None:
            return self._finish(ended.step, self._stopped, {}, self._pause_reason())
        if ended.reason != "finished":
            self.writers.event(ended.step, "stopped", ended.reason)
        return self._finish(ended.step, "finished", values, reason=ended.reason)

    @property
    def _stopped(self) -> str:
        """The state of a run that was asked to stop. A scheduler sends SIGTERM, a person at a keyboard SIGINT."""
        return {"SIGTERM": "preempted", PAUSED: PAUSED}.get(str(self.interrupt.signal), "interrupted")

    def _pause_reason(self) -> str:
        return self.alarms.raised[-1]["text"] if self._stopped == PAUSED else ""

    def _poll(self) -> bool:
        """Returns whether the run was asked to stop; called at every step. Raises the error of a save that failed."""
        with self.rescue.tolerated():
            self.saving.check()
        self.folder.poll()
        if not self.warm and self.compiles.count:  # the first step is done
            self.compiles.warm()
            self.warm = True
        return self.interrupt()

    def _on_step(self, step: int) -> None:
        self.watch.step = step
        self.progress.at(step, self.task.steps)

    def _hooks(self) -> list[Hook]:
        hooks = [Hook(self.validation.every, self._evaluate_if_due, True)] if self.validation.on else []
        hooks.append(Hook(self.saving.every, self._save_if_due, True))
        return [*hooks, Hook(self.config.run.log_every, self._stop_if_alarmed)] if self.alarms.on else hooks

    def _stop_if_alarmed(self, snapshot: Snapshot) -> None:
        snapshot.stop = snapshot.stop or self.alarms.stop_reason()

    def _heed(self, step: int, values: Mapping[str, Any]) -> None:
        """Says the new alarms in the metrics of a step, and has the run paused where the config wants that.

        All processes see the same metrics at the same step, so they all ask for the pause.
        """
        new = self.alarms.see(step, {name: x for name, x in values.items() if isinstance(x, float | int)})
        for alarm in new:
            with self.rescue.tolerated():
                self.writers.event(step, "alarm", f"{alarm.text} ({alarm.rule})")
            if distributed.is_primary():
                self.progress.warn(f"step {step}: {alarm.text} ({alarm.rule})")
        if new and self.alarms.pauses:
            self.interrupt.request(PAUSED)

    def _check(self, window: Window) -> dict[str, Any]:
        """The values of a window, if all of its steps are good; raises as `check_finite`."""
        values = window.values(self.task.loss_weights)
        check_finite(values, window, self.config.nonfinite)
        return values

    def _on_window(self, window: Window) -> dict[str, Any]:
        values = self._check(window)
        if self.spikes and (score := self.spikes(values["loss"])) is not None:
            why = f"the loss leapt to {values['loss']:.4g} in steps {window.first + 1} to {window.last} (z {score:.1f})"
            raise GoBack(window.first + 1, window.last, window.cursor_after(window.last), why)
        again = self.compiles.again([*self.accounting.programs, "evaluate_step"])
        self.compiles.warm()
        values["lr"] = float(self.lr[window.last - 1])
        values |= self.accounting.rates(window)
        with self.rescue.tolerated():
            write_window(self.writers, window.last, values, again, self.progress.say)
        self.logged = window.last
        self.progress.step(window.last, self.task.steps, values)
        self._heed(window.last, {f"train/{name}": value for name, value in values.items()})
        return values

    def _evaluate_if_due(self, snapshot: Snapshot) -> None:
        if self.validation.due():
            self._evaluate_hook(snapshot)

    def _evaluate_hook(self, snapshot: Snapshot) -> None:
        """Evaluates on validation, decides on early stopping, and saves where the best checkpoint is kept."""
        snapshot.flush()
        try:
            weights = served_weights(snapshot.state)
            values = self.validation.evaluate(weights, "valid", snapshot.step, self.interrupt)
        except Interrupted:
            return
        with self.rescue.tolerated():
            self.writers.write(snapshot.step, values)
            self.writers.samples(snapshot.step, self.validation.samples)
        self._heed(snapshot.step, values)
        snapshot.stop = self.validation.record(snapshot.step, values) or self.alarms.stop_reason()
        if self.config.checkpoint.best:
            self._save(Position(snapshot.state, snapshot.step, snapshot.cursor))

    def _save_if_due(self, snapshot: Snapshot) -> None:
        if self.saving.due():
            snapshot.flush()
            self._save(Position(snapshot.state, snapshot.step, snapshot.cursor))

    def _save(self, at: Position, wait: bool = False, again: bool = False) -> None:
        before = self.watch.at("save")
        metrics = self.validation.values if self.validation.step == at.step else None
        self.rescue.require_folder(at, metrics, self.fresh, self._history)
        self.writers.flush()  # a checkpoint is never ahead of its records
        if self.task.step is not None and (oldest := self.saving.oldest()) is not None:
            self.parts.journal.trim(oldest)
        self.saving.save(at, metrics, wait=wait, again=again)
        if distributed.is_primary():
            self.attempts.update()
        self.watch.at(before)

    def _wall(self) -> float:
        return self.wall_before + time.monotonic() - self.began

    def _final(self, at: Position) -> dict[str, float]:
        """Saves a last time and returns the metrics on validation and test of the parameters that are kept.

        These are the best on validation where the run keeps them, else the last.
        """
        try:
            if self.validation.on and self.validation.step != at.step:
                self._evaluate_hook(Snapshot(at.step, at.cursor, at.state))
            self._save(at, wait=True)
            best = self.saving.best()
            weights, note = served_weights(at.state), ""
            if best is not None and best != at.step:
                weights, note = self.saving.weights_of(best, weights), f"(best: step {best})"
            out: dict[str, float] = {"best_step": at.step if best is None else best}
            for part in ("valid", "test"):
                if part == "valid" and self.validation.step == at.step and not note:
                    out |= self.validation.values  # just evaluated, with these very parameters
                elif part in self.task.evaluation.parts:
                    out |= self.validation.evaluate(weights, part, at.step, self.interrupt, note)
                    self.writers.samples(at.step, self.validation.samples)
            return out
        except Interrupted:
            self._save(at, wait=True)
            return {}

    def _finish(self, step: int, state: str, values: Mapping[str, float], reason: str = "") -> FinishedRun:
        """Writes summary and report on process 0, with the baselines where the run is finished."""
        self.watch.at("summary")
        if distributed.is_primary():
            self.attempts.update(state)
        found: dict[str, Any] = {
            "name": self.config.run.name,
            "reason": reason,
            "step": step,
            "steps": self.task.steps,
            "wall_s": round(self._wall(), 2),
            "device": describe_devices(self.mesh),
            "seed": self.config.run.seed,
            **({"rollbacks": len(self.rollbacks)} if self.rollbacks else {}),
            **({"alarms": self.alarms.raised} if self.alarms.raised else {}),
            **values,
            **(self.validation.plots if values else {}),
        }
        return finish(self.task, self.folder, self.writers, self.progress, state, found)

    def _ended(self, why: str) -> None:
        """Records that another process has failed, before this one leaves."""
        self._failed(RunFailed(why))
        self.folder.leave()

    def _failed(self, error: BaseException) -> None:
        if distributed.is_primary():
            step = max(self.saving.last, self.logged)
            values = {"name": self.config.run.name, "step": step, "device": describe_devices(self.mesh)}
            self.attempts.update("failed")
            write_failure(self.folder, error, values)
