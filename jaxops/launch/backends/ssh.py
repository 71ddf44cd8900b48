"""A list of hosts that one has, reached by the user's own ssh."""

from jaxops.core.failures import UserError
from jaxops.launch.accelerators import Accelerator
from jaxops.launch.arguments import Request
from jaxops.launch.backends.protocol import Driven
from jaxops.launch.hosts import Host, SshHost, parse_hosts
from jaxops.launch.record import LaunchRecord, Spec


class Ssh(Driven):
    """One worker on each host of `--hosts`."""

    name = "ssh"
    what = "hosts that you have (--hosts)"

    def problems(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Asks for hosts, and refuses a number of workers."""
        if request.hosts is None:
            return ["--backend ssh needs --hosts HOST[,HOST], or --hosts @FILE with one a line"]
        if request.workers is not None:
            return ["--workers goes with --backend local or slurm; over ssh each host of --hosts runs one worker"]
        return []

    def workers(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Returns the hosts of the list."""
        hosts = parse_hosts(str(request.hosts))
        if accelerator.chip is not None and len(hosts) != accelerator.hosts:
            raise UserError(f"--hosts: {len(hosts)} given, and {accelerator}")
        return hosts

    def host(self, name: str, spec: Spec) -> Host:
        """Returns the way of `ssh NAME`."""
        return SshHost(name)

    def shell(self, record: LaunchRecord, worker: int, command: str) -> list[str]:
        """Returns the user's own ssh to the host."""
        return ["ssh", "-t", "--", record.spec.hosts[worker], *filter(None, [command])]


BACKEND = Ssh()
