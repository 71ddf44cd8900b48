"""SkyPilot: a task file, written and not run."""

import shlex

from jaxops.core import stores
from jaxops.launch.accelerators import Accelerator
from jaxops.launch.arguments import Request
from jaxops.launch.backends.protocol import RenderedBackend
from jaxops.launch.record import LaunchRecord
from jaxops.launch.render.jobset import to_yaml
from jaxops.launch.render.sky import RUNTIMES, task


class Sky(RenderedBackend):
    """A task of SkyPilot's managed jobs."""

    name = "sky"
    what = "a task file for SkyPilot, which is printed and not run"
    prices = ("on demand", "spot")

    def problems(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Refuses chips that SkyPilot cannot have, and folders that its hosts do not share."""
        found = shared_problems(request, "sky")
        if accelerator.chip is not None and accelerator.chip.name not in RUNTIMES:
            found.append(
                f"--on {accelerator.type}: SkyPilot makes TPU VMs by the Cloud TPU API, which has"
                f" {', '.join(RUNTIMES)}; for {accelerator.chip.name} use --backend gke or mig"
            )
        if accelerator.slices > 1:
            found.append(f"--on {accelerator.type}: a task of SkyPilot is one slice; use --backend gke for several")
        return found

    def workers(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Returns made-up names."""
        count = (request.workers or 1) if accelerator.chip is None else accelerator.hosts
        return [f"node-{number}" for number in range(count)]

    def files(self, record: LaunchRecord) -> dict[str, str]:
        """Returns the task."""
        return {f"{record.spec.name}.sky.yaml": to_yaml(task(record))}

    def commands(self, record: LaunchRecord) -> list[str]:
        """Returns the line that hands the task to SkyPilot's managed jobs."""
        words = ["sky", "jobs", "launch", "--name", record.spec.name.lower(), f"{record.spec.name}.sky.yaml"]
        return [shlex.join([*words, *(word for name in record.spec.secrets for word in ("--secret", name))])]


def shared_problems(request: Request, backend: str) -> list[str]:
    """Returns what is wrong for hosts that nobody has reached yet."""
    found = []
    if request.hosts is not None:
        found.append(f"--hosts goes with --backend ssh; with --backend {backend} the cluster has the hosts")
    run_dir = next((one[len("run.dir=") :] for one in reversed(request.overrides) if one.startswith("run.dir=")), "")
    if run_dir and not stores.is_url(run_dir) and not run_dir.startswith("/"):
        found.append(f"run.dir={run_dir[:80]}: expected an object store (gs://BUCKET/...), or a folder that all share")
    return found


BACKEND = Sky()
