"""Whatever is wrong with what a user gives to `jaxops launch`: one message with the remedy, status 2, nothing made."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_runs import CONFIG, furnish

from jaxops.cli.main import main
from jaxops.launch import code
from jaxops.launch.record import LaunchFolder, launch_id


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A repository with a tiny run, as the current folder."""
    furnish(tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("JAXOPS_COORDINATOR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


GOOD = ["--on", "cpu-4", "--max-hours", "1"]
SSH = ["--on", "cpu-4", "--max-hours", "1", "--backend", "ssh", "--python", "/usr/bin/python3"]
FAR = ["run.dir=/shared/runs", *SSH, "--hosts", "alpha,beta"]
CLOUD = ["--on", "v5p-16", "--max-hours", "1"]
MIG = ["run.dir=gs://b/r", *CLOUD, "--backend", "mig", "--python", "/usr/bin/python3"]
MIG += ["--option", "project=my-project", "--option", "zone=us-east5-b"]
BAD: dict[str, tuple[list[str], str]] = {
    "unknown type": (
        ["--on", "v5q-64", "--max-hours", "1"],
        "--on v5q-64: no such accelerator; did you mean 'v5",
    ),
    "no slice of that size": (["--on", "v5e-48", "--max-hours", "1"], "no slice of that size"),
    "unknown backend": ([*GOOD, "--backend", "shh"], "--backend shh: no such backend; did you mean 'ssh'?"),
    "no hours": (["--on", "cpu-4"], "--max-hours is missing"),
    "negative hours": (["--on", "cpu-4", "--max-hours", "-1"], "--max-hours -1: expected a number of hours above zero"),
    "hours that never end": (["--on", "cpu-4", "--max-hours", "inf"], "--max-hours inf: expected"),
    "hours that are no number": (["--on", "cpu-4", "--max-hours", "6h"], "--max-hours: invalid float value: '6h'"),
    "no accelerator": (["--max-hours", "1"], "required: --on"),
    "grace": ([*GOOD, "--grace", "0"], "--grace 0: expected seconds for a save"),
    "retries": ([*GOOD, "--retries", "-1"], "--retries -1: expected a number"),
    "a flag": ([*GOOD, "--worker", "2"], "no flag --worker; did you mean '--workers'?"),
    "no workers": ([*GOOD, "--workers", "0"], "--workers 0: expected from 1 to 64"),
    "devices that cannot be shared out": ([*GOOD, "--workers", "3"], "4 devices cannot be shared out over 3 workers"),
    "chips of many hosts on this one": (["--on", "v5p-128", "--max-hours", "1"], "this machine is one host"),
    "a mesh that does not fit": (["mesh={data: 8}", *GOOD], "mesh: data 8 does not fit 4 devices"),
    "hosts on local": ([*GOOD, "--hosts", "alpha"], "--hosts goes with --backend ssh"),
    "workers over ssh": ([*SSH, "--hosts", "alpha", "--workers", "2"], "each host of --hosts runs one worker"),
    "no hosts": (SSH, "--backend ssh needs --hosts"),
    "a host twice": ([*SSH, "--hosts", "alpha,alpha"], "alpha is there twice"),
    "a host that is an option": ([*SSH, "--hosts=-oProxyCommand=id"], "no name of a host"),
    "too few hosts": (["--on", "v5p-16", *SSH[2:], "--hosts", "alpha"], "1 given, and v5p-16 = 8 chips on 2 hosts"),
    "a relative folder": (
        [*SSH, "--hosts", "alpha,beta"],
        "run.dir=runs: it must be one place that all hosts see",
    ),
    "no lock file": (["run.dir=/s", *SSH[:-2], "--hosts", "alpha"], "--lock requirements.lock: the code in"),
    "a secret's value": ([*GOOD, "--secret", "TOKEN=abc"], "--secret 'TOKEN': expected the name of an environment"),
    "no such secret": ([*GOOD, "--secret", "NO_SUCH_TOKEN"], "no environment variable of that name here"),
    "a coordinator with a port": (
        [*FAR, "--coordinator", "alpha:80"],
        "--coordinator 'alpha:80': expected a host",
    ),
    "the name of the code's folder": (["run.name=code", *GOOD], "run.name=code: `code` in run.dir is where launches"),
    "a dirty name": (["run.name=a;b", *GOOD], "run.name"),
    "a name with a quote": (["run.name=it's", *GOOD], "run.name [override"),
    "a name of two lines": (["run.name=a\nb", *GOOD], "must match the pattern"),
    "a command for a number": (["run.seed=$(id)", *GOOD], "expected an integer, got '$(id)'"),
    "an address in brackets": ([*SSH, "--hosts", "[::1]"], "'[::1]' is no name of a host"),
    "a coordinator that is half an address": ([*FAR, "--coordinator", "fe80:"], "--coordinator 'fe80:': expected"),
    "a name of a folder above": (["run.name=../x", *GOOD], "run.name"),
    "a price class where nothing is bought": ([*GOOD, "--spot"], "--spot: --backend local has no such price class"),
    "two price classes": ([*MIG, "--spot", "--flex"], "--spot and --flex: expected one price class"),
    "spot without anybody who tries again": ([*MIG, "--spot", "--detach"], "--detach --spot: with --backend mig the"),
    "no zone": (
        ["run.dir=gs://b/r", "--backend", "mig", *CLOUD[:4], "--option", "project=my-project"],
        "--option zone=... is missing (the zone, such as us-east5-b)",
    ),
    "a zone that is a command": ([*MIG, "--option", "zone=$(id)"], "--option zone='$(id)': expected the zone"),
    "an unknown option": ([*MIG, "--option", "zonee=x"], "has no such option; did you mean 'zone'?"),
    "an option without a value": ([*MIG, "--option", "zone"], "--option zone: expected zone=VALUE"),
    "a reservation that is a flag": ([*MIG, "--reservation=--x"], "expected the name of a reservation"),
    "flex for ever": (
        ["run.dir=gs://b/r", "--on", "v5p-16", "--max-hours", "200", *MIG[5:], "--flex"],
        "to seven days",
    ),
    "several slices in one group": (["run.dir=gs://b/r", "--on", "2xv5p-16", *MIG[3:]], "several slices go with"),
    "chips that no group has": (["run.dir=gs://b/r", "--on", "v5e-16", *MIG[3:]], "groups are made of v5p, v6e and"),
    "an image that nobody knows": (["run.dir=gs://b/r", "--on", "tpu7x-16", *MIG[3:]], "--option image-family=..."),
    "a group that writes to S3": (["run.dir=s3://b/r", *MIG[1:]], "VMs of Compute Engine need gs://BUCKET"),
    "a secret in the environment of a VM": ([*MIG, "--secret", "HOME"], "say where workers find it: NAME=sm:SECRET"),
    "a secret of a wrong source": ([*MIG, "--secret", "HOME=file:/x"], "say where workers find it: NAME=sm:SECRET"),
    "a secret's name that is a command": ([*MIG, "--secret", "HOME=sm:$(id)"], "expected HOME=sm:SECRET"),
    "chips that no queued resource has": (
        ["run.dir=gs://b/r", "--on", "tpu7x-16", *MIG[3:5], "--backend", "queued-resources", *MIG[7:]],
        "expected v4, v5e, v5p or v6e",
    ),
    "a store with Slurm": (
        ["run.dir=gs://b/r", *GOOD, "--backend", "slurm"],
        "a folder that this machine and all nodes",
    ),
    "a folder that sbatch misreads": (["run.dir=/a b", *GOOD, "--backend", "slurm"], "sbatch would misread it"),
    "an option with a quote": (
        ["run.dir=/s", *GOOD, "--backend", "slurm", "--option", "partition=a b"],
        "--option partition='a b': expected sbatch --partition, one word",
    ),
    "hosts of Slurm": (["run.dir=/s", *GOOD, "--backend", "slurm", "--hosts", "a"], "Slurm chooses the nodes"),
    "a config that is wrong": (["optimizer.lrr=1", *GOOD], "did you mean 'lr'?"),
    "a store without a bucket": (["run.dir=s3://", *GOOD], "run.dir"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_gives_one_message_and_makes_nothing(name, folder, capsys):
    argv, says = BAD[name]
    before = sorted(folder.rglob("*"))
    assert main(["launch", "my.yaml", *argv]) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("jaxops: ") and "Traceback" not in err
    assert "abc" not in err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["run.dir=/s", *GOOD, "--backend", "slurm"], "there is no `squeue` on this machine: launch from a login node"),
        (MIG, "there is no `gcloud` on this machine: install it"),
        (
            ["run.dir=/s", "--on", "v4-16", *MIG[3:5], "--backend", "queued-resources", *MIG[7:]],
            "there is no `gcloud` on this machine: install it",
        ),
    ],
)
def test_without_the_tool_of_the_backend_it_says_so(folder, capsys, monkeypatch, tmp_path_factory, argv, says):
    tools = tmp_path_factory.mktemp("tools")
    os.symlink(str(shutil.which("git")), tools / "git")
    monkeypatch.setenv("PATH", str(tools))
    assert says in refused(["my.yaml", *argv, "--python", "/usr/bin/python3"], capsys)


@pytest.mark.parametrize("backend", ["mig", "slurm"])
def test_a_dry_run_of_a_scheduler_prints_its_files_and_commands_and_touches_nothing(
    folder, capsys, monkeypatch, backend
):
    monkeypatch.setenv("PATH", f"{folder / 'none'}:{os.environ['PATH']}")
    before = sorted(folder.rglob("*"))
    argv = MIG if backend == "mig" else ["run.dir=/s", *GOOD, "--backend", "slurm", "--python", "/usr/bin/python3"]
    spot = ["--spot"] if backend == "mig" else ["--workers", "2"]
    assert main(["launch", "my.yaml", *argv, *spot, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert sorted(folder.rglob("*")) == before
    if backend == "mig":
        assert "v5p-16 = 8 chips on 2 hosts, spot, for at most 1 hours" in said.err
        verbs = ["resource-policies create", "instance-templates create", "managed create", "managed resize"]
        assert all(f" {verb} " in said.out for verb in verbs) and "--provisioning-model=SPOT" in said.out
    else:
        assert "#SBATCH --time=1:00:00" in said.out and "#SBATCH --signal=B:TERM@120" in said.out
        assert "#SBATCH --export=NONE" in said.out and "\nsbatch --parsable " in said.out
    assert "worker.json" in said.out and "start_worker.sh" in said.out


def test_the_table_is_long_enough():
    assert len(BAD) >= 20


def refused(argv: list[str], capsys) -> str:
    assert main(["launch", *argv]) == 2
    err = capsys.readouterr().err
    assert "jaxops: " in err and "Traceback" not in err
    return err


def test_code_that_cannot_travel_is_refused(folder, capsys, monkeypatch):
    (folder / ".env").write_text("TOKEN=1\n")
    assert ".env in" in refused(["my.yaml", *GOOD], capsys)
    (folder / ".env").unlink()
    monkeypatch.setattr(code, "bundle", functools.partial(code.bundle, most=1000))
    assert "the largest: plays.csv" in refused(["my.yaml", *GOOD], capsys)


def test_a_folder_in_no_repository_is_refused(folder, capsys):
    os.rename(".git", "no-git")
    assert "git init" in refused(["my.yaml", *GOOD], capsys)


def test_a_config_that_does_not_travel_is_refused(folder, capsys, tmp_path_factory):
    (folder / "own.yaml").write_text(CONFIG)
    Path(".gitignore").write_text("own.yaml\n")
    assert "is ignored by git" in refused(["own.yaml", *GOOD], capsys)
    outside = tmp_path_factory.mktemp("outside") / "far.yaml"
    outside.write_text(CONFIG)
    assert "lies outside of the repository" in refused([str(outside), *GOOD], capsys)


def test_two_launchers_of_one_run_are_refused(folder, capsys):
    with LaunchFolder(launch_id(str(folder / "runs"), "tiny")).held():
        assert f"is being launched by process {os.getpid()}" in refused(["my.yaml", *GOOD], capsys)


def test_a_host_that_does_not_answer_is_named(folder, capsys, monkeypatch):
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text("#!/bin/sh\necho 'connect to host: Connection refused' >&2; exit 255\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    err = refused(["my.yaml", *FAR], capsys)
    assert "alpha: ssh failed: connect to host: Connection refused" in err and "beta: ssh failed" in err


def test_no_job_of_that_name(folder, capsys):
    assert main(["job", "status", "tinny"]) == 2
    assert "no launch of a run 'tinny' is known on this machine" in capsys.readouterr().err
    assert main(["job", "stauts", "tiny"]) == 2
    assert "did you mean 'status'?" in capsys.readouterr().err
    assert main(["job", "list"]) == 0
    assert "no launch is known" in capsys.readouterr().out


def test_a_dry_run_prints_every_command_and_touches_nothing(folder, capsys, monkeypatch):
    monkeypatch.setenv("TOKEN", "hunter2hunter2")
    monkeypatch.setenv("PATH", f"{folder / 'none'}:{os.environ['PATH']}")
    before = sorted(folder.rglob("*"))
    assert main(["launch", "my.yaml", "run.name=it", *FAR, "--secret", "TOKEN", "--dry-run"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert sorted(folder.rglob("*")) == before
    assert all(line.startswith(("ssh -T -o BatchMode=yes", "# worker ")) for line in lines)
    for verb in ("worker.py", "shared", "keep", "unpack", "jaxops.launch.preflight", "port", "start"):
        assert any(verb in line for line in lines), verb
    assert {" alpha ", " beta "} <= {f" {line.split(' -- ')[1].split()[0]} " for line in lines if " -- " in line}
    assert "hunter2" not in said.out + said.err and '"JAXOPS_PROCESS_ID": "1"' in said.out
