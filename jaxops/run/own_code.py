"""The source behind the import paths of a run, by digest: code that has changed since is told, not run in silence.

A digest is of the file that a path leads to (and of the one that it names, where that imports it from there). Not
looked at: what those files import from others, installed packages, notebooks and whatever else has no source file.
Tested in tests/run/test_run_code.py.
"""

import functools
import hashlib
import inspect
import json
import sys
import time
from collections.abc import Collection, Mapping
from typing import Any

from jaxops.core.failures import UserError
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.trust import named_code

FILE = "code.json"
VERSION = 1
_NOT_COVERED = "Looked at were these files alone: neither what they import from others nor notebooks."


def sources_of(paths: Collection[str]) -> dict[str, str | None]:
    """Returns the SHA-256 of the source file behind each import path; None where there is no source file."""
    return {path: _digest(path) for path in paths}


def check_code(folder: RunFolder, paths: Collection[str], accept: bool) -> dict[str, Any]:
    """Returns the record of a run's code, with the digests of the code that is here now.

    Args:
      folder: the folder of the run.
      paths: the import paths whose code is about to run.
      accept: take code that has changed since; the record then notes each difference.

    Raises:
      UserError: code has changed since the run recorded it.
    """
    record = folder.read_json(FILE)
    known = record.get("sources")
    before: dict[str, Any] = known if isinstance(known, dict) else {}
    now = sources_of(paths)
    changed = {
        path: (before[path], digest)
        for path, digest in now.items()
        if digest and isinstance(before.get(path), str) and before[path] != digest
    }
    if changed and not accept:
        listed = "\n".join(
            f"  {path}: SHA-256 {old[:12]} there, {new[:12]} here" for path, (old, new) in changed.items()
        )
        raise UserError(
            f"run folder {folder.where}: its code is no longer what the run was trained with:\n{listed}\n"
            "Where the difference does not matter, --accept-code goes on with the code that is here, and training"
            f" records that (accept_code=True in Python); else set run.name to begin another run. {_NOT_COVERED}"
        )
    accepted = record.get("accepted")
    notes = [{"path": path, "from": old, "to": new, "time": round(time.time())} for path, (old, new) in changed.items()]
    return {
        "version": VERSION,
        "sources": {**before, **{path: digest for path, digest in now.items() if digest or path not in before}},
        "accepted": [*(accepted if isinstance(accepted, list) else []), *notes],
    }


def code_paths(resolved: Mapping[str, Any]) -> list[str]:
    """Returns the import paths of a run's config and of factories that Python handed in."""
    return list(dict.fromkeys(named_code(resolved).values()))


def write_code(folder: RunFolder, record: Mapping[str, Any]) -> None:
    """Writes the record into the run folder, where it says anything new.

    Raises:
      RunFailed: it cannot be written.
    """
    if record["sources"] and json.loads(json.dumps(record)) != folder.read_json(FILE):
        folder.write_json(FILE, record)


def _digest(path: str) -> str | None:
    module_name, _, attributes = path.partition(":")
    module = sys.modules.get(module_name)
    found: Any = module
    for name in attributes.split("."):
        found = getattr(found, name, None)  # `f.<locals>.g` leads nowhere
    while isinstance(found, functools.partial):
        found = found.func
    defined = hasattr(found, "__qualname__")  # not a value, whose class may be anybody's
    home = sys.modules.get(found.__module__ or "") if defined else None
    parts = [part for part in (_text(module, found), _text(home, found)) if part is not None]
    if not parts:
        return None
    return hashlib.sha256(b"\0".join(dict.fromkeys(parts))).hexdigest()


def _text(module: Any, found: Any) -> bytes | None:
    """The source file of a module; of the script that runs, which changes with every experiment, the callable alone."""
    try:
        if getattr(module, "__name__", "") == "__main__":
            return inspect.getsource(found).encode()
        with open(inspect.getsourcefile(module) or "", "rb") as file:
            return file.read()
    except (OSError, TypeError):
        return None
