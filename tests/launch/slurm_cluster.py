"""A real Slurm in a temporary folder: munged, slurmctld and two slurmd, nodes `node1` and `node2` of one machine."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")
CONFIG = """\
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=30
MinJobAge=120
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def find_programs() -> None:
    """Skips the test in words where Slurm is not installed, or cannot be run by this user."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
    missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(
            f"no {', '.join(missing)} on this machine (Debian: apt-get install slurmctld slurmd slurm-client munge):"
            " Slurm was not tried"
        )
    if os.getuid() != 0:
        pytest.skip("slurmd starts jobs as root only: Slurm was not tried")


def _ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in free:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in free]


@contextlib.contextmanager
def slurm(home: Path) -> Iterator[dict[str, str]]:
    """Runs the cluster; yields the variables with which its commands find it."""
    find_programs()
    home.mkdir(mode=0o755)
    for name in ("munge", "state", "spool-node1", "spool-node2"):
        (home / name).mkdir(mode=0o755)
    key = home / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    ports, host = _ports(3), socket.gethostname().partition(".")[0]
    nodes = "\n".join(
        f"NodeName=node{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n]} CPUs=2 State=UNKNOWN" for n in (1, 2)
    )
    conf = home / "slurm.conf"
    conf.write_text(CONFIG.format(home=home, user="root", host=host, ports=ports, nodes=nodes))
    (home / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
    env = {**os.environ, "SLURM_CONF": str(conf), "PATH": path}
    munge = ["munged", "--foreground", "--force", f"--socket={home}/munge/socket", f"--key-file={key}"]
    munge += [f"--pid-file={home}/munge/pid", f"--log-file={home}/munge/log", f"--seed-file={home}/munge/seed"]
    commands = [munge, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "node1"], ["slurmd", "-D", "-N", "node2"]]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number, argv in enumerate(commands):
            with open(home / f"said-{number}", "wb") as said:
                running.append(subprocess.Popen(argv, env=env, stdout=said, stderr=said, start_new_session=True))
            if number == 0:
                _until(lambda: (home / "munge" / "socket").exists(), home)
        _until(lambda: _idle(env) == 2, home)
        yield {"SLURM_CONF": str(conf), "PATH": path}
    finally:
        subprocess.run(["scancel", "--user=root"], env=env, capture_output=True, timeout=30)
        deadline = time.monotonic() + 15
        while _jobs(env) and time.monotonic() < deadline:
            time.sleep(0.2)
        for one in reversed(running):
            one.terminate()
        for one in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.wait(10)
            one.kill()
            one.wait()


def _idle(env: dict[str, str]) -> int:
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=env, capture_output=True, text=True, timeout=30)
    return done.stdout.split().count("idle")


def _jobs(env: dict[str, str]) -> str:
    return subprocess.run(["squeue", "-h"], env=env, capture_output=True, text=True, timeout=30).stdout


def _until(ready, home: Path) -> None:
    for _ in range(150):
        if ready():
            return
        time.sleep(0.2)
    said = "\n".join(path.read_text()[-2000:] for path in [*home.glob("said-*"), *home.glob("*.log")])
    raise AssertionError(f"Slurm did not start:\n{said}")
