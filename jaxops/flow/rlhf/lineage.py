"""What a step of the loop was made of: digests of files, and the checkpoint of a run that is served."""

import hashlib
import os
from pathlib import Path
from typing import Any

from jaxops.run.load import open_saved_run


def digest_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_of(run: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns which weights a run serves: its folder, the step, and a digest of its checkpoint's manifest.

    Raises:
      UserError: the run has no checkpoint, or a damaged one.
    """
    saved = open_saved_run(run)
    manifest = Path(saved.folder.checkpoints) / str(saved.step)
    files = sorted(path for path in manifest.rglob("*") if path.is_file() and path.stat().st_size < 2**24)
    found = hashlib.sha256()
    for path in files:
        found.update(str(path.relative_to(manifest)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return {"run": os.fspath(run), "step": saved.step, "checkpoint_sha256": found.hexdigest()}
