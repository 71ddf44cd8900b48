"""Hosts with different users: a real sshd on the loopback, where one of the two hosts is another user's."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fake_worker import STEPS, Scene
from sshd import find_sshd, sshd

from jaxops.launch.engine import remove, stop_and_wait

USER, SYSTEM_PYTHON = "jaxops-tester", "/usr/bin/python3"
pytestmark = pytest.mark.slow


@pytest.fixture
def other_user():
    """A user that is made for the test and removed again."""
    if os.getuid() != 0 or shutil.which("useradd") is None:
        pytest.skip("only root can make a second user: hosts with different users were not tried")
    try:
        pwd.getpwnam(USER)
        pytest.skip(f"there is a user {USER} already: hosts with different users were not tried")
    except KeyError:
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", USER], check=True)
        subprocess.run(["usermod", "--password", "*", USER], check=True)  # no password, and not locked
    try:
        yield USER
    finally:
        subprocess.run(["userdel", "--remove", USER], check=False, capture_output=True)


class SharedScene(Scene):
    """A launch over ssh, in a folder that both users see."""

    def make(self):
        super().make()
        self.runs.mkdir()
        self.runs.chmod(0o777)
        fake = self.home / "fake"
        fake.write_text(self.python.read_text().replace(sys.executable, SYSTEM_PYTHON))
        fake.chmod(0o755)
        # Asked for the training or the preflight it is the stand-in, and a Python for the host script.
        text = f'#!/bin/sh\ncase " $* " in *" -m jaxops"*) exec {fake} "$@" ;; *) exec {SYSTEM_PYTHON} "$@" ;; esac\n'
        self.python.write_text(text)
        return self

    def record(self, **changes):
        return super().record(backend="ssh", hosts=("alpha", "beta"), **changes)


def test_a_host_of_another_user_gets_the_code_trains_stops_and_is_cleared(other_user, monkeypatch, tmp_path):
    find_sshd()
    if not Path(SYSTEM_PYTHON).exists():
        pytest.skip(f"no {SYSTEM_PYTHON}, which both users could run")
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    place = tempfile.mkdtemp(prefix="jaxops-users-")
    os.chmod(place, 0o755)
    scene = SharedScene(Path(place)).make()
    try:
        with sshd(Path(place) / "sshd", {}, other_user) as path:
            monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
            session, status = scene.launch()
            assert status == 0 and scene.steps(0) == scene.steps(1) == STEPS
            assert Path(scene.runs / "steps-1").owner() == other_user != Path(scene.runs / "steps-0").owner()
            assert session.record.roots[1].startswith(f"/home/{other_user}/")
            assert Path(session.record.roots[1]).stat().st_mode & 0o077 == 0  # what is kept there is for them alone
            stop_and_wait(session, 0.1)
            remove(session)
            assert not any(Path(root).exists() for root in session.record.roots)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def test_a_run_folder_that_the_other_user_cannot_read_is_said(other_user, monkeypatch, tmp_path):
    from jaxops.core.failures import UserError

    find_sshd()
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    place = tempfile.mkdtemp(prefix="jaxops-users-")
    os.chmod(place, 0o755)
    scene = SharedScene(Path(place)).make()
    scene.runs.chmod(0o700)
    try:
        with sshd(Path(place) / "sshd", {}, other_user) as path:
            monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
            with pytest.raises(UserError, match="is not shared: beta cannot read what alpha wrote there"):
                scene.launch()
            remove(scene.session())
    finally:
        shutil.rmtree(place, ignore_errors=True)
