"""Cloud TPU's queued resources (v4, v5e): the machines of one slice, which the launcher then drives by gcloud's ssh.

A resource and its node have the launch's name, so whoever asks finds what there is.
Tested in tests/launch/test_queued_resources.py against a gcloud that is faked from tests/launch/google.md.
"""

import dataclasses
import math
import shlex
import time
from collections.abc import Callable, Sequence

from jaxops.core.failures import RunFailed
from jaxops.launch import gcloud
from jaxops.launch.accelerators import Accelerator, find_accelerator
from jaxops.launch.arguments import Request
from jaxops.launch.backends.protocol import Driven, label
from jaxops.launch.commands import run_tool
from jaxops.launch.hosts import Host, Output, Unreachable
from jaxops.launch.record import LaunchRecord, Spec

_RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_TYPES = {"v5e": "v5litepod"}
"""Google's word for a generation in an accelerator type, where it is another one."""
_DEAD = ("FAILED", "SUSPENDED", "SUSPENDING")
_WAIT = {"spot": 60, "on demand": 60, "flex": 24 * 60, "reservation": 60}
"""Minutes to wait for machines, by price class."""
_SSH_FAILED = 255
POLL_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class TpuVmHost:
    """One host of a TPU VM, as `gcloud compute tpus tpu-vm ssh` reaches it."""

    name: str
    node: str
    worker: int
    where: tuple[str, ...]
    iap: bool = False

    def _argv(self, argv: Sequence[str]) -> list[str]:
        track = ["alpha"] if self.iap else []
        tunnel = ["--tunnel-through-iap"] if self.iap else []
        call = ["gcloud", *track, "compute", "tpus", "tpu-vm", "ssh", self.node, *self.where, *tunnel, "--quiet"]
        return [*call, f"--worker={self.worker}", f"--command={shlex.join(argv)}"]

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Output:
        """Runs a command on the host."""
        found = run_tool(self._argv(argv), missing=gcloud.MISSING, stdin=stdin, timeout=timeout + 30)
        if found.code == _SSH_FAILED or "ERROR: (gcloud" in found.err:
            raise Unreachable(f"{self.name}: gcloud's ssh failed: {found.last_words}")
        return found

    def shown(self, argv: Sequence[str]) -> str:
        """Returns gcloud's command as one would type it here."""
        return shlex.join(self._argv(argv))

    def address(self) -> str:
        """Returns the internal address of the first host."""
        found = gcloud.ask(["gcloud", "compute", "tpus", "tpu-vm", "describe", self.node, *self.where]) or {}
        ends = found.get("networkEndpoints") or []
        if self.worker >= len(ends):
            raise RunFailed(f"{self.name}: gcloud knows no address of it")
        return str(ends[self.worker]["ipAddress"])


class QueuedResources(Driven):
    """One slice, made by the Cloud TPU API, which is frozen: v4 and v5e have no other way."""

    name = "queued-resources"
    what = "a TPU slice of the Cloud TPU API (v4, v5e)"
    options = {
        **{name: what for name, what in gcloud.OPTIONS.items() if name != "subnet"},
        "runtime-version": "the software of the TPU VM",
        "iap": "yes, to reach hosts without an external address through an IAP tunnel",
    }
    prices = ("on demand", "spot", "flex", "reservation")

    def problems(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Refuses what such a resource cannot be."""
        found = gcloud.problems(request, self.options)
        if accelerator.chip is None or accelerator.chip.name not in _RUNTIMES:
            found.append(f"--backend queued-resources --on {request.on}: expected v4, v5e, v5p or v6e")
        elif accelerator.slices > 1:
            found.append(f"--backend queued-resources --on {request.on}: one slice; several go with --backend gke")
        if request.workers is not None:
            found.append("--workers goes with --backend local or slurm; a slice has one worker on each host")
        return found

    def workers(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Returns made-up names, one for each host of the slice."""
        return [f"host-{worker}" for worker in range(accelerator.hosts)]

    def host(self, name: str, spec: Spec) -> Host:
        """Returns the way of gcloud's ssh."""
        where = tuple(_where(spec))
        return TpuVmHost(name, label(spec.id), int(name.rpartition("-")[2]), where, spec.options.get("iap") == "yes")

    def create(self, record: LaunchRecord, say: Callable[[str], None], dry: bool) -> bool:
        """Asks for the resource, and waits until it is ACTIVE; one that is preempted or failed is deleted first."""
        spec = record.spec
        if dry:
            print(shlex.join(_create(record)))
            return True
        limit = 60 * float(spec.options.get("wait") or _WAIT[spec.price])
        until, told, made = time.monotonic() + limit, "", False
        while (state := _state(spec)) != "ACTIVE":
            if state in _DEAD:
                say(f"{label(spec.id)} is {state}: it is deleted, and asked for again")
                _delete(spec)
            if state in _DEAD or not state:
                made |= gcloud.make(_create(record))
                continue
            if time.monotonic() > until:
                _delete(spec)
                raise RunFailed(
                    f"{label(spec.id)} is still {state} after {limit / 60:.0f} minutes, and was removed: try another"
                    " zone or price class, or wait longer (--option wait=MINUTES)"
                )
            if state != told:
                say(f"{label(spec.id)}: {state}")
                told = state
            time.sleep(POLL_SECONDS)
        return made

    def standing(self, record: LaunchRecord) -> bool:
        """Returns whether the resource is ACTIVE."""
        return _state(record.spec) == "ACTIVE"

    def remove(self, record: LaunchRecord, say: Callable[[str], None]) -> None:
        """Deletes the resource with its node."""
        if _state(record.spec):
            say(f"deleting {label(record.spec.id)}")
            _delete(record.spec)

    def shell(self, record: LaunchRecord, worker: int, command: str) -> list[str]:
        """Returns gcloud's ssh to the host."""
        call = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", label(record.spec.id), *_where(record.spec)]
        return [*call, f"--worker={worker}"]


def _where(spec: Spec) -> list[str]:
    return [f"--project={spec.options['project']}", f"--zone={spec.options['zone']}"]


def _queued(spec: Spec, verb: str) -> list[str]:
    track = ["alpha"] if spec.price == "flex" and verb == "create" else []  # flex-start is in this track alone
    return ["gcloud", *track, "compute", "tpus", "queued-resources", verb, label(spec.id), *_where(spec)]


def _state(spec: Spec) -> str:
    """Returns Google's word for the state; empty where there is no such resource."""
    found = gcloud.ask(_queued(spec, "describe"))
    return str(found["state"]["state"]) if found else ""


def _delete(spec: Spec) -> None:
    gcloud.delete([*_queued(spec, "delete"), "--force", "--quiet"])
    if state := _state(spec):
        raise RunFailed(f"{label(spec.id)} was deleted and is still {state}; try again in a minute")


def _create(record: LaunchRecord) -> list[str]:
    spec, options = record.spec, record.spec.options
    accelerator = find_accelerator(spec.type)
    assert accelerator.chip is not None
    family, _, number = accelerator.type.partition("-")
    hours = max((record.deadline - time.time()) / 3600, 0) if record.deadline else record.hours
    seconds = max(600, math.ceil(hours * 3600))
    flags = [f"--node-id={label(spec.id)}", f"--accelerator-type={_TYPES.get(family, family)}-{number}"]
    flags += [f"--runtime-version={options.get('runtime-version') or _RUNTIMES[accelerator.chip.name]}"]
    flags += {
        "on demand": [],
        "spot": ["--spot"],
        "flex": ["--provisioning-model=flex-start", f"--max-run-duration={seconds}s"],
        "reservation": ["--reserved"],
    }[spec.price]
    wait = int(60 * float(options.get("wait") or _WAIT[spec.price]))
    flags += [f"--valid-until-duration={wait}s", f"--labels=jaxops-launch={label(spec.id)}"]
    flags += [f"--{key}={options[key]}" for key in ("network", "service-account") if key in options]
    flags += ["--internal-ips"] if options.get("external-ip") == "no" else []
    return [*_queued(spec, "create"), *flags, "--quiet"]


BACKEND = QueuedResources()
