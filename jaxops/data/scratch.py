"""Writes files and folders whole or not at all: a hidden folder beside the target is filled and renamed.

Tested in tests/data/test_scratch.py.
"""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
LAPSE = 24 * 3600.0
"""Seconds without a write after which a scratch folder of another machine counts as left behind."""


@contextlib.contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """Makes a scratch folder on the target's file system, which is removed afterwards, also after an error.

    What killed processes left there is removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    with contextlib.ExitStack() as stack:
        with _only_maker(target.parent):
            scratch = Path(tempfile.mkdtemp(prefix=f"{_prefix(target)}{_kernel()}-", dir=target.parent))
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            stack.enter_context(_locked(scratch))
        yield scratch


def sweep(target: Path) -> None:
    """Removes the scratch folders of the target that killed processes have left.

    Whoever finds the target whole calls it too: a process that was killed right after it put the target in its place
    has left its scratch folder, and nothing will be built there again.
    """
    left = list(target.parent.glob(glob.escape(_prefix(target)) + "*"))
    if not left:
        return
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=target.parent) as file:
        now = os.fstat(file.fileno()).st_mtime
        with _only_maker(target.parent) as alone:
            for other in left:
                _sweep(other, other.name.startswith(f"{_prefix(target)}{_kernel()}-"), alone, now)


def _prefix(target: Path) -> str:
    """Returns the beginning of the names of a target's scratch folders."""
    return f".{target.name}.scratch-"


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


@contextlib.contextmanager
def _only_maker(parent: Path) -> Iterator[bool]:
    """Holds the lock of the parent, in which scratch folders are made: no other process of this machine makes one now.

    It yields False on a file system without locks.
    """
    with contextlib.ExitStack() as stack:
        held = False
        with contextlib.suppress(OSError):
            descriptor = os.open(parent, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            held = True
        yield held


@contextlib.contextmanager
def _locked(scratch: Path) -> Iterator[None]:
    """Holds the lock of a scratch folder, which the kernel gives back when this process ends in any way."""
    with open(scratch / f"{LOCK}-new", "wb") as file:
        with contextlib.suppress(OSError):  # a file system without locks: it is judged by its age
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(file.name, scratch / LOCK)  # it is never seen without its holder
        yield


def _sweep(folder: Path, here: bool, alone: bool, now: float) -> None:
    """Removes the scratch folder of a process that has ended.

    A process id would say nothing, since containers of one machine have their own. The lock is known to the kernel, so
    that it tells for all processes of this machine, `here`. A folder of this machine without a lock is of a process
    that was killed right after it made it, or right before it removed it, if nobody is making one now: `alone`.
    Elsewhere, or without locks, the age tells: `now` is a time by the clock of the same file system.
    """
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        if here and (folder / LOCK).exists():
            file = stack.enter_context(open(folder / LOCK, "rb+"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif not (here and alone) and now - _last_write(folder) < LAPSE:
            return
        shutil.rmtree(folder, ignore_errors=True)


def _last_write(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def _kernel() -> str:
    """Returns a name for this boot of this machine, which its containers share; `unknown` where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:13]
    except OSError:
        return f"unknown-{os.urandom(4).hex()}"
