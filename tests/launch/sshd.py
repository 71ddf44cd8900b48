"""A real sshd on the loopback, as this user, and an ssh that knows it as the hosts `alpha` and `beta`."""

import contextlib
import getpass
import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {home}/host_key
AuthorizedKeysFile {home}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 50
{env}
"""
CLIENT = """\
Host alpha
    User {user}
Host beta
    User {other}
Host alpha beta
    HostName 127.0.0.1
    Port {port}
    IdentityFile {home}/key
    IdentitiesOnly yes
    UserKnownHostsFile {home}/known_hosts
Host alpha
    HostKeyAlias alpha
Host beta
    HostKeyAlias beta
Host away
    HostName 127.0.0.1
    Port 1
"""


def find_sshd() -> str:
    """The path of sshd; without one, or without ssh, the test is skipped in words."""
    found = shutil.which("sshd") or next(
        (p for p in ("/usr/sbin/sshd", "/usr/local/sbin/sshd") if Path(p).exists()), ""
    )
    if not found or not shutil.which("ssh") or not shutil.which("ssh-keygen"):
        pytest.skip("no sshd on this machine (Debian, Ubuntu: apt-get install openssh-server): ssh was not tried")
    return found


@contextlib.contextmanager
def sshd(home: Path, env: Mapping[str, str], other: str = "") -> Iterator[Path]:
    """Runs sshd, whose sessions have these variables; yields a folder with an `ssh` for the PATH.

    Two names are two hosts to ssh, each with a key of its own in known_hosts; they lie on one machine. With the name of
    another user `beta` is a host of that one, where this process is root.
    """
    program = find_sshd()
    home.mkdir()
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd, as root, keeps itself apart
    user = getpass.getuser()
    values = " ".join(["SetEnv", *(f'"{name}={value}"' for name, value in env.items())]) if env else ""
    (home / "sshd_config").write_text(CONFIG.format(port=port, home=home, env=values))
    (home / "config").write_text(CLIENT.format(port=port, home=home, user=user, other=other or user))
    key = (home / "host_key.pub").read_text().split()
    (home / "known_hosts").write_text("".join(f"{name} {key[0]} {key[1]}\n" for name in ("alpha", "beta")))
    (home / "bin").mkdir()
    ssh = home / "bin" / "ssh"
    command = shlex.join([str(shutil.which("ssh")), "-F", str(home / "config")])
    ssh.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    ssh.chmod(0o755)
    with open(home / "log", "w") as log:
        daemon = subprocess.Popen([program, "-D", "-e", "-f", str(home / "sshd_config")], stderr=log)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert daemon.poll() is None, (home / "log").read_text()
            time.sleep(0.05)
        yield home / "bin"
    finally:
        daemon.terminate()
        daemon.wait()
