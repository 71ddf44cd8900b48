"""The driver of a training on a Ray cluster: one worker on each host, ended together, and tried again together.

usage: ray_driver.py '{"workers": 4, "resources": {"TPU": 4}, "seconds": 3600, "grace": 120, "retries": 10,
                       "command": "jaxops train my.yaml run.dir=gs://bucket/runs"}'

Ray's own trainers for jax skip `jax.distributed.initialize` where there are no TPUs, and each worker would train alone,
so the workers are told of each other by the JAXOPS_ variables. Statuses are those of `jaxops train`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote(max_retries=0)
def free_address():
    """Returns an address of this host, with a port that is free now."""
    with socket.socket() as free:
        free.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


@ray.remote(max_retries=0)
def work(command, env, seconds, grace):
    """Runs one worker, at most so many seconds, and returns its status; 124 where its time was used up."""
    process = subprocess.Popen(["sh", "-c", f"exec {command}"], env={**os.environ, **env}, start_new_session=True)
    for signum, limit in ((signal.SIGTERM, seconds), (signal.SIGKILL, grace)):
        try:
            code = process.wait(limit)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signum)
    process.wait()
    return 124


def attempt(job, group, seconds):
    """Runs all workers once, and returns their statuses; 76 for one whose host is gone."""
    place = lambda n: PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=n)
    number, resources = job["workers"], dict(job["resources"])
    needs = {"num_cpus": resources.pop("CPU", 0), "resources": resources}
    first = ray.get(free_address.options(scheduling_strategy=place(0), num_cpus=0).remote())
    tasks = []
    for rank in range(number):
        names = ("JAXOPS_COORDINATOR", "JAXOPS_NUM_PROCESSES", "JAXOPS_PROCESS_ID")
        env = dict(zip(names, (first, str(number), str(rank)), strict=True)) if number > 1 else {}
        task = work.options(scheduling_strategy=place(rank), **needs)
        tasks.append(task.remote(job["command"], env, seconds, job["grace"]))
    statuses = []
    for task in tasks:
        try:
            statuses.append(ray.get(task))
        except ray.exceptions.RayError as error:
            print(f"ray_driver: {type(error).__name__}", file=sys.stderr)
            statuses.append(76)
    return statuses


def main(job):
    """Tries until the workers are done, cannot be helped, or the hours are used up; returns the exit status."""
    ray.init()
    deadline = time.time() + job["seconds"]
    for number in range(job["retries"] + 1):
        group = placement_group([dict(job["resources"])] * job["workers"], strategy="SPREAD")
        ray.get(group.ready())
        statuses = attempt(job, group, max(deadline - time.time(), 1))
        ray.util.remove_placement_group(group)
        print(f"ray_driver: attempt {number + 1}: {statuses}", file=sys.stderr, flush=True)
        if not any(statuses):
            return 0
        again = [status for status in statuses if status in (75, 76) or status >= 128]
        wrong = [status for status in statuses if status and status not in again]
        preempted = any(status in (75, 137, 143) for status in statuses)
        if time.time() >= deadline or 124 in statuses:
            return 75
        if wrong and not preempted:
            return wrong[0]
    return again[0] if again else 76


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
