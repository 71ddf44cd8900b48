"""A launch as a JobSet, the way Kubernetes runs several jobs of several pods that begin, fail and restart together.

The JobSet owns its retries: no launcher has to live on. A pod that is disrupted, or ends with a status that a new
attempt may mend, fails its job, and with it all jobs are made anew, a bounded number of times. Any other status fails
the JobSet. Where each field comes from is told in tests/launch/kubernetes.md. Tested in tests/launch/test_jobset.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import yaml

from jaxops.core.failures import EXIT_INTERRUPTED, EXIT_LOST
from jaxops.launch.accelerators import Accelerator

Price = Literal["on demand", "spot", "flex", "reservation"]
WORKER = "worker"
"""The name of the replicated job, and of the container in its pods."""
_PLACE = """\
LAUNCH_WORKER=$((JOB_SLICE * JOB_PODS + JOB_COMPLETION_INDEX))
LAUNCH_ATTEMPT=$((JOB_FIRST_ATTEMPT + JOB_RESTARTS))
export LAUNCH_WORKER LAUNCH_ATTEMPT
"""
EXIT_HOURS = 3
"""The status of a container whose --max-hours are used up: it is never tried again."""
RETRIED = (EXIT_INTERRUPTED, EXIT_LOST, *(128 + signal for signal in (1, 2, 6, 7, 8, 9, 11, 15)))
"""The statuses after which a new attempt may help: saved, a lost peer, and the signals that end a process."""
SPOT_GRACE = 15
"""Seconds that GKE gives the pods of a spot node, unless its node pool is configured for more (120 at most)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSetPlan:
    """All that a JobSet needs to know.

    Attributes:
      name: the name of the JobSet; its pods' names end with `-worker-SLICE-POD-xxxxx` and have 63 letters at most.
      accelerator: the chips of all slices.
      image: the container image.
      script: what each pod runs, in `sh`, with LAUNCH_WORKER, LAUNCH_ATTEMPT and LAUNCH_ADDRESS set.
      env: variables with a value that all pods share.
      hours: after how many hours the pods must be gone.
      grace: seconds between SIGTERM and SIGKILL.
      retries: restarts after the first attempt.
      attempt: the number of the first attempt, from 1.
      workers: pods of a CPU job; a slice of chips has as many as it has hosts.
      price: the price class.
      reservation: the name of a reservation, for the price class `reservation`.
      queue: Kueue's LocalQueue; empty where the cluster has no Kueue.
      namespace: the namespace; empty takes that of kubectl's context.
      service_account: the Kubernetes service account of the pods, which may read and write the bucket of runs.
      secrets: the Secret and its key, as `SECRET/KEY`, by the variable that comes from it.
      mounts: persistent volume claims by the path at which all pods see them.
      labels: further labels of the JobSet and its pods.
    """

    name: str
    accelerator: Accelerator
    image: str
    script: str
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hours: float
    grace: float = 120.0
    retries: int = 10
    attempt: int = 1
    workers: int = 1
    price: Price = "on demand"
    reservation: str = ""
    queue: str = ""
    namespace: str = ""
    service_account: str = ""
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mounts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def pods(self) -> int:
        """The number of pods of one slice."""
        chips = self.accelerator.chip is not None
        return self.accelerator.hosts // self.accelerator.slices if chips else self.workers

    @property
    def address(self) -> str:
        """The name at which all pods of an attempt reach the first one."""
        return f"{self.name}-{WORKER}-0-0.{self.name}"


def jobset(plan: JobSetPlan) -> dict[str, Any]:
    """Returns the JobSet of a launch, as an object that YAML writes down."""
    accelerator, slices = plan.accelerator, plan.accelerator.slices
    several = plan.pods * slices > 1
    rule = {
        "name": "neverAgain",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
    }
    failure: dict[str, Any] = {"maxRestarts": plan.retries, "rules": [rule]}
    if slices > 1:  # no slice begins anew while another one still saves
        failure["restartStrategy"] = "BlockingRecreate"
    metadata: dict[str, Any] = {"name": plan.name}
    if plan.namespace:
        metadata["namespace"] = plan.namespace
    metadata["labels"] = dict(plan.labels) | ({"kueue.x-k8s.io/queue-name": plan.queue} if plan.queue else {})
    annotations = {}
    if accelerator.chip is not None and several:  # else the pods of one slice may be spread over two of one shape
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    if plan.price == "flex" and plan.queue:
        annotations["provreq.kueue.x-k8s.io/maxRunDurationSeconds"] = str(_seconds(plan))
    if annotations:
        metadata["annotations"] = annotations
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": plan.name},
            "failurePolicy": failure,
            "replicatedJobs": [{"name": WORKER, "replicas": slices, "template": {"spec": _job(plan)}}],
        },
    }


def _seconds(plan: JobSetPlan) -> int:
    return max(1, round(plan.hours * 3600))


def _job(plan: JobSetPlan) -> dict[str, Any]:
    """Returns the spec of the job of one slice."""
    exits = {"containerName": WORKER, "operator": "NotIn", "values": list(RETRIED)}
    rules: list[dict[str, Any]] = [
        # Whatever the status of a pod that was evicted or preempted: it counts as one failure, and the backoff limit of
        # 0 fails the job. `Ignore` would replace this pod alone, beside others that wait for the one that is gone.
        {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": exits},
    ]
    return {
        "completionMode": "Indexed",
        "completions": plan.pods,
        "parallelism": plan.pods,
        "backoffLimit": 0,
        "activeDeadlineSeconds": _seconds(plan),
        "podFailurePolicy": {"rules": rules},
        "template": {"metadata": {"labels": dict(plan.labels)}, "spec": _pod(plan)},
    }


def _pod(plan: JobSetPlan) -> dict[str, Any]:
    accelerator = plan.accelerator
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]  # 64 MiB otherwise, too little for input workers
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    for number, (path, claim) in enumerate(sorted(plan.mounts.items())):
        mounts.append({"name": f"shared-{number}", "mountPath": path})
        volumes.append({"name": f"shared-{number}", "persistentVolumeClaim": {"claimName": claim}})
    container: dict[str, Any] = {
        "name": WORKER,
        "image": plan.image,
        "command": ["sh", "-c", _PLACE + plan.script],
        "env": _environment(plan),
        "volumeMounts": mounts,
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # the only one that goes with a podFailurePolicy
        "terminationGracePeriodSeconds": max(1, round(plan.grace)),
    }
    if plan.service_account:
        pod["serviceAccountName"] = plan.service_account
    if accelerator.chip is not None:
        container["ports"] = [{"containerPort": port, "protocol": "TCP"} for port in (8471, 8080, 8431)]  # libtpu's own
        chips = {"google.com/tpu": accelerator.chips_of_host}
        container["resources"] = {"requests": chips, "limits": dict(chips)}
        pod["nodeSelector"] = accelerator.node_selector | _price_selector(plan)
        pod["tolerations"] = _tolerations(plan)
    if accelerator.slices > 1:  # the network between slices, without a bridge in between
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return pod | {"containers": [container], "volumes": volumes}


def _price_selector(plan: JobSetPlan) -> dict[str, str]:
    if plan.price == "spot":
        return {"cloud.google.com/gke-spot": "true"}
    if plan.price == "flex":
        return {"cloud.google.com/gke-queued" if plan.queue else "cloud.google.com/gke-flex-start": "true"}
    if plan.price == "reservation":
        return {
            "cloud.google.com/reservation-name": plan.reservation,
            "cloud.google.com/reservation-affinity": "specific",
        }
    return {}


def _tolerations(plan: JobSetPlan) -> list[dict[str, str]]:
    """Returns what lets the pods onto nodes that their price class or their chips keep for themselves."""
    keys = ["google.com/tpu"]
    keys += [key for key in _price_selector(plan) if not key.startswith("cloud.google.com/reservation")]
    return [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in keys]


def _environment(plan: JobSetPlan) -> list[dict[str, Any]]:
    """Returns the variables of a pod: its place among all, the network between slices, the shared ones, secrets."""
    slices = plan.accelerator.slices
    field = lambda path: {"valueFrom": {"fieldRef": {"fieldPath": path}}}
    places: dict[str, Any] = {
        "JOB_SLICE": field("metadata.labels['jobset.sigs.k8s.io/job-index']"),
        "JOB_RESTARTS": field("metadata.labels['jobset.sigs.k8s.io/restart-attempt']"),
        "JOB_PODS": {"value": str(plan.pods)},
        "JOB_FIRST_ATTEMPT": {"value": str(plan.attempt)},
        "LAUNCH_STATUS_DECIDES": {"value": "1"},
        "LAUNCH_ADDRESS": {"value": plan.address},
    }
    if slices > 1:
        places |= {
            "MEGASCALE_NUM_SLICES": {"value": str(slices)},
            "MEGASCALE_SLICE_ID": field("metadata.labels['jobset.sigs.k8s.io/job-index']"),
            "MEGASCALE_COORDINATOR_ADDRESS": {"value": plan.address},
        }
    places |= {name: {"value": value} for name, value in plan.env.items()}
    for name, place in plan.secrets.items():
        kept, _, key = place.partition("/")
        places[name] = {"valueFrom": {"secretKeyRef": {"name": kept, "key": key or name}}}
    return [{"name": name, **source} for name, source in places.items()]


def to_yaml(thing: Mapping[str, Any]) -> str:
    """Returns an object of Kubernetes as YAML."""
    return yaml.dump(thing, Dumper=_Plain, sort_keys=False, width=120)


class _Plain(yaml.SafeDumper):
    """Writes lists of numbers on one line, scripts as blocks, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        """Writes each thing in full, however often it is there."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


def _list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    flow = bool(items) and all(isinstance(item, int) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Plain.add_representer(str, _text)
_Plain.add_representer(list, _list)
