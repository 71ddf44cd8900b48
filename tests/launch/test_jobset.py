"""JobSets as they are rendered: their shape, their rules for another attempt, and what others' types say of them.

tests/launch/kubernetes.md says where each field and rule comes from. The checks by other people's types and schemas run
in an environment of their own (`make launch-env`); without one they are skipped in words.
"""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxops.launch.accelerators import accelerator_types, find_accelerator
from jaxops.launch.render.jobset import EXIT_HOURS, JobSetPlan, jobset, to_yaml

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".venv-launch" / "bin"


def plan(on: str = "v6e-16", **changes) -> JobSetPlan:
    made = JobSetPlan(
        name="tiny-0123abcd",
        accelerator=find_accelerator(on),
        image="europe-docker.pkg.dev/p/r/jaxops:1",
        script="exec true\n",
        env={"LAUNCH_FOLDER": "gs://b/runs/.launch/x"},
        hours=2,
        labels={"jaxops-launch": "tiny-0123abcd"},
    )
    return dataclasses.replace(made, **changes)


def parts(made: dict) -> tuple[dict, dict, dict]:
    """The spec of the JobSet, of its job, and of its pod."""
    (job,) = made["spec"]["replicatedJobs"]
    return made["spec"], job["template"]["spec"], job["template"]["spec"]["template"]["spec"]


EVERY = [
    plan(),
    plan("v5e-8", price="spot", queue="research", namespace="team-a", service_account="trainer"),
    plan("2xv5p-128", price="reservation", reservation="r1", secrets={"HF_TOKEN": "tiny/token"}),
    plan("tpu7x-64", price="flex", mounts={"/runs": "filestore"}),
    plan("2xv6e-256", price="flex", queue="dws", retries=0, attempt=3),
    plan("cpu-8", workers=2),
]
names = [one.accelerator.type + "-" + one.price for one in EVERY]


@pytest.mark.parametrize("on", accelerator_types())
def test_a_slice_gets_as_many_pods_as_it_has_hosts_and_every_chip(on):
    made = plan(on)
    spec, job, pod = parts(jobset(made))
    accelerator = made.accelerator
    if accelerator.chip is None:
        assert "nodeSelector" not in pod and job["completions"] == 1
        return
    (container,) = pod["containers"]
    assert job["completions"] == job["parallelism"] == accelerator.hosts
    assert container["resources"]["limits"]["google.com/tpu"] * job["completions"] == accelerator.chips
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator.chip.gke,
        "cloud.google.com/gke-tpu-topology": accelerator.topology,
    }
    assert spec["replicatedJobs"][0]["replicas"] == 1 and "hostNetwork" not in pod


def test_the_retries_are_the_jobsets_own():
    spec, job, pod = parts(jobset(plan(retries=4, grace=90, hours=0.5)))
    assert spec["failurePolicy"]["maxRestarts"] == 4 and job["backoffLimit"] == 0
    assert job["activeDeadlineSeconds"] == 1800 and pod["terminationGracePeriodSeconds"] == 90
    assert pod["restartPolicy"] == "Never"  # all that a podFailurePolicy goes with


def outcome(made: dict, code: int | None, disrupted: bool = False) -> str:
    """What Kubernetes makes of a pod's end, by the rules in kubernetes.md (R3, R4, J2, J3): restart or fail."""
    spec, job, _ = parts(made)
    reason = "BackoffLimitExceeded" if job["backoffLimit"] == 0 else ""
    for rule in job["podFailurePolicy"]["rules"]:
        conditions, exits = rule.get("onPodConditions", []), rule.get("onExitCodes")
        if any(one["type"] == "DisruptionTarget" for one in conditions) and disrupted:
            hit = True
        elif exits is not None and code:
            hit = (code in exits["values"]) == (exits["operator"] == "In")
        else:
            hit = False
        if hit:
            reason = {"FailJob": "PodFailurePolicy", "Count": reason}[rule["action"]]
            break
    for rule in spec["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            return {"FailJobSet": "fail"}[rule["action"]]
    return "restart"


@pytest.mark.parametrize("code", [75, 76, 129, 130, 134, 137, 139, 143, None])
def test_a_pod_that_saved_lost_a_peer_was_killed_or_never_began_is_tried_again(code):
    assert outcome(jobset(plan()), code) == "restart"


@pytest.mark.parametrize("code", [1, 2, EXIT_HOURS, 42, 126, 127])
def test_any_other_status_ends_the_launch_unless_the_pod_was_preempted(code):
    assert outcome(jobset(plan()), code) == "fail"
    assert outcome(jobset(plan()), code, disrupted=True) == "restart"


def test_the_end_of_the_hours_is_not_tried_again():
    assert "DeadlineExceeded" in jobset(plan())["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"]


def worker_of(made: dict, slice: int, index: int, restarts: int) -> dict[str, str]:
    """What a pod's script sees, run for real by `sh` with the variables that Kubernetes would set."""
    _, _, pod = parts(made)
    (container,) = pod["containers"]
    known = {"job-index": str(slice), "restart-attempt": str(restarts)}
    env = {"PATH": os.environ["PATH"], "JOB_COMPLETION_INDEX": str(index)}
    for one in container["env"]:
        path = one.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        env[one["name"]] = one["value"] if "value" in one else known[path.rpartition("/")[2].rstrip("']")]
    done = subprocess.run(container["command"], env=env, capture_output=True, text=True, timeout=20, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_each_pod_of_several_slices_knows_its_place():
    made = jobset(plan("2xv6e-16", script="exec env\n", attempt=2))
    spec, job, pod = parts(made)
    assert spec["replicatedJobs"][0]["replicas"] == 2 and job["completions"] == 4
    seen = [worker_of(made, slice, index, 3) for slice in range(2) for index in range(4)]
    assert [int(env["LAUNCH_WORKER"]) for env in seen] == list(range(8))
    assert {env["LAUNCH_ATTEMPT"] for env in seen} == {"5"}
    assert [env["MEGASCALE_SLICE_ID"] for env in seen] == ["0"] * 4 + ["1"] * 4
    first = "tiny-0123abcd-worker-0-0.tiny-0123abcd"
    assert {env["MEGASCALE_COORDINATOR_ADDRESS"] for env in seen} == {env["LAUNCH_ADDRESS"] for env in seen} == {first}
    assert {env["MEGASCALE_NUM_SLICES"] for env in seen} == {"2"}
    assert spec["network"]["subdomain"] == "tiny-0123abcd" and spec["network"]["publishNotReadyAddresses"]
    assert pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert spec["failurePolicy"]["restartStrategy"] == "BlockingRecreate"


def test_a_single_slice_has_no_network_between_slices():
    assert not any(name.startswith("MEGASCALE") for name in worker_of(jobset(plan(script="exec env\n")), 0, 1, 0))


def test_the_pods_of_one_slice_stay_in_one_node_pool():
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert jobset(plan())["metadata"]["annotations"] == {key: "cloud.google.com/gke-nodepool"}
    assert "annotations" not in jobset(plan("v6e-8"))["metadata"]  # one pod


@pytest.mark.parametrize(
    ("changes", "selector"),
    [
        ({"price": "spot"}, {"cloud.google.com/gke-spot": "true"}),
        ({"price": "flex"}, {"cloud.google.com/gke-flex-start": "true"}),
        ({"price": "flex", "queue": "dws"}, {"cloud.google.com/gke-queued": "true"}),
        (
            {"price": "reservation", "reservation": "r1"},
            {"cloud.google.com/reservation-name": "r1", "cloud.google.com/reservation-affinity": "specific"},
        ),
    ],
)
def test_each_price_class_names_its_nodes(changes, selector):
    made = jobset(plan(**changes))
    pod = parts(made)[2]
    assert selector.items() <= pod["nodeSelector"].items()
    tolerated = {one["key"] for one in pod["tolerations"]}
    assert tolerated == {"google.com/tpu", *(key for key in selector if "reservation" not in key)}
    if changes.get("queue"):
        assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "dws"
        assert made["metadata"]["annotations"]["provreq.kueue.x-k8s.io/maxRunDurationSeconds"] == "7200"


def test_a_secret_comes_from_the_cluster_by_its_name():
    env = parts(jobset(plan(secrets={"HF_TOKEN": "tiny/token", "WANDB_API_KEY": "wandb"})))[2]["containers"][0]["env"]
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "tiny", "key": "token"}}} in env
    assert {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "WANDB_API_KEY"}}} in env


def test_shared_memory_is_no_64_mebibytes():
    pod = parts(jobset(plan()))[2]
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


@pytest.mark.parametrize("made", EVERY, ids=names)
def test_yaml_reads_back_as_what_was_written(made):
    text = to_yaml(jobset(made))
    assert yaml.safe_load(text) == jobset(made) and "&id" not in text


def tool(name: str) -> str:
    """The path of a Python program of `make launch-env`; without it the test is skipped in words."""
    if not (TOOLS / name).exists():
        pytest.skip(f"no {TOOLS / name}: `make launch-env` brings what other people's schemas say of a JobSet")
    return str(TOOLS / name)


def in_tools(code: str, given: list) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    argv = [tool("python"), "-c", code]
    return subprocess.run(argv, input=json.dumps(given), capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.slow
def test_kubeflows_types_read_and_write_a_jobset_unchanged():
    code = (
        "import json, sys; from kubeflow_trainer_api.models import JobsetV1alpha2JobSet as JobSet\n"
        "print(json.dumps([JobSet.from_dict(one).to_dict() for one in json.load(sys.stdin)]))"
    )
    given = [jobset(made) for made in EVERY]
    done = in_tools(code, given)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == given


_VALIDATE = """\
import json, sys, kubernetes_validate
for job in json.load(sys.stdin):
    try:
        kubernetes_validate.validate(job, "1.34", strict=True)
        print("ok")
    except kubernetes_validate.ValidationError as error:
        print(error)
"""


@pytest.mark.slow
def test_kubernetes_schemas_take_the_inner_jobs_and_refuse_a_misspelt_one():
    jobs = []
    for made in EVERY:
        template = jobset(made)["spec"]["replicatedJobs"][0]["template"]
        jobs.append({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **template})
    wrong = json.loads(json.dumps(jobs[0]))
    wrong["spec"]["paralelism"] = 4
    done = in_tools(_VALIDATE, [*jobs, wrong])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[: len(jobs)] == ["ok"] * len(jobs) and "paralelism" in lines[-1]


def test_kubectl_reads_the_yaml_where_it_is_installed(tmp_path):
    """Without a cluster kubectl asks in vain which kinds there are, after its own parser has read the file."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine")
    for name, text in (("good", to_yaml(jobset(plan()))), ("bad", "a: [")):
        (tmp_path / f"{name}.yaml").write_text(text)
        (tmp_path / "kubeconfig").write_text("")
        argv = ["kubectl", "create", "--dry-run=client", "--validate=false", "-f", str(tmp_path / f"{name}.yaml")]
        env = {**os.environ, "KUBECONFIG": str(tmp_path / "kubeconfig"), "HOME": str(tmp_path)}
        said = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=env).stderr
        assert ("error parsing" in said) == (name == "bad"), said


def test_one_slice_asks_for_no_field_that_an_older_jobset_lacks():
    """xpk's issue 443: a server with an older JobSet refuses a field that it does not know."""
    spec, _, _ = parts(jobset(plan(price="spot", queue="q", mounts={"/runs": "claim"})))
    assert spec.keys() == {"network", "failurePolicy", "replicatedJobs"}
    assert spec["failurePolicy"].keys() == {"maxRestarts", "rules"}
