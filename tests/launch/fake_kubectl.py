#!/usr/bin/env python3
"""A stand-in for kubectl and the cluster behind it: jobs and JobSets as tests/launch/kubernetes.md has them.

Pods are processes of this machine. The cluster is a file beside this one, and what its controllers would do meanwhile
is done at each call. A test reaches into it with `control`: it preempts a pod, or has every call refused.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
STATE = os.path.join(HERE, "cluster.json")
SPOT_SECONDS = 2.0
"""Seconds that a preempted pod has (G7, shorter here)."""


class Cluster:
    """The cluster, held by one call at a time."""

    def __enter__(self):
        self.lock = open(os.path.join(HERE, "lock"), "w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        try:
            with open(STATE) as file:
                vars(self).update(json.load(file))
        except FileNotFoundError:
            self.jobsets, self.created, self.calls, self.refuse = {}, 0, [], ""
        self.reconcile()
        return self

    def __exit__(self, *_):
        self.reconcile()
        kept = {name: getattr(self, name) for name in ("jobsets", "created", "calls", "refuse")}
        with open(STATE + ".new", "w") as file:
            json.dump(kept, file)
        os.replace(STATE + ".new", STATE)
        self.lock.close()

    def create(self, thing):
        name, spec = thing["metadata"]["name"], thing["spec"]
        if name in self.jobsets:  # O8
            error = f'error when creating "STDIN": jobsets.jobset.x-k8s.io "{name}" already exists'
            refuse("Error from server (AlreadyExists): " + error)
        for job in spec["replicatedJobs"]:
            inner = job["template"]["spec"]
            pod = inner["template"]["spec"]
            longest = "{}-{}-{}-{}-xxxxx".format(name, job["name"], job["replicas"] - 1, inner["completions"] - 1)
            if len(longest) > 63 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):  # O3
                refuse("Error from server (Invalid): JobSet name is too long or no DNS label: " + longest)
            if "podFailurePolicy" in inner and pod["restartPolicy"] != "Never":  # O6
                refuse("Error from server (Invalid): restartPolicy must be Never beside a podFailurePolicy")
        self.created += 1
        status = {"restarts": 0, "conditions": []}
        self.jobsets[name] = {**thing, "status": status, "pods": [], "jobs": {}}
        if "kueue.x-k8s.io/queue-name" in thing["metadata"].get("labels", {}):  # J7: until there is quota
            spec["suspend"] = True
            condition(self.jobsets[name], "Suspended", "SuspendedJobs", "jobset is suspended")
        return name

    def reconcile(self):
        for name, one in list(self.jobsets.items()):
            for pod in one["pods"]:
                look_at(pod)
            alive = [pod for pod in one["pods"] if pod["phase"] == "Running"]
            if one["metadata"].get("deletionTimestamp"):  # O9
                for pod in alive:
                    end(pod, one)
                if not alive:
                    del self.jobsets[name]
                continue
            if terminal(one):
                for pod in alive:
                    end(pod, one)
                continue
            if one["spec"].get("suspend"):  # J7: its pods are deleted, and made anew when it goes on
                for pod in alive:
                    end(pod, one)
                if not alive:
                    now = one["status"]["restarts"]
                    one["pods"] = [pod for pod in one["pods"] if pod["restart"] != now]
                continue
            self.run_jobs(name, one)

    def run_jobs(self, name, one):
        (replicated,) = one["spec"]["replicatedJobs"]
        restarts = one["status"]["restarts"]
        for index in range(replicated["replicas"]):
            job = "{}-{}-{}".format(name, replicated["name"], index)
            inner = replicated["template"]["spec"]
            own = [pod for pod in one["pods"] if pod["job"] == job]
            now = [pod for pod in own if pod["restart"] == restarts]
            if not now:  # J2: a job is made anew once its pods of before are gone
                others = one["pods"] if one["spec"]["failurePolicy"].get("restartStrategy") else own  # J6
                if any(pod["phase"] == "Running" for pod in others):
                    for pod in others:
                        if pod["phase"] == "Running":
                            end(pod, one)
                    continue
                one["jobs"][job] = {"began": time.time(), "reason": "", "restart": restarts}
                for completion in range(inner["completions"]):
                    one["pods"].append(begin(one, job, index, completion, restarts, inner["template"]["spec"]))
                continue
            state = one["jobs"][job]
            if not state["reason"]:
                state["reason"] = failure(inner, now, state)
            if state["reason"]:  # R2, R4: all its pods are ended
                for pod in now:
                    if pod["phase"] == "Running":
                        end(pod, one)
        failed = [
            (job, state) for job, state in one["jobs"].items() if state["reason"] and state["restart"] == restarts
        ]
        if failed:
            self.apply_failure_policy(one, failed)
            return
        done = [pod for pod in one["pods"] if pod["restart"] == restarts and pod["phase"] == "Succeeded"]
        if len(done) == replicated["replicas"] * replicated["template"]["spec"]["completions"]:  # J5
            condition(one, "Completed", "AllJobsCompleted", "jobset completed successfully")

    def apply_failure_policy(self, one, failed):
        policy = one["spec"]["failurePolicy"]
        action, job = "RestartJobSet", failed[0][0]  # J1
        for rule in policy.get("rules", ()):
            fits = [job for job, state in failed if state["reason"] in rule["onJobFailureReasons"]]
            if fits:
                action, job = rule["action"], fits[0]
                break
        first = f" (first failed job: {job})"
        if action == "FailJobSet":  # J3
            condition(
                one, "Failed", "FailJobSetFailurePolicyAction", "applying FailJobSet failure policy action" + first
            )
        elif one["status"]["restarts"] >= policy["maxRestarts"]:  # J4
            said = "jobset failed due to reaching max number of restarts" + first
            condition(one, "Failed", "ReachedMaxRestarts", said)
        else:
            one["status"]["restarts"] += 1

    def jobset(self, name):
        one = self.jobsets[name]
        return {key: one[key] for key in ("apiVersion", "kind", "metadata", "spec", "status")}

    def job(self, name, state):
        failed = [{"type": "Failed", "status": "True", "reason": state["reason"]}] if state["reason"] else []
        return {"kind": "Job", "metadata": {"name": name}, "status": {"conditions": failed}}

    def pod(self, pod, one):
        waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
        state = {"running": {}} if pod["phase"] == "Running" else waiting
        if pod["code"] is not None:
            state = {"terminated": {"exitCode": pod["code"]}}
        (container,) = one["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
        disrupted = [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}]
        metadata = {"name": pod["name"], "creationTimestamp": pod["created"], "labels": pod["labels"]}
        return {
            "kind": "Pod",
            "metadata": metadata,
            "spec": {"nodeName": "node-" + str(pod["worker"]), "containers": [container]},
            "status": {
                "phase": pod["phase"],
                "conditions": disrupted if pod["disrupted"] else [],
                "containerStatuses": [{"name": container["name"], "state": state}],
            },
        }


def terminal(one):
    return any(c["type"] in ("Completed", "Failed") for c in one["status"]["conditions"])


def condition(one, kind, reason, message):
    one["status"]["conditions"].append({"type": kind, "status": "True", "reason": reason, "message": message})


def begin(one, job, slice, completion, restarts, spec):
    """Starts a pod: its command, with the variables that Kubernetes sets (O4, O5)."""
    (container,) = spec["containers"]
    labels = {
        "jobset.sigs.k8s.io/jobset-name": one["metadata"]["name"],
        "jobset.sigs.k8s.io/job-index": str(slice),
        "jobset.sigs.k8s.io/restart-attempt": str(restarts),
        "batch.kubernetes.io/job-completion-index": str(completion),
    }
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "JOB_COMPLETION_INDEX": str(completion)}
    for given in container["env"]:
        source = given.get("valueFrom", {})
        if "value" in given:
            env[given["name"]] = given["value"]
        elif "fieldRef" in source:
            env[given["name"]] = labels[re.fullmatch(r"metadata\.labels\['(.*)'\]", source["fieldRef"]["fieldPath"])[1]]
        else:
            with open(os.path.join(HERE, "secrets.json")) as file:
                env[given["name"]] = json.load(file)["{name}/{key}".format(**source["secretKeyRef"])]
    first = "{}-0-0.{}".format(job.rpartition("-")[0], one["spec"]["network"]["subdomain"])  # O1
    assert env["LAUNCH_ADDRESS"] == first, env["LAUNCH_ADDRESS"]
    env["LAUNCH_ADDRESS"] = "127.0.0.1"  # what the cluster's names lead to
    name = f"{job}-{completion}-{os.urandom(3).hex()[:5]}"
    base = os.path.join(HERE, "pods", name)
    os.makedirs(os.path.dirname(base), exist_ok=True)
    env["LAUNCH_WORK"] = base + ".work"  # a file system of its own
    # A process of its own sees the end of the container and writes its status; it outlives this call.
    watch = "import subprocess, sys, os, signal\np = subprocess.Popen(sys.argv[2:])\n"
    watch += "signal.signal(signal.SIGTERM, lambda *_: p.terminate())\n"
    watch += 'code = p.wait()\nopen(sys.argv[1] + ".new", "w").write(str(code if code >= 0 else 128 - code))\n'
    watch += 'os.replace(sys.argv[1] + ".new", sys.argv[1])\n'
    with open(base + ".log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", watch, base + ".exit", *container["command"]],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    pods = int(env["JOB_PODS"]) if "JOB_PODS" in env else 1
    return {
        "name": name,
        "job": job,
        "restart": restarts,
        "labels": labels,
        "worker": slice * pods + completion,
        "pid": process.pid,
        "base": base,
        "phase": "Running",
        "code": None,
        "disrupted": False,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "told": 0.0,
        "grace": 0.0,
    }


def look_at(pod):
    """Sees whether a pod has ended, and kills one whose grace period is over (O10)."""
    if pod["phase"] != "Running":
        return
    if os.path.exists(pod["base"] + ".exit"):
        with open(pod["base"] + ".exit") as file:
            pod["code"] = int(file.read())
        pod["phase"] = "Succeeded" if pod["code"] == 0 else "Failed"
        kill_all(pod)
    elif pod["told"] and time.time() > pod["told"] + pod["grace"]:
        kill_all(pod)
        pod["phase"], pod["code"] = "Failed", 137


def end(pod, one, grace=None):
    if not pod["told"]:
        spec = one["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        pod["told"], pod["grace"] = time.time(), spec["terminationGracePeriodSeconds"] if grace is None else grace
        with contextlib.suppress(ProcessLookupError):
            os.kill(pod["pid"], signal.SIGTERM)


def kill_all(pod):
    """Kills all processes of a pod, as the end of a container does: those that have its own file system."""
    mark = "LAUNCH_WORK={}.work".format(pod["base"]).encode()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if mark in file.read().split(b"\0"):
                    os.kill(int(pid), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            pass


def failure(inner, pods, state):
    """Returns why a job has failed, by its podFailurePolicy and limits (R1 to R5, R8); empty where it has not."""
    if time.time() > state["began"] + inner["activeDeadlineSeconds"]:
        return "DeadlineExceeded"
    counted = 0
    for pod in pods:
        if pod["phase"] != "Failed":
            continue
        action = "Count"
        for rule in inner["podFailurePolicy"]["rules"]:
            kinds = [one["type"] for one in rule.get("onPodConditions", ())]
            exits = rule.get("onExitCodes")
            by_condition = "DisruptionTarget" in kinds and pod["disrupted"]
            inside = exits is not None and pod["code"] in exits["values"]
            by_exit = exits is not None and pod["code"] != 0 and inside == (exits["operator"] == "In")
            if by_condition or by_exit:
                action = rule["action"]
                break
        if action == "FailJob":
            return "PodFailurePolicy"
        if action not in ("Count", "Ignore"):
            raise AssertionError(action)
        counted += action == "Count"
    return "BackoffLimitExceeded" if counted > inner["backoffLimit"] else ""


def refuse(text):
    print(text, file=sys.stderr)
    sys.exit(1)


def control(words):
    """What a test does to the cluster: preempt, kill or delete WORKER | suspend | admit | refuse TEXT."""
    with Cluster() as cluster:
        for one in cluster.jobsets.values():
            running = [pod for pod in one["pods"] if pod["phase"] == "Running"]
            if words[0] == "admit":
                one["spec"]["suspend"] = False
                one["status"]["conditions"] = []
            if words[0] == "suspend":
                one["spec"]["suspend"] = True
                condition(one, "Suspended", "SuspendedJobs", "jobset is suspended")
            for pod in running:
                if words[0] == "preempt" and str(pod["worker"]) == words[1]:  # R6, G7
                    pod["disrupted"] = True
                    end(pod, one, SPOT_SECONDS)
                if words[0] == "delete" and str(pod["worker"]) == words[1]:  # O10, as `kubectl delete pod` does it
                    end(pod, one)
                if words[0] == "kill" and str(pod["worker"]) == words[1]:
                    kill_all(pod)
                    pod["phase"], pod["code"] = "Failed", 137
        if words[0] == "refuse":
            cluster.refuse = words[1]


def main(argv):
    flags = [word for word in argv if word.startswith("-")]
    words = [word for word in argv if not word.startswith("-")]
    with Cluster() as cluster:
        cluster.calls.append(argv)
        text = "" if words[:1] == ["control"] else cluster.refuse
    if text:
        refuse(text)
    if words[0] == "control":
        return control(words[1:])
    selector = words[2].partition("=") if "-l" in flags else ("", "", "")
    if words[0] == "create":
        import yaml

        with Cluster() as cluster:
            name = cluster.create(yaml.safe_load(sys.stdin))
        print(f"jobset.jobset.x-k8s.io/{name} created")
    elif words[0] == "get":
        with Cluster() as cluster:
            items = []
            for name, one in cluster.jobsets.items():
                mine = selector[2] == (name if "jobset-name" in selector[0] else one["metadata"]["labels"][selector[0]])
                if mine:
                    kinds = {"jobsets": [cluster.jobset(name)]}
                    kinds["jobs"] = [cluster.job(*job) for job in one["jobs"].items()]
                    kinds["pods"] = [cluster.pod(pod, one) for pod in one["pods"]]
                    items += kinds[words[1]]
        print(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    elif words[0] == "delete":
        assert words[1] == "jobsets" and "--cascade=foreground" in flags
        while True:
            with Cluster() as cluster:
                mine = [
                    n for n, one in cluster.jobsets.items() if one["metadata"]["labels"][selector[0]] == selector[2]
                ]
                for name in mine:
                    cluster.jobsets[name]["metadata"].setdefault("deletionTimestamp", "now")
            if "--wait=false" in flags or not mine:
                break
            time.sleep(0.1)
        print("deleted" if mine else "No resources found")
    elif words[0] == "logs":
        with open(os.path.join(HERE, "pods", words[1] + ".log")) as file:
            print(file.read(), end="")
    else:
        refuse("error: unknown command " + words[0])


if __name__ == "__main__":
    main(sys.argv[1:])
