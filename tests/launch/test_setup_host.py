"""launch/setup_host.sh: the environment of a host from a lock file, without a network."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxops.launch.scripts import script


def wheelhouse(folder: Path) -> str:
    """A folder with one tiny wheel; returns its pin."""
    folder.mkdir()
    path = folder / "hostling-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("hostling.py", "WORD = 'here'\n")
        about = "hostling-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: hostling\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", f"hostling.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")
    return f"hostling==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def setup(home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    argv = ["sh", str(script("setup_host.sh")), str(home / "lock"), str(home / "env"), str(home / "wheels")]
    place = {**os.environ, "PYTHON": sys.executable, **env}
    return subprocess.run(argv, capture_output=True, text=True, timeout=200, env=place)


@pytest.mark.parametrize("uv", ["uv", pytest.param("", marks=pytest.mark.slow)])
def test_it_is_made_once_from_the_lock_file(tmp_path, uv):
    if uv and not shutil.which(uv):
        pytest.skip("no uv on this machine")
    (tmp_path / "lock").write_text(wheelhouse(tmp_path / "wheels"))
    done = setup(tmp_path, UV=uv)
    assert done.returncode == 0 and f"and {'uv' if uv else 'pip'}" in done.stderr, done.stderr
    python = tmp_path / "env" / "bin" / "python"
    assert subprocess.check_output([python, "-c", "import hostling; print(hostling.WORD)"], text=True) == "here\n"
    again = setup(tmp_path, UV=uv)
    assert again.returncode == 0 and again.stderr == ""


def test_a_wheel_with_another_digest_is_refused_and_nothing_is_called_ready(tmp_path):
    if not shutil.which("uv"):
        pytest.skip("no uv on this machine")
    pin = wheelhouse(tmp_path / "wheels")
    (tmp_path / "lock").write_text(pin[:-5] + "0000\n")
    done = setup(tmp_path)
    assert done.returncode == 2 and "could not be installed" in done.stderr
    assert not (tmp_path / "env" / ".ready").exists()
    (tmp_path / "lock").write_text(pin)
    assert setup(tmp_path).returncode == 0


def test_a_lock_file_that_is_not_there_is_said(tmp_path):
    done = setup(tmp_path)
    assert done.returncode == 2 and "there is no lock file" in done.stderr and "--python" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_host_without_a_new_python_is_told_so(tmp_path):
    (tmp_path / "lock").write_text("")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "dirname", "mkdir", "flock", "sed", "grep"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    old = tools / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = setup(tmp_path, PATH=str(tools), PYTHON="")
    assert done.returncode == 2 and "no Python 3.11 or newer here" in done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck on this machine")
def test_shellcheck_has_nothing_to_say():
    subprocess.run(["shellcheck", script("setup_host.sh")], check=True)
