"""`load` reads a trained model of any family from its run folder."""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

from jaxops.core.failures import UserError
from jaxops.core.sums import Sums
from jaxops.run.batched import evaluate_now
from jaxops.run.build import config_from_dict
from jaxops.run.checkpoints import open_checkpoints
from jaxops.run.family import Family, Given, Served, family_of, guarded_schemas
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.saved_run import SavedRun
from jaxops.run.trust import trust_of, without_places


def load(
    run_dir: str | os.PathLike[str],
    step: int | None = None,
    *,
    trust: Sequence[str] = (),
    accept_code: bool = False,
) -> Served:
    """Loads the model of a run, from the best checkpoint where the run keeps one, else the latest, or from `step`.

    Example:
      model = jaxops.load("runs/my-interactions")
      print(model.evaluate(("test",)))
      table = model.predict("users.parquet")

    Args:
      run_dir: a run folder, or its s3:// or gs:// URL.
      step: the step of the checkpoint to read.
      trust: import paths, or the beginnings of some ("mypkg"), that may be imported though the run is somebody
        else's; all that a run of one's own names may be.
      accept_code: take code that has changed since the run was trained.

    Raises:
      UserError: not a run folder, no checkpoint, a broken one, or no such step; code that is not trusted or has
        changed.
    """
    return serve(open_saved_run(run_dir, step, trust=trust, accept_code=accept_code))


def serve(saved: SavedRun) -> Served:
    """Returns the model of a run, put together by its family.

    Raises:
      UserError: there is no such family, or code is not trusted or has changed.
    """
    served = family_of(saved.config.task, saved.trust).load(saved)
    saved.check_code()
    return served


def saved_family(run_dir: str | os.PathLike[str], trust: Sequence[str] = ()) -> Family:
    """Returns the family of a run, for the options of its commands.

    Raises:
      UserError: not a run folder, no such family, or one by an import path that is not trusted.
    """
    folder = RunFolder(run_dir)
    values = folder.config()
    return family_of(str(values.get("task")), trust_of(values, folder.where, trust))


def open_saved_run(
    run_dir: str | os.PathLike[str],
    step: int | None = None,
    *,
    trust: Sequence[str] = (),
    accept_code: bool = False,
) -> SavedRun:
    """Opens a run's config and weights: the best checkpoint where it keeps one, else the latest, or `step`.

    Args:
      run_dir: a run folder, or its s3:// or gs:// URL.
      step: the step of the checkpoint to read.
      trust: as `load`.
      accept_code: as `load`.

    Raises:
      UserError: not a run folder, no checkpoint, a broken one, or no such step; a family by an import path that is
        not trusted.
    """
    folder = RunFolder(run_dir)
    values = folder.config()
    trusted, left_out = trust_of(values, folder.where, trust), list[str]()
    if not trusted.own and (task := values.get("task")) in guarded_schemas(trusted):
        values, left_out = without_places(values, family_of(str(task), trusted).writes)
    loaded = config_from_dict(values, source=folder.shown("config.yaml"), guard=trusted)
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
        return SavedRun(folder, loaded, step, trusted, accept_code, tuple(left_out))


def evaluate_saved(
    saved: SavedRun, parts: tuple[str, ...] = ("valid", "test"), check: Callable[[Any], None] = lambda task: None
) -> dict[str, float]:
    """Returns metrics on the run's own data, as `part/metric`, computed on the devices of this machine.

    `check` gets the task that is built again, and refuses data that have changed; data whose digests are others than
    those that the run wrote down are refused in any case, as training on refuses them.

    Raises:
      UserError: the data cannot be opened, have changed, or `check` refuses them.
    """
    family = family_of(saved.config.task, saved.trust)
    task = family.build(saved.loaded, Given(objective=lambda *_: _no_objective))
    saved.check_code()
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
