"""The checkpoints of a run, opened with the retention that its config asks for."""

import os
from collections.abc import Callable
from typing import Any

from jaxops.core.checkpoint import Checkpoints


def open_checkpoints(
    config: Any, directory: str | os.PathLike[str], before_commit: Callable[[], None] | None = None
) -> Checkpoints:
    """Opens the checkpoints in `directory`; the config says how many are kept and which metric names the best."""
    keep = config.checkpoint
    lower = keep.best is not None and config.metric(keep.best).better == "lower"
    return Checkpoints(
        directory,
        keep=keep.keep,
        keep_every=keep.keep_every,
        best=f"valid/{keep.best}" if keep.best else None,
        best_mode="min" if lower else "max",
        before_commit=before_commit,
    )
