"""Compute Engine: a managed instance group with a workload policy is one TPU slice; its VMs start the workers.

A policy has the launch's name; each attempt has a template and a group of its own, whose names end in its number. So
what an earlier attempt or a killed launcher has left is always found, and never taken for the present one.
Tested in tests/launch/test_mig.py against a gcloud that is faked from tests/launch/google.md.
"""

import math
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxops.core import stores
from jaxops.launch import gcloud
from jaxops.launch.accelerators import Accelerator
from jaxops.launch.arguments import Request
from jaxops.launch.backends.protocol import Job, Scheduler, Sight
from jaxops.launch.scripts import script
from jaxops.launch.worker_files import deadline, read_beat, read_end

_BULK = ("flex", "reservation")
_ALIVE = ("PROVISIONING", "STAGING", "RUNNING", "REPAIRING", "PENDING")
_WAIT = {"spot": 30, "on demand": 30, "flex": 24 * 60, "reservation": 60}
"""Minutes to wait for machines, by price class."""
_IMAGES = dict.fromkeys(("v5p", "v6e"), "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e")


class ManagedInstanceGroup(Scheduler):
    """One slice, as a group of VMs."""

    name = "mig"
    what = "a TPU slice of Compute Engine (v5p, v6e, tpu7x)"
    options = {
        **gcloud.OPTIONS,
        "image-family": "the image of the VMs",
        "image-project": "the project of that image (default: ubuntu-os-accelerator-images)",
        "boot-disk-size": "such as 200GB",
    }
    prices = ("on demand", "spot", "flex", "reservation")
    secrets = ("sm",)

    def problems(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Refuses what such a group cannot be."""
        found = gcloud.problems(request, self.options)
        if accelerator.chip is None or accelerator.chip.name not in ("v5p", "v6e", "tpu7x"):
            found.append(f"--backend mig --on {request.on}: groups are made of v5p, v6e and tpu7x")
        elif accelerator.slices > 1:
            found.append(
                f"--backend mig --on {request.on}: one slice is one group; several slices go with --backend gke"
            )
        elif accelerator.chip.name not in _IMAGES and not request.option("image-family"):
            found.append(f"--on {request.on}: name the image of the VMs: --option image-family=...")
        if request.workers is not None:
            found.append("--workers goes with --backend local or slurm; a slice has one worker on each host")
        return found

    def workers(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Returns made-up names, one for each host of the slice."""
        return [f"host-{worker}" for worker in range(accelerator.hosts)]

    def folder_problem(self, run_dir: str) -> str:
        """Returns why the folder of runs cannot be used: the VMs write there, and this machine reads it."""
        if stores.is_url(run_dir) and not run_dir.startswith("gs://"):
            return f"run.dir={run_dir}: VMs of Compute Engine need gs://BUCKET/..., or a folder that is mounted on them"
        return ""

    def files(self, job: Job) -> dict[str, str]:
        """Returns the startup script; what it fetches lies beside it."""
        return {"startup.sh": startup_script(job)}

    def commands(self, job: Job) -> list[list[str]]:
        """Returns the commands of one attempt, in their order."""
        return [argv for argv, _ in self._steps(job, "startup.sh")]

    def _steps(self, job: Job, startup: str) -> list[tuple[list[str], list[str]]]:
        """Returns each command, with the one that says whether it has been done before; empty where it may be again."""
        spec, hosts = job.spec, len(job.spec.hosts)
        accelerator, options = job.accelerator, spec.options
        assert accelerator.chip is not None
        name, zone = _name(job), options["zone"]
        region = zone.rpartition("-")[0]
        policies, templates, groups = _families(job)
        steps = []
        if hosts > 1:
            shape = [f"--region={region}", "--type=HIGH_THROUGHPUT", f"--accelerator-topology={accelerator.topology}"]
            describe = [*policies, "describe", job.label, f"--region={region}", *_project(job)]
            steps.append(
                ([*policies, "create", "workload-policy", job.label, *_project(job), *shape], describe),
            )
        left = job.record.deadline - time.time() if job.record.deadline else job.record.hours * 3600
        seconds = max(600, math.ceil(left))
        flags = [f"--machine-type={accelerator.machine}", "--maintenance-policy=TERMINATE", *_price(job)]
        flags += [f"--max-run-duration={seconds}s", f"--labels=jaxops-launch={job.label}"]
        family = options.get("image-family") or _IMAGES[accelerator.chip.name]
        flags += [f"--image-family={family}"]
        flags += [f"--image-project={options.get('image-project', 'ubuntu-os-accelerator-images')}"]
        flags += [f"--boot-disk-size={options.get('boot-disk-size', '100GB')}", "--scopes=cloud-platform"]
        flags += [f"--{key}={options[key]}" for key in ("network", "subnet", "service-account") if key in options]
        flags += ["--no-address"] if options.get("external-ip") == "no" else []
        flags += [f"--metadata-from-file=startup-script={startup}"]
        steps.append(
            ([*templates, "create", name, *_project(job), *flags], [*templates, "describe", name, *_project(job)])
        )
        flags = [f"--zone={zone}", f"--template={name}", "--size=0", "--default-action-on-vm-failure=do-nothing"]
        if hosts > 1:  # the full name: a bare one is refused
            policy = f"projects/{options['project']}/regions/{region}/resourcePolicies/{job.label}"
            flags += [f"--workload-policy={policy}"]
        flags += ["--target-size-policy-mode=bulk"] if spec.price in _BULK else []
        where = [*_project(job), f"--zone={zone}"]
        steps.append(([*groups, "create", name, *_project(job), *flags], [*groups, "describe", name, *where]))
        steps.append(([*groups, "resize", name, *where, f"--size={hosts}"], []))
        return steps

    def submit(self, job: Job, say: Callable[[str], None]) -> str:
        """Makes policy, template and group where they are missing, and asks for the VMs."""
        with tempfile.TemporaryDirectory() as folder:
            startup = Path(folder) / "startup.sh"
            startup.write_text(startup_script(job))
            for argv, describe in self._steps(job, str(startup)):
                if describe and gcloud.ask(describe) is not None:
                    continue
                if describe:
                    gcloud.make(argv)
                elif (done := gcloud.call(argv)).code:
                    raise gcloud.refusal(argv, done)
        return _name(job)

    def look(self, job: Job) -> Sight:
        """Returns how the group is: a VM that is gone, or is not running any more, makes it preempted."""
        name, count = _name(job), len(job.spec.hosts)
        where = [*_project(job), f"--zone={job.spec.options['zone']}"]
        groups = _families(job)[2]
        attempt = job.record.attempt
        if gcloud.ask([*groups, "describe", name, *where]) is None:
            return Sight("absent", attempt, why="there is no such group")
        if all(read_end(job, attempt, worker) is not None for worker in range(count)):
            return Sight("ended", attempt, why="all workers have ended")
        listed = gcloud.ask([*groups, "list-instances", name, *where]) or []
        states = [str(one.get("instanceStatus") or "PENDING") for one in listed]
        hosts = tuple(str(one.get("instance", "")).rpartition("/")[2] for one in listed)
        # A part of a slice starts its workers too, which wait for the others.
        begun = all(read_beat(job, attempt, worker) is not None for worker in range(count))
        gone = [state for state in states if state not in _ALIVE]
        if gone or (begun and len(states) < count):
            why = f"PREEMPTED: {len(gone)} of {count} VMs are {', '.join(sorted(set(gone))) or 'gone'}"
            end = deadline(job)
            return Sight("ended", attempt, why=why, late=end is not None and time.time() >= end, hosts=hosts)
        running = states.count("RUNNING")
        if running == count:
            return Sight("running", attempt, why=f"{running} VMs", hosts=hosts)
        waited = time.time() - job.record.submitted
        limit = 60 * float(job.spec.options.get("wait") or _WAIT[job.spec.price])
        if job.record.submitted and waited > limit and not begun:
            why = f"{running} of {count} VMs after {limit / 60:.0f} minutes (--option wait=MINUTES)"
            return Sight("ended", attempt, why=why, hosts=hosts)
        return Sight("waiting", attempt, why=f"{running} of {count} VMs", hosts=hosts)

    def cancel(self, job: Job) -> None:
        """Leaves it to the workers, who look for the launch's wish to stop; a group without VMs is removed."""
        if self.look(job).state == "waiting":
            self.remove(job)

    def remove(self, job: Job) -> list[str]:
        """Deletes the groups and templates of all attempts, and the policy."""
        policies, templates, groups = _families(job)
        spec = job.spec
        zone, region = spec.options["zone"], spec.options["zone"].rpartition("-")[0]
        named = f"--filter=name~^{job.label}-a[0-9]+$"
        for family, where in ((groups, [f"--zone={zone}"]), (templates, [])):
            place = [f"--zones={zone}"] if where else []
            for one in gcloud.ask([*family, "list", *_project(job), *place, named]) or []:
                gcloud.delete([*family, "delete", str(one["name"]), *_project(job), *where, "--quiet"])
        if len(spec.hosts) > 1:
            gcloud.delete([*policies, "delete", job.label, *_project(job), f"--region={region}", "--quiet"])
        return []

    def console(self, job: Job, worker: int) -> str:
        """Returns the end of a VM's serial port, where startup scripts write."""
        hosts = self.look(job).hosts
        if worker >= len(hosts):
            return ""
        where = [*_project(job), f"--zone={job.spec.options['zone']}"]
        return gcloud.call(["gcloud", "compute", "instances", "get-serial-port-output", hosts[worker], *where], 60).out[
            -4096:
        ]

    def shell(self, job: Job, worker: int) -> list[str] | None:
        """Returns gcloud's ssh to a VM."""
        hosts = self.look(job).hosts
        where = [*_project(job), f"--zone={job.spec.options['zone']}"]
        return ["gcloud", "compute", "ssh", hosts[worker], *where] if worker < len(hosts) else None


def _families(job: Job) -> tuple[list[str], list[str], list[str]]:
    """Returns the commands of policies, templates and groups; the bulk mode of groups is in the newest gcloud alone."""
    compute = ["gcloud", "compute"]
    return [*compute, "resource-policies"], [*compute, "instance-templates"], [*compute, "instance-groups", "managed"]


def _name(job: Job) -> str:
    return f"{job.label}-a{job.record.attempt}"


def _project(job: Job) -> list[str]:
    return [f"--project={job.spec.options['project']}"]


def _price(job: Job) -> list[str]:
    """Returns the flags of a template for its price class."""
    options: dict[str, Sequence[str]] = {
        "on demand": ["--provisioning-model=STANDARD", "--instance-termination-action=DELETE"],
        "spot": ["--provisioning-model=SPOT", "--instance-termination-action=STOP"],
        "flex": ["--provisioning-model=FLEX_START", "--instance-termination-action=DELETE"],
        "reservation": [
            "--provisioning-model=RESERVATION_BOUND",
            "--instance-termination-action=DELETE",
            "--reservation-affinity=specific",
            f"--reservation={job.spec.options.get('reservation', '')}",
        ],
    }
    return list(options[job.spec.price])


def startup_script(job: Job) -> str:
    """Returns what a VM runs when it boots: the settings of this attempt, then launch/start_worker.sh."""
    settings = {**job.settings(), "LAUNCH_ATTEMPT": str(job.record.attempt)}
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in settings.items())
    return f"#!/bin/sh\n{exports}\n{script('start_worker.sh').read_text()}"


BACKEND = ManagedInstanceGroup()
