"""Writes files and folders whole or not at all: a hidden folder beside the target is filled and renamed."""

import contextlib
import errno
import glob
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """Makes a scratch folder on the target's file system, which is removed afterwards, also after an error.

    What a killed process of this machine left there is removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    scratch = Path(tempfile.mkdtemp(prefix=f"{_prefix(target)}{os.getpid()}.", dir=target.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sweep(target: Path) -> None:
    """Removes the scratch folders of the target that killed processes of this machine have left.

    Whoever finds the target whole calls it too: a process that was killed right after it put the target in its place
    has left its scratch folder, and nothing will be built there again.
    """
    mine = _prefix(target)
    for old in target.parent.glob(f"{glob.escape(mine)}*"):
        if not _alive(old.name.removeprefix(mine).partition(".")[0]):
            shutil.rmtree(old, ignore_errors=True)


def _prefix(target: Path) -> str:
    """Returns the beginning of the names of this machine's scratch folders of a target; a process id follows."""
    return f".{target.name}.{socket.gethostname()}-"


def replace_folder(source: Path, target: Path, scratch: Path) -> None:
    """Puts the folder `source` where `target` is; an older `target` moves into `scratch`.

    Another process may put its own there at the same moment: the last one stays.
    """
    for attempt in range(10):
        with contextlib.suppress(FileNotFoundError):
            os.replace(target, scratch / f"old-{attempt}")
        try:
            os.replace(source, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise OSError(errno.EBUSY, "other processes keep writing there", str(target))


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, PermissionError):
        return True
    return True
