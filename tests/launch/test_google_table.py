"""Each call of gcloud by a launch is in google.md, and the real gcloud's parser takes it, where it is installed."""

import os
import shutil
import subprocess

import fake_gcloud
import pytest

from jaxops.launch.backends.mig import BACKEND as MIG
from jaxops.launch.backends.protocol import Job
from jaxops.launch.backends.queued_resources import BACKEND as QUEUED
from jaxops.launch.backends.queued_resources import _create
from jaxops.launch.record import LaunchRecord, Spec

OPTIONS = {"project": "good-project", "zone": "us-east5-b"}
MORE = {"network": "default", "subnet": "s", "service-account": "a@p.iam.gserviceaccount.com", "external-ip": "no"}


def record(backend: str, type: str, hosts: int, price: str) -> LaunchRecord:
    options = OPTIONS | ({"reservation": "mine"} if price == "reservation" else {})
    options |= {name: MORE[name] for name in MORE if backend == "mig" or name != "subnet"}
    spec = Spec(
        name="tiny",
        run_dir="gs://bucket/runs",
        backend=backend,
        hosts=tuple(f"host-{n}" for n in range(hosts)),
        type=type,
        argv=("train", "my.yaml"),
        devices=None,
        mesh={},
        options=options,
        price=price,
    )
    return LaunchRecord(spec=spec, attempt=1, hours=2.0, code="c" * 64, host="h" * 64)


def calls() -> dict[str, list[str]]:
    """Every call of a launch, by a name."""
    found = {}
    for price in MIG.prices:
        job = Job(record=record("mig", "v5p-16", 2, price))
        for number, (argv, describe) in enumerate(MIG._steps(job, os.devnull)):
            found[f"mig {price} {number}"] = argv
            if describe:
                found[f"mig describe {number}"] = [*describe, "--format=json"]
    for price in QUEUED.prices:
        queued = record("queued-resources", "v5e-16", 4, price)
        found[f"queued-resources {price}"] = _create(queued)
    host = QUEUED.host("host-1", queued.spec)
    found["ssh"] = host._argv(["true"])
    return found


@pytest.mark.parametrize("name", calls())
def test_google_has_this_command_and_these_flags(name):
    argv = calls()[name]
    command, _, flags = fake_gcloud.parse(argv[1:])
    known = fake_gcloud.known_flags()[command]
    tracks = {known[flag].split()[0] for flag in flags if flag in known}
    # Bulk mode has left the alpha track since 528; flex-start of queued resources has not.
    assert "alpha" in argv or tracks <= {"ga"} or "--target-size-policy-mode" in flags


def test_a_flag_that_google_does_not_have_is_refused():
    with pytest.raises(ValueError, match="unrecognized arguments: --spott"):
        fake_gcloud.parse(["compute", "tpus", "queued-resources", "create", "a", "--zone=z", "--spott"])
    with pytest.raises(ValueError, match="Invalid choice"):
        fake_gcloud.parse(["compute", "tpus", "queues", "create", "a"])


@pytest.mark.slow
@pytest.mark.parametrize("name", calls())
def test_the_parser_of_the_real_gcloud_takes_it(name, tmp_path):
    program = shutil.which("gcloud")
    if program is None:
        pytest.skip("no gcloud on this machine: its parser was not asked")
    version = subprocess.run([program, "version"], capture_output=True, text=True, timeout=60).stdout
    if "SDK 528." not in version:
        pytest.skip(f"google.md knows the parser of gcloud 528, and this is {version.splitlines()[0]}")
    argv = calls()[name]
    env = {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    done = subprocess.run([program, *argv[1:]], capture_output=True, text=True, timeout=60, env={**os.environ, **env})
    command, _, flags = fake_gcloud.parse(argv[1:])
    newer = {flag for flag in flags if fake_gcloud.known_flags()[command].get(flag) == "alpha" and "alpha" not in argv}
    newer |= {"--provisioning-model"} & set(flags) if flags.get("--provisioning-model") == "FLEX_START" else set()
    if newer:
        assert done.returncode == 2 and all(flag in done.stderr for flag in newer), done.stderr
    else:
        assert done.returncode == 1 and "active account" in done.stderr, done.stderr
