"""Processes of this machine, as the hosts of a launch."""

from jaxops.core.failures import UserError
from jaxops.launch.accelerators import Accelerator
from jaxops.launch.arguments import Request
from jaxops.launch.backends.protocol import Driven
from jaxops.launch.hosts import Host, LocalHost
from jaxops.launch.record import Spec


class LocalBackend(Driven):
    """One worker process for each of `--workers`."""

    name = "local"
    what = "processes of this machine"
    on_this_machine = True

    def problems(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Refuses a list of hosts."""
        return ["--hosts goes with --backend ssh; --backend local takes --workers N"] if request.hosts else []

    def workers(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Returns made-up names."""
        workers = 1 if request.workers is None else request.workers
        if not 1 <= workers <= 64:
            raise UserError(f"--workers {workers}: expected from 1 to 64 processes on this machine")
        if accelerator.chip is not None and (accelerator.hosts > 1 or workers > 1):
            raise UserError(
                f"--on {request.on} --backend local: this machine is one host with one worker, and {accelerator}"
            )
        return [f"local-{worker}" for worker in range(workers)]

    def host(self, name: str, spec: Spec) -> Host:
        """Returns this machine."""
        return LocalHost(name)


BACKEND = LocalBackend()
