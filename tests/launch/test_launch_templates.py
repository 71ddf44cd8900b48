"""The templates in launch/, which need no CLI: each is what the launcher renders, with words to fill in.

`python tests/launch/test_launch_templates.py` writes them again.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from jaxops.launch.accelerators import find_accelerator
from jaxops.launch.record import LaunchRecord, Spec
from jaxops.launch.render.jobset import JobSetPlan, jobset, to_yaml
from jaxops.launch.render.sky import task

FOLDER = Path(__file__).parents[2] / "launch"
JOBSET = """\
# A training on a v6e-16 (4 hosts) of a GKE cluster, without the CLI: fill in the words in capitals, and
#   kubectl create -f jobset.yaml
#   kubectl get jobset NAME; kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME --prefix
#   kubectl delete jobset NAME --cascade=foreground          # the pods save, and are gone
# IMAGE holds the code, and a Python with all packages. RUN_DIR is an object store, gs://BUCKET/runs. After a preemption
# all pods begin again, ten times at most, and go on from the last save; after exit status 1 or 2 they do not.
# --dry-run of `jaxops launch ... --backend gke` prints one for any accelerator, with code and preflight brought along.
"""
SCRIPT = """\
export JAXOPS_COORDINATOR="$LAUNCH_ADDRESS:8476" JAXOPS_NUM_PROCESSES=4 JAXOPS_PROCESS_ID="$LAUNCH_WORKER"
exec python -m jaxops train CONFIG run.dir=RUN_DIR
"""
SKY = """\
# A training on a v6e-16 by SkyPilot, without the CLI: fill in the words in capitals, and, in the folder of the code,
#   sky jobs launch --name NAME sky.yaml
# RUN_DIR is an object store, gs://BUCKET/runs. SkyPilot finds machines, and tries again after a preemption.
# `jaxops launch ... --backend sky` prints one for any accelerator.
"""


def rendered() -> dict[str, str]:
    """The templates by file name."""
    plan = JobSetPlan(
        name="NAME",
        accelerator=find_accelerator("v6e-16"),
        image="IMAGE",
        script=SCRIPT,
        hours=12,
        labels={"run": "NAME"},
    )
    spec = Spec(
        name="NAME",
        run_dir="RUN_DIR",
        backend="sky",
        hosts=("a", "b", "c", "d"),
        type="v6e-16",
        argv=("train", "CONFIG", "run.dir=RUN_DIR"),
        devices=None,
        mesh={},
        price="spot",
    )
    record = LaunchRecord(spec=spec, hours=12, retries=10)
    made = {**task(record), "name": "NAME"}
    return {"jobset.yaml": JOBSET + to_yaml(jobset(plan)), "sky.yaml": SKY + to_yaml(made)}


@pytest.mark.parametrize("name", ["jobset.yaml", "sky.yaml"])
def test_the_template_is_what_the_launcher_renders(name):
    assert (FOLDER / name).read_text() == rendered()[name], (
        "write it again: python tests/launch/test_launch_templates.py"
    )


def test_a_template_that_is_filled_in_is_a_jobset_whose_script_is_one():
    text = (FOLDER / "jobset.yaml").read_text()
    for word, value in (("NAME", "tiny"), ("IMAGE", "img:1"), ("RUN_DIR", "gs://b/runs"), ("CONFIG", "rec/sasrec")):
        text = (
            text.replace(word, value)
            if word != "NAME"
            else text.replace(" NAME", f" {value}").replace("NAME-", "tiny-")
        )
    made = yaml.safe_load(text)
    assert made["metadata"]["name"] == "tiny"
    (container,) = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert env["LAUNCH_ADDRESS"].startswith("tiny-worker-0-0.")
    script = container["command"][2].replace("exec python -m jaxops", "echo $JAXOPS_COORDINATOR $JAXOPS_PROCESS_ID")
    places = {
        "JOB_SLICE": "0",
        "JOB_PODS": "4",
        "JOB_COMPLETION_INDEX": "2",
        "JOB_FIRST_ATTEMPT": "1",
        "JOB_RESTARTS": "0",
    }
    run = subprocess.run(
        ["sh", "-c", script],
        env={"PATH": "/usr/bin:/bin", "LAUNCH_ADDRESS": "a.b", **places},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "a.b:8476 2 train rec/sasrec run.dir=gs://b/runs\n", run.stderr


def test_a_wheel_carries_every_file_of_the_folder():
    """pyproject ships the whole folder; this says so where somebody would narrow it."""
    wheel = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "launch" in wheel["only-include"] and wheel["sources"]["launch"] == "jaxops/launch/scripts"


if __name__ == "__main__":
    for file, content in rendered().items():
        (FOLDER / file).write_text(content)
    sys.exit(0)
