"""What a step of the loop was made of: digests of files, and the checkpoint of a run that is served."""

import hashlib
import os
from pathlib import Path
from typing import Any

from jaxops.run.load import open_saved_run


def digest_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file, which is read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_of(run: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns which weights a run serves: its folder, the step, and a digest of all files of its checkpoint.

    Raises:
      UserError: the run has no checkpoint, or a damaged one.
    """
    saved = open_saved_run(run)
    checkpoint = Path(saved.folder.checkpoints) / str(saved.step)
    found = hashlib.sha256()
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(checkpoint)}\0{digest_of_file(path)}\n".encode())
    return {"run": os.fspath(run), "step": saved.step, "checkpoint_sha256": found.hexdigest()}
