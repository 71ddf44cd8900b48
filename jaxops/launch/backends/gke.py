"""A JobSet on a Kubernetes cluster with TPUs (GKE), made and watched with the user's own `kubectl`.

The JobSet tries again by itself, so no launcher has to live on. Every call begins with a look at what is there under
the launch's label: a launcher that was killed leaves nothing that the next one does not find. What kubectl and the
cluster answer stands in tests/launch/kubernetes.md. Tested in tests/launch/test_gke.py.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxops.core import stores
from jaxops.core.failures import EXIT_INTERRUPTED, EXIT_LOST, EXIT_OK, Lost, RunFailed, UserError
from jaxops.core.secret_text import printable
from jaxops.launch.accelerators import Accelerator
from jaxops.launch.arguments import Request
from jaxops.launch.backends.protocol import Job, Scheduler, Sight
from jaxops.launch.commands import run_tool
from jaxops.launch.hosts import Output
from jaxops.launch.record import Spec
from jaxops.launch.render.jobset import EXIT_HOURS, SPOT_GRACE, WORKER, JobSetPlan, jobset, to_yaml
from jaxops.launch.render.other_tools import gcluster_line, xpk_line
from jaxops.launch.scripts import script

LABEL, ATTEMPT_LABEL = "jaxops-launch", "jaxops-attempt"
SECONDS = 60.0
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_CONTEXT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@/-]{0,252}")
_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._:/@-]{0,500}")
_MOUNT = re.compile(r"([a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?):(/[A-Za-z0-9_./-]*)")
_REFUSALS = (
    ("no matches for kind", "the cluster has no JobSet: a cluster's owner installs it once (jobset.sigs.k8s.io)"),
    ("current-context is not set", "kubectl has no cluster: gcloud container clusters get-credentials CLUSTER"),
    ("context was not found", "see `kubectl config get-contexts` for what --option context=... may be"),
    ("must be logged in", "log in again: gcloud auth login"),
    ("Unauthorized", "log in again: gcloud auth login"),
    ("gke-gcloud-auth-plugin", "install it: gcloud components install gke-gcloud-auth-plugin"),
    ("no endpoints available", "JobSet's controller does not run: kubectl get pods -n jobset-system"),
    ("forbidden", "ask the cluster's owner for the right to create, get and delete jobsets and to read pods and logs"),
    ("namespaces", "name a namespace that is there: --option namespace=..."),
)
"""What kubectl says, and what helps."""
_AWAY = (
    "Unable to connect",
    "was refused",
    "connection refused",
    "i/o timeout",
    "TLS handshake",
    "EOF",
    "ServiceUnavailable",
)


class Gke(Scheduler):
    """One pod for each host of the slices."""

    name = "gke"
    what = "a JobSet on a Kubernetes cluster (kubectl; --option image=...)"
    options = {
        "image": "the container image, from launch/Dockerfile",
        "namespace": "the Kubernetes namespace",
        "context": "kubectl's context",
        "queue": "Kueue's LocalQueue",
        "service-account": "the Kubernetes service account of the pods",
        "mount": "CLAIM:/PATH, a persistent volume claim that all pods share",
    }
    secrets = ("k8s",)
    prices = ("on demand", "spot", "flex", "reservation")
    tries_again = True
    meet = "folder"

    def problems(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Says which options are missing or are no names that Kubernetes takes."""
        return list(_problems(request, accelerator))

    def workers(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Returns the ends of the names of the pods."""
        if accelerator.chip is None:
            return [f"{WORKER}-0-{pod}" for pod in range(request.workers or 1)]
        pods = accelerator.hosts // accelerator.slices
        return [f"{WORKER}-{slice}-{pod}" for slice in range(accelerator.slices) for pod in range(pods)]

    def files(self, job: Job) -> dict[str, str]:
        """Returns the JobSet as YAML."""
        return {f"jobset-{job.record.attempt}.yaml": to_yaml(jobset(plan_of(job)))}

    def commands(self, job: Job) -> list[list[str]]:
        """Returns the one command that makes the JobSet."""
        file, create = f"{job.folder}/jobset-{job.record.attempt}.yaml", _kubectl(job.spec, "create", "-f", "-")
        if file.startswith("gs://"):
            return [["sh", "-c", f"gcloud storage cat {shlex.quote(file)} | {shlex.join(create)}"]]
        if stores.is_url(file):
            return [["sh", "-c", f"aws s3 cp {shlex.quote(file)} - | {shlex.join(create)}"]]
        return [[*create[:-1], file]]

    def submit(self, job: Job, say: Callable[[str], None]) -> str:
        """Makes the JobSet of this attempt, once: a second one of its name is refused by the cluster."""
        plan = plan_of(job)
        there = _jobset(job)
        if there is not None:
            alive = not _conditions(there).keys() & {"Completed", "Failed"}
            if "deletionTimestamp" not in _metadata(there) and (alive or _attempt(there) == job.record.attempt):
                return plan.name
            self.remove(job)  # an earlier attempt, which has ended or is being deleted
        done = _run(job.spec, ["create", "-f", "-"], stdin=to_yaml(jobset(plan)).encode())
        if done.code and "AlreadyExists" not in done.err:
            raise _refused(done, f"JobSet {plan.name}")
        return plan.name

    def notes(self, job: Job) -> list[str]:
        """Returns the time that spot nodes give, and the lines of Google's own tools for the same machines."""
        plan, argv = plan_of(job), ["jaxops", *job.spec.argv]
        found = []
        if plan.price == "spot" and plan.grace > SPOT_GRACE:
            found.append(
                f"GKE gives the pods of a spot node {SPOT_GRACE} s to save, and more only where the node pool is"
                f" configured for it (120 at most); --grace {plan.grace:g} holds for all other ends"
            )
        if plan.accelerator.chip is not None:
            found.append(f"the same machines by the Cluster Toolkit: {gcluster_line(plan, argv)}")
            found.append(f"the same machines by xpk: {xpk_line(plan, argv)}")
        return found

    def look(self, job: Job) -> Sight:
        """Returns how the JobSet is, from its conditions and those of its pods."""
        there = _jobset(job)
        return Sight("absent", job.record.attempt) if there is None else sight(there, _jobs(job), _pods(job))

    def cancel(self, job: Job) -> None:
        """Deletes the JobSet with its pods, which get SIGTERM and their grace period; it is gone when they are."""
        # Foreground: else the JobSet is gone at once, and its pods go on unseen.
        argv = ["delete", "jobsets", "-l", f"{LABEL}={job.label}", "--cascade=foreground", "--wait=false"]
        done = _run(job.spec, [*argv, "--ignore-not-found"])
        if done.code:
            raise _refused(done, f"JobSet {job.label}")

    def remove(self, job: Job) -> list[str]:
        """Deletes the JobSet with all that it made, and waits until it is gone."""
        limit = job.record.grace + 60
        argv = ["delete", "jobsets", "-l", f"{LABEL}={job.label}", "--cascade=foreground", "--ignore-not-found"]
        done = _run(job.spec, [*argv, f"--timeout={limit:.0f}s"], seconds=limit + SECONDS)
        if done.code:
            raise _refused(done, f"JobSet {job.label}")
        return []

    def console(self, job: Job, worker: int) -> str:
        """Returns the last lines that the cluster has of a pod, for one that could not begin."""
        name = next((name for number, name in _names(_pods(job)) if number == worker), "")
        done = _run(job.spec, ["logs", name, "-c", WORKER, "--tail=200"]) if name else None
        return done.out if done is not None and not done.code else ""

    def shell(self, job: Job, worker: int) -> list[str] | None:
        """Returns `kubectl exec` into the pod of a worker."""
        name = next((name for number, name in _names(_pods(job)) if number == worker), "")
        return _kubectl(job.spec, "exec", "-it", name, "-c", WORKER, "--", "sh") if name else None


def _problems(request: Request, accelerator: Accelerator) -> Iterator[str]:
    if request.hosts is not None:
        yield "--hosts goes with --backend ssh; on gke the cluster has the hosts"
    if request.workers is not None and accelerator.chip is not None:
        yield f"--workers: {accelerator} has one worker on each of its hosts"
    if request.workers is not None and not 1 <= request.workers <= 1000:
        yield f"--workers {request.workers}: expected from 1 to 1000 pods"
    if request.coordinator is not None:
        yield "--coordinator goes with --backend ssh; the pods of a JobSet find the first one by its name"
    image = request.option("image")
    if not image:
        yield "--backend gke needs --option image=IMAGE, built from launch/Dockerfile"
    elif not _IMAGE.fullmatch(image):
        yield f"--option image={image[:80]}: expected REGISTRY/PATH:TAG or REGISTRY/PATH@DIGEST"
    for key in ("namespace", "queue", "service-account"):
        value = request.option(key)
        if value and not _NAME.fullmatch(value):
            yield f"--option {key}={value[:80]}: expected a name of Kubernetes: a-z, 0-9 and dashes, 63 at most"
    context = request.option("context")
    if context and not _CONTEXT.fullmatch(context):
        yield f"--option context={context[:80]}: expected a name as `kubectl config get-contexts` shows it"
    mount = request.option("mount")
    if mount and not _MOUNT.fullmatch(mount):
        yield f"--option mount={mount[:80]}: expected CLAIM:/PATH, the claim's name and where the pods see it"
    if request.reservation is not None and not _NAME.fullmatch(request.reservation):
        yield f"--reservation {request.reservation[:80]}: expected the name of a reservation: a-z, 0-9 and dashes"
    if accelerator.chip is None and request.price != "on demand":
        yield f"--{request.price}: {accelerator} has no price class"
    run_dir = next((one[len("run.dir=") :] for one in reversed(request.overrides) if one.startswith("run.dir=")), "")
    path = mount.partition(":")[2].rstrip("/")
    if run_dir and not stores.is_url(run_dir) and not (path and f"{run_dir}/".startswith(f"{path}/")):
        yield (
            f"run.dir={run_dir[:80]}: pods share an object store (gs://BUCKET/...), or a folder below the path of"
            " --option mount=CLAIM:/PATH"
        )


def plan_of(job: Job) -> JobSetPlan:
    """Returns the JobSet of a launch's present attempt."""
    spec, record, options = job.spec, job.record, job.spec.options
    claim, _, path = options.get("mount", "").partition(":")
    return JobSetPlan(
        name=job.label,
        accelerator=job.accelerator,
        image=options["image"],
        script=script("start_worker.sh").read_text(encoding="utf-8"),
        env=job.settings(),
        hours=record.hours,
        grace=record.grace,
        retries=max(record.retries - record.retried, 0),
        attempt=record.attempt,
        workers=len(spec.hosts),
        price=spec.price or "on demand",  # type: ignore[arg-type]
        reservation=options.get("reservation", ""),
        queue=options.get("queue", ""),
        namespace=options.get("namespace", ""),
        service_account=options.get("service-account", ""),
        secrets=dict(one.split("=k8s:", 1) for one in spec.secrets),
        mounts={path: claim} if claim else {},
        labels={LABEL: job.label, ATTEMPT_LABEL: str(record.attempt)},
    )


def sight(there: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]], pods: Sequence[Mapping[str, Any]]) -> Sight:
    """Returns what a JobSet says of a launch.

    Args:
      there: the JobSet as the cluster has it.
      jobs: its jobs.
      pods: its pods, those of earlier attempts among them.
    """
    status = there.get("status") or {}
    restarts = int(status.get("restarts") or 0)
    attempt = _attempt(there) + restarts
    mine = [pod for pod in pods if _label(pod, "jobset.sigs.k8s.io/restart-attempt") in ("", str(restarts))]
    hosts = tuple(str((pod.get("spec") or {}).get("nodeName") or "") for _, pod in _numbered(mine))
    conditions = _conditions(there)
    if "Completed" in conditions:
        return Sight("ended", attempt, EXIT_OK, "Completed", hosts=hosts)
    if "Failed" in conditions:
        deadline = any(_conditions(one).get("Failed", {}).get("reason") == "DeadlineExceeded" for one in jobs)
        if deadline or EXIT_HOURS in map(_exit, mine):
            return Sight("ended", attempt, EXIT_INTERRUPTED, "--max-hours are used up", late=True, hosts=hosts)
        code, why = _failure(mine)
        said = _words(f"{conditions['Failed'].get('reason', '')}: {conditions['Failed'].get('message', '')}")
        return Sight("ended", attempt, code, why or said, hosts=hosts)
    if "deletionTimestamp" in _metadata(there):
        return Sight("running", attempt, None, "its pods are ending", hosts=hosts)
    if "Suspended" in conditions or (there.get("spec") or {}).get("suspend"):
        return Sight("waiting", attempt, None, "suspended: Kueue starts it when there is quota")
    phases = [str((pod.get("status") or {}).get("phase")) for pod in mine]
    if "Running" in phases or "Succeeded" in phases:
        return Sight("running", attempt, hosts=hosts)
    return Sight("waiting", attempt, None, next(_obstacles(mine), ""), hosts=hosts)


def _conditions(thing: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the conditions that hold, by their type."""
    listed = (thing.get("status") or {}).get("conditions") or ()
    return {str(one.get("type")): one for one in listed if one.get("status") == "True"}


def _failure(pods: Sequence[Mapping[str, Any]]) -> tuple[int | None, str]:
    """Returns the exit status and the reason of a JobSet that failed, by its pods; a disrupted pod comes first."""
    ends = [(pod, code) for pod in pods if (code := _exit(pod)) is not None]
    for pod in pods:
        if "DisruptionTarget" in _conditions(pod):
            return EXIT_LOST, f"pod {_metadata(pod).get('name')} was preempted"
    for wanted in (lambda code: 0 < code < 128 and code not in (EXIT_INTERRUPTED, EXIT_LOST), lambda code: code):
        for pod, code in ends:
            if wanted(code):
                return code, f"pod {_metadata(pod).get('name')} ended with status {code}"
    return None, ""


def _exit(pod: Mapping[str, Any]) -> int | None:
    for container in (pod.get("status") or {}).get("containerStatuses") or ():
        ended = (container.get("state") or {}).get("terminated")
        if ended and container.get("name") == WORKER:
            return int(ended.get("exitCode", 0))
    return None


def _obstacles(pods: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields why pods do not run: an image that cannot be pulled, no node that fits."""
    for pod in pods:
        status = pod.get("status") or {}
        for container in status.get("containerStatuses") or ():
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                yield _words(f"{waiting['reason']}: {waiting.get('message', '')}")
        for one in status.get("conditions") or ():
            if one.get("type") == "PodScheduled" and one.get("status") == "False":
                yield _words(f"{one.get('reason', '')}: {one.get('message', '')}")


def _words(text: str) -> str:
    return printable(" ".join(text.split()))[:400]


def _numbered(pods: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """Returns the pods in the order of their workers, with their numbers."""
    found = []
    for pod in pods:
        places = [_label(pod, "jobset.sigs.k8s.io/job-index"), _label(pod, "batch.kubernetes.io/job-completion-index")]
        per_slice = next(
            (one["value"] for one in _environment(pod) if one.get("name") == "JOB_PODS" and "value" in one), "1"
        )
        if all(place.isdigit() for place in [*places, per_slice]):
            found.append((int(places[0]) * int(per_slice) + int(places[1]), pod))
    return sorted(found, key=lambda one: one[0])


def _names(pods: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    newest = sorted(pods, key=lambda pod: str(_metadata(pod).get("creationTimestamp", "")), reverse=True)
    return [(number, str(_metadata(pod).get("name", ""))) for number, pod in _numbered(newest)]


def _environment(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one for container in (pod.get("spec") or {}).get("containers") or () for one in container.get("env") or ()]


def _metadata(thing: Mapping[str, Any]) -> Mapping[str, Any]:
    return thing.get("metadata") or {}


def _label(thing: Mapping[str, Any], name: str) -> str:
    metadata = _metadata(thing)
    return str((metadata.get("labels") or {}).get(name) or (metadata.get("annotations") or {}).get(name) or "")


def _attempt(there: Mapping[str, Any]) -> int:
    """Returns the number of the attempt with which a JobSet began."""
    text = _label(there, ATTEMPT_LABEL)
    return int(text) if text.isdigit() else 1


def _jobset(job: Job) -> Mapping[str, Any] | None:
    found = _items(job, "jobsets", f"{LABEL}={job.label}")
    return found[0] if found else None


def _jobs(job: Job) -> list[Mapping[str, Any]]:
    return _items(job, "jobs", f"jobset.sigs.k8s.io/jobset-name={job.label}")


def _pods(job: Job) -> list[Mapping[str, Any]]:
    return _items(job, "pods", f"jobset.sigs.k8s.io/jobset-name={job.label}")


def _items(job: Job, kind: str, selector: str) -> list[Mapping[str, Any]]:
    done = _run(job.spec, ["get", kind, "-l", selector, "-o", "json"])
    if done.code:
        raise _refused(done, kind)
    try:
        return list(json.loads(done.out)["items"])
    except (ValueError, KeyError, TypeError):
        raise RunFailed(f"kubectl get {kind}: the answer is no list: {_words(done.err)}") from None


def _kubectl(spec: Spec, *argv: str) -> list[str]:
    flags = [f"--{name}={spec.options[name]}" for name in ("context", "namespace") if spec.options.get(name)]
    return ["kubectl", *flags, *argv]


def _run(spec: Spec, argv: Sequence[str], stdin: bytes = b"", seconds: float = SECONDS) -> Output:
    missing = "gcloud components install kubectl"
    return run_tool(_kubectl(spec, *argv), missing=missing, stdin=stdin, timeout=seconds)


def _refused(done: Output, what: str) -> Exception:
    """Returns the error for a refusal: what kubectl said, and what helps."""
    said = _words(done.err or done.out)
    if any(word in said for word in _AWAY):
        return Lost(f"{what}: the cluster does not answer: {said}")
    advice = next((help for word, help in _REFUSALS if word in said), "")
    return UserError(f"{what}: {said}{f' ({advice})' if advice else ''}")


BACKEND = Gke()
