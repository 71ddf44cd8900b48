"""`load` reads a trained model of any family from its run folder."""

import inspect
import os
from collections.abc import Callable
from typing import Any

from jaxops.core.failures import UserError
from jaxops.core.sums import Sums
from jaxops.run.batched import evaluate_now
from jaxops.run.build import config_from_dict
from jaxops.run.checkpoints import open_checkpoints
from jaxops.run.family import Given, Served, family_of
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.saved_run import SavedRun


def load(run_dir: str | os.PathLike[str], step: int | None = None) -> Served:
    """Loads the model of a run, ready to predict.

    Example:
      model = jaxops.load("runs/my-interactions")
      print(model.evaluate(("test",)))
      table = model.predict("users.parquet")

    Args:
      run_dir: a run folder, or its s3:// or gs:// URL.
      step: the step of the checkpoint to read; by default the best one where the run keeps it, else the latest.

    Raises:
      UserError: this is no run folder, it has no checkpoint or none of this step, or the checkpoint is damaged.
    """
    saved = open_saved_run(run_dir, step)
    return family_of(saved.config.task).load(saved)


def open_saved_run(run_dir: str | os.PathLike[str], step: int | None = None) -> SavedRun:
    """Opens a run's config and the weights of one checkpoint.

    Args:
      run_dir: a run folder, or its s3:// or gs:// URL.
      step: the step of the checkpoint to read; by default the best one where the run keeps it, else the latest.

    Raises:
      UserError: this is no run folder, it has no checkpoint or none of this step, or the checkpoint is damaged.
    """
    folder = RunFolder(run_dir)
    loaded = config_from_dict(folder.config(), source=folder.shown("config.yaml"), check_imports=False)
    keep = loaded.config.checkpoint
    with open_checkpoints(loaded.config, folder.checkpoints) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"{run_dir} has no checkpoint yet")
        if step is not None and step not in steps:
            raise UserError(f"{run_dir} has no checkpoint of step {step} (there are: {', '.join(map(str, steps))})")
        if step is None:
            kept = checkpoints.best() if keep.best else None
            step = kept if kept is not None else checkpoints.latest() or steps[-1]
        damage = [what for what in checkpoints.verify(step) if not what.startswith("no checksums")]
        if damage:
            others = ", ".join(str(other) for other in steps if other != step)
            raise UserError(
                f"{run_dir}: the checkpoint of step {step} is damaged: {'; '.join(damage[:3])}"
                + (f". There are others: --step {others}" if others else "")
            )
        return SavedRun(folder, loaded, step)


def evaluate_saved(
    saved: SavedRun, parts: tuple[str, ...] = ("valid", "test"), check: Callable[[Any], None] = lambda task: None
) -> dict[str, float]:
    """Returns metrics on the run's own data, as `part/metric`, computed on the devices of this machine.

    `check` gets the task that is built again, and refuses data that have changed; data whose digests are others than
    those that the run wrote down are refused in any case, as training on refuses them.

    Raises:
      UserError: the data cannot be opened, have changed, or `check` refuses them.
    """
    task = family_of(saved.config.task).build(saved.loaded, Given(objective=lambda *_: _no_objective))
    check(task)
    if differs := saved.folder.other_data(task.inspection):
        raise UserError(
            f"{saved.folder.where}: the run's data has changed since ({differs}): what training saw may be among the"
            " targets now. Evaluate on the data as it was, or with --other-data on what is there now without what"
            " training saw"
        )
    return evaluate_now(task, saved.mesh, saved.placed(saved.passes(task.tables, 512)), parts)


def evaluate_other(served: Any, say: Callable[[str], None]) -> dict[str, float]:
    """Metrics on what lies at a run's data now, without what training saw of it; `say` gets what was left out.

    Raises:
      UserError: the run's family cannot tell what training saw, or the data cannot be opened.
    """
    if "other_data" not in inspect.signature(served.evaluate).parameters:
        raise UserError(f"--other-data: task {served.saved.config.task} evaluates on the run's own data alone")
    found: dict[str, float] = served.evaluate(other_data=True, say=say)
    return found


def _no_objective(params: Any, batch: Any, key: Any) -> Sums:
    raise AssertionError("evaluation needs no objective")
