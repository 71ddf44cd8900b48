"""Commands that write to a disk that is full: one message, exit status 1, and no half file."""

import contextlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxops.cli.main import main

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
"""A shell that may mount what nobody else sees."""


def can_mount() -> bool:
    try:
        mount = "mount -t tmpfs -o size=64k tmpfs /tmp"
        return subprocess.run([*NAMESPACE, mount], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs mount namespaces")


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "command",
    [
        ["export", "runs/tiny", "out/v.parquet"],
        ["predict", "runs/tiny", "plays.csv", "--out", "out/p.csv"],
        ["predict", "runs/tiny", "plays.csv", "--out", "out/p.jsonl"],
        ["ckpt", "export", "runs/tiny", "out/copy"],
    ],
    ids=["export", "predict csv", "predict jsonl", "ckpt export"],
)
def test_no_half_file_is_left(finished, capsys, command):
    Path("out").mkdir()
    with room_for(300):
        status = main(command)
    told = capsys.readouterr()
    assert status == 1 and told.out == ""
    assert "cannot be written: [Errno 27]" in told.err and "nothing of it was left" in told.err
    assert told.err.count("\n") == 1
    assert list(Path("out").iterdir()) == []
    assert main(command) == 0 and len(list(Path("out").iterdir())) == 1


BUILD = """
import sys
from jaxops.core.failures import RunFailed
from jaxops.data.interactions import cache
from jaxops.data.interactions.spec import InteractionsFile
try:
    cache.build_cache(InteractionsFile("events.csv"), "disk/cache")
except RunFailed as error:
    sys.exit(f"failed: {error}")
"""


@needs_mount
@pytest.mark.parametrize("kilobytes", [400, 1000, 1500])
def test_a_cache_that_does_not_fit_is_told_and_kills_nobody(tmp_path, kilobytes):
    """It fills up while the events are read, while the mapped columns are made, or at the last arrays."""
    lines = [f"{n % 97},{n % 1009},{n}" for n in range(30000)]  # 20 bytes an event, twice
    (tmp_path / "events.csv").write_text("\n".join(["user,item,time", *lines, ""]))
    (tmp_path / "disk").mkdir()
    script = f'mount -t tmpfs -o size={kilobytes}k tmpfs disk && "$0" -c "$1"; status=$?; find disk; exit $status'
    done = subprocess.run([*NAMESPACE, script, sys.executable, BUILD], cwd=tmp_path, capture_output=True, check=False)
    told = done.stderr.decode()
    if kilobytes == 1500:
        assert done.returncode == 0, told
        return
    assert done.returncode == 1 and "failed: cannot build the data cache disk/cache: [Errno 28]" in told, told
    assert done.stdout.decode() == "disk\n"


@needs_mount
@pytest.mark.slow
def test_export_to_a_real_disk_that_is_full(finished):
    Path("disk").mkdir()
    code = "import sys; from jaxops.cli.main import main; sys.exit(main(['export', 'runs/tiny', 'disk/v.parquet']))"
    script = "mount -t tmpfs -o size=4k tmpfs disk && head -c 4096 /dev/zero > disk/full"
    script += ' && "$0" -c "$1"; status=$?; find disk; exit $status'
    done = subprocess.run([*NAMESPACE, script, sys.executable, code], capture_output=True, check=False)
    assert done.returncode == 1 and b"disk/v.parquet cannot be written: [Errno 28]" in done.stderr, done.stderr
    assert done.stdout == b"disk\ndisk/full\n"
