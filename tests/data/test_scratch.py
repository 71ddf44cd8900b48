"""Scratch folders: what a living process of any container writes to stays, what a dead one left is removed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxops.data import scratch

WORK = """
import sys
from pathlib import Path
from jaxops.data.scratch import folder_beside
with folder_beside(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("data")
    print(folder, flush=True)
    sys.stdin.read()
"""
NAMESPACES = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]


def can(command: list[str]) -> bool:
    try:
        return subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def another(target: Path, *wrapper: str):
    """Another process that works in a scratch folder until its end of input."""
    command = [*wrapper, sys.executable, "-c", WORK, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process, Path(process.stdout.readline().strip())
        process.stdin.close()
        process.wait()


def sweep(target: Path) -> None:
    with scratch.folder_beside(target):
        pass


@pytest.mark.parametrize(
    "wrapper",
    [[], pytest.param(NAMESPACES, marks=pytest.mark.skipif(not can(NAMESPACES), reason="needs namespaces"))],
    ids=["same", "another pid namespace"],
)
def test_a_living_process_keeps_its_folder_and_a_killed_one_loses_it(tmp_path, wrapper):
    target = tmp_path / "cache"
    with another(target, *wrapper) as (process, folder):
        sweep(target)
        assert (folder / "half").read_text() == "data"
        sweep(tmp_path / "other")
        process.send_signal(signal.SIGKILL)
        process.wait()
        sweep(tmp_path / "other")
        assert folder.exists()  # beside another target
        for _ in range(100):  # the kernel ends a namespace a moment after its first process
            sweep(target)
            if not folder.exists():
                break
            time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def test_an_undisturbed_process_leaves_nothing(tmp_path):
    with another(tmp_path / "cache") as (_, folder):
        assert folder.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", [[], [f"{scratch.LOCK}-new"], ["column"]], ids=["empty", "not locked yet", "going"])
def test_one_that_was_killed_before_it_had_its_lock_or_after_it_gave_it_back_leaves_nothing(tmp_path, inside):
    """A kill at each change of the files found them: they would have lain there for a day."""
    target = tmp_path / "cache"
    with scratch.folder_beside(target) as folder:
        name = folder.name
    left = tmp_path / name
    left.mkdir()
    for file in inside:
        (left / file).touch()
    sweep(target)
    assert list(tmp_path.iterdir()) == []


def test_many_that_make_and_sweep_at_once_keep_their_folders(tmp_path):
    lost = []

    def work() -> None:
        for _ in range(40):
            with scratch.folder_beside(tmp_path / "cache") as folder:
                (folder / "half").write_text("data")
                scratch.sweep(tmp_path / "cache")
                if not (folder / "half").exists():
                    lost.append(folder)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not lost and list(tmp_path.iterdir()) == []


def test_folders_of_other_machines_are_judged_by_their_last_write(tmp_path):
    target = tmp_path / "ca[c]he"
    other = tmp_path / ".ca[c]he.scratch-00000000-0000-abcdefgh"
    other.mkdir()
    (other / scratch.LOCK).touch()  # held on that machine, which this one cannot know
    (other / "column").touch()
    sweep(target)
    assert other.exists()
    old = other.stat().st_mtime - scratch.LAPSE - 60
    os.utime(other / scratch.LOCK, (old, old))
    os.utime(other, (old, old))
    sweep(target)
    assert other.exists()  # its column is still being written
    os.utime(other / "column", (old, old))
    sweep(target)
    assert not other.exists()


def test_without_locks_a_folder_of_this_machine_is_judged_by_its_last_write(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(scratch.fcntl, "flock", unsupported)
    with scratch.folder_beside(tmp_path / "cache") as mine:
        sweep(tmp_path / "cache")
        assert mine.exists() and not (mine / scratch.LOCK).exists()
        monkeypatch.setattr(scratch, "LAPSE", -1.0)
        sweep(tmp_path / "cache")
        assert not mine.exists()
