"""Ray: the command that submits a job to a cluster that one has, printed and not run."""

import re
import shlex

from jaxops.launch.accelerators import Accelerator
from jaxops.launch.arguments import Request
from jaxops.launch.backends.protocol import RenderedBackend
from jaxops.launch.backends.sky import shared_problems
from jaxops.launch.record import LaunchRecord
from jaxops.launch.render.ray import submission

_ADDRESS = re.compile(r"https?://[A-Za-z0-9_.:-]+")


class Ray(RenderedBackend):
    """A job of Ray, whose driver starts one worker on each host of one slice."""

    name = "ray"
    what = "a job for a Ray cluster, whose command is printed and not run"
    options = {"address": "the dashboard of the cluster, such as http://HEAD:8265"}

    def problems(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Refuses secrets, which Ray would keep in the job's environment, and what is no address."""
        found = shared_problems(request, "ray")
        address = request.option("address")
        if address and not _ADDRESS.fullmatch(address):
            found.append(f"--option address={address[:80]}: expected http://HOST:PORT")
        if request.secrets:
            found.append(
                "--secret: Ray shows the runtime environment of a job to all who see its dashboard; put the secret into"
                " the environment of the cluster's hosts"
            )
        if accelerator.slices > 1:
            found.append(f"--on {accelerator.type}: several slices are not rendered for Ray; use --backend gke")
        return found

    def workers(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Returns made-up names."""
        count = (request.workers or 1) if accelerator.chip is None else accelerator.hosts
        return [f"node-{number}" for number in range(count)]

    def commands(self, record: LaunchRecord) -> list[str]:
        """Returns the line that submits the job, from the folder of the code."""
        return [shlex.join(submission(record, record.spec.options.get("address", "http://127.0.0.1:8265")))]


BACKEND = Ray()
