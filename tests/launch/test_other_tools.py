"""The printed lines of gcluster and xpk; xpk's own dry run, where it is installed, asks for the same shape as we do."""

import itertools
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from test_jobset import parts, plan

from jaxops.launch.render.jobset import jobset
from jaxops.launch.render.other_tools import gcluster_line, xpk_line

XPK = Path(__file__).parents[2] / ".venv-launch" / "bin" / "xpk"
ARGV = ["jaxops", "train", "my.yaml", "run.dir=gs://b/runs", "run.name=it's"]


def flags(line: str) -> dict[str, str]:
    words = shlex.split(line)
    return {name: value for name, value in itertools.pairwise(words) if name.startswith("--")}


def test_the_line_of_gcluster_names_shape_retries_and_price():
    made = flags(gcluster_line(plan("2xv6e-16", price="reservation", reservation="r1", queue="q", retries=3), ARGV))
    assert made["--compute-type"] == "tpu-v6e-slice" and made["--topology"] == "4x4" and made["--num-slices"] == "2"
    assert made["--gke-nap-provisioning"] == "reservation" and made["--gke-nap-reservation"] == "r1"
    assert made["--restarts"] == "3" and made["--queue"] == "q" and made["--grace-period"] == "120s"
    assert shlex.split(made["--command"]) == ARGV
    assert {"75", "76", "143"} <= set(made["--restart-on-exit-codes"].split(","))


def test_the_line_of_xpk_names_its_own_types():
    assert flags(xpk_line(plan("v5e-64"), ARGV))["--tpu-type"] == "v5litepod-64"
    assert flags(xpk_line(plan("2xv5p-128"), ARGV))["--tpu-type"] == "v5p-128"
    assert "--spot" in shlex.split(xpk_line(plan(price="spot"), ARGV))


@pytest.mark.slow
@pytest.mark.parametrize("on", ["v6e-16", "2xv6e-256", "v5e-64", "v5p-128", "tpu7x-64", "v4-64", "v6e-4", "v6e-8"])
def test_xpks_dry_run_asks_for_the_same_machines(on, tmp_path):
    if not XPK.exists():
        pytest.skip(f"no {XPK}: `make launch-env` brings xpk")
    ours = jobset(plan(on))
    line = xpk_line(plan(on), ARGV).replace("CLUSTER", "c").replace("ZONE", "us-east5-b").replace("PROJECT", "p")
    argv = [str(XPK), *shlex.split(line)[1:], "--skip-validation", "--dry-run"]
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout[done.stdout.index("apiVersion: jobset") :].partition("[XPK]")[0]
    theirs = yaml.safe_load(text)
    (spec, job, pod), (their_spec, their_job, their_pod) = parts(ours), parts(theirs)
    chips = lambda job, pod: job["completions"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert chips(their_job, their_pod) == chips(job, pod)
    if on != "v6e-8":  # one host of eight chips is what we ask for, two of four what xpk does
        assert their_job["completions"] == their_job["parallelism"] == job["completions"]
    assert their_spec["replicatedJobs"][0]["replicas"] == spec["replicatedJobs"][0]["replicas"]
    assert {key: pod["nodeSelector"][key] for key in pod["nodeSelector"]}.items() <= their_pod["nodeSelector"].items()
    assert their_spec["failurePolicy"]["maxRestarts"] == spec["failurePolicy"]["maxRestarts"]
    assert their_pod["terminationGracePeriodSeconds"] == pod["terminationGracePeriodSeconds"]
