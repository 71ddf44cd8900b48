"""Writes files and folders whole or not at all: a hidden folder beside the target is filled and renamed."""

import contextlib
import errno
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
    mine = f".{target.name}.{socket.gethostname()}-"
    for old in target.parent.glob(mine + "*"):
        if not _alive(old.name.removeprefix(mine).partition(".")[0]):
            shutil.rmtree(old, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}.", dir=target.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
