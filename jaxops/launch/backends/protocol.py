"""What a backend is: the two sorts, and the values that they exchange with their engines.

The seam is described at the top of jaxops/launch/backends/__init__.py.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

from jaxops.launch.accelerators import Accelerator, find_accelerator
from jaxops.launch.arguments import Request
from jaxops.launch.hosts import Host
from jaxops.launch.record import LaunchRecord, Spec

JobState = Literal["absent", "waiting", "running", "ended"]


class Backend(abc.ABC):
    """A way to reach machines.

    Attributes:
      name: as in `--backend`.
      what: one line for the help.
      options: the keys of `--option KEY=VALUE` that it takes, each with one line for the help.
      secrets: the sources of `--secret NAME=SOURCE:...` that its workers can read; `env` is a bare NAME.
      on_this_machine: whether the workers are processes of this machine, with its folders and its Python.
      prices: the price classes that it can buy; empty where nothing is bought.
      tries_again: whether the cluster starts the workers again after a preemption, without a launcher.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    options: ClassVar[Mapping[str, str]] = {}
    secrets: ClassVar[Sequence[str]] = ("env",)
    on_this_machine: ClassVar[bool] = False
    prices: ClassVar[Sequence[str]] = ()
    tries_again: ClassVar[bool] = False

    @abc.abstractmethod
    def problems(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Returns what is wrong with the request, in words; an empty list where nothing is. It touches nothing."""

    @abc.abstractmethod
    def workers(self, request: Request, accelerator: Accelerator) -> list[str]:
        """Returns the names of the workers' hosts, which may be made up until there are hosts.

        Raises:
          UserError: the request does not say which.
        """


class Driven(Backend):
    """A backend whose hosts the launcher reaches."""

    @abc.abstractmethod
    def host(self, name: str, spec: Spec) -> Host:
        """Returns the way to a host."""

    def create(self, record: LaunchRecord, say: Callable[[str], None], dry: bool) -> bool:
        """Makes the machines, or adopts those that are there; returns whether it made any, once they can be reached.

        Raises:
          UserError, RunFailed: they cannot be had within the wait limit; what was made in part is removed again.
        """
        return False

    def standing(self, record: LaunchRecord) -> bool:
        """Returns whether the machines are there; where they are not, no worker is alive."""
        return True

    def remove(self, record: LaunchRecord, say: Callable[[str], None]) -> None:
        """Removes the machines that `create` has made."""

    def shell(self, record: LaunchRecord, worker: int, command: str) -> list[str] | None:
        """Returns the command that opens a shell on the host of a worker; None where there is no way."""
        return None


class RenderedBackend(Backend):
    """A backend that is written down for another tool; jaxops runs nothing of it."""

    def files(self, record: LaunchRecord) -> dict[str, str]:
        """Returns the files, by name."""
        return {}

    @abc.abstractmethod
    def commands(self, record: LaunchRecord) -> list[str]:
        """Returns the lines that one types with these files in the folder of the code."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One attempt of a launch, as a scheduler is to run it.

    Attributes:
      record: the launch; `record.attempt` is the attempt to submit, from 1.
    """

    record: LaunchRecord

    @property
    def spec(self) -> Spec:
        """The run and how it is launched."""
        return self.record.spec

    @property
    def id(self) -> str:
        """The launch's name on every machine."""
        return self.spec.id

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator of the launch."""
        return find_accelerator(self.spec.type)

    @property
    def folder(self) -> str:
        """Where the launch keeps its files, below the folder of runs: a path or a URL."""
        return f"{self.spec.run_dir}/.launch/{self.id}"

    @property
    def label(self) -> str:
        """The value of the label `jaxops-launch`: lower case, digits and dashes, at most 40 characters."""
        return label(self.id)

    def settings(self) -> dict[str, str]:
        """Returns the variables of `start_worker.sh` that all workers share; none is a secret."""
        return {
            "LAUNCH_FOLDER": self.folder,
            "LAUNCH_CODE": f"{self.spec.run_dir}/code/{self.record.code}.tar",
            "LAUNCH_CODE_SHA256": self.record.code,
            "LAUNCH_HOST_SHA256": self.record.host,
            "LAUNCH_WORKERS": str(len(self.spec.hosts)),
        }


def label(id: str) -> str:
    """Returns the id of a launch as a name that Google Cloud, Kubernetes and Slurm accept: [a-z][a-z0-9-]*, 40 at most.

    The digest at the end of the id stays, so two launches differ.
    """
    clean = "".join(c if c.isascii() and c.isalnum() else "-" for c in id.lower())
    name, digest = clean[:-9], clean[-8:]
    return f"jx-{name[:28].strip('-')}-{digest}"


@dataclasses.dataclass(frozen=True)
class Sight:
    """The state of a submission, as the cluster tells it at one look.

    Attributes:
      state: `absent` where there is none, `waiting` for machines, `running`, or `ended`.
      attempt: the present attempt, from 1.
      code: the exit status where the cluster knows one.
      why: the cluster's own word for it, such as PREEMPTED.
      late: whether the cluster ended it because its hours are used up.
      hosts: the machines, where they are known.
    """

    state: JobState
    attempt: int = 1
    code: int | None = None
    why: str = ""
    late: bool = False
    hosts: tuple[str, ...] = ()


class Scheduler(Backend):
    """A backend that starts the workers itself.

    Attributes:
      meet: how the workers find each other: `folder` (worker 0 writes an address into the launch's folder) or `jax`.
    """

    meet: ClassVar[Literal["folder", "jax"]] = "jax"

    def folder_problem(self, run_dir: str) -> str:
        """Returns why the folder of runs cannot be used, in words; empty where it can."""
        return ""

    @abc.abstractmethod
    def files(self, job: Job) -> dict[str, str]:
        """Returns the files of the submission, by name below `job.folder`; the engine writes them before `submit`."""

    @abc.abstractmethod
    def commands(self, job: Job) -> list[list[str]]:
        """Returns the commands that `submit` runs, as --dry-run prints them."""

    @abc.abstractmethod
    def submit(self, job: Job, say: Callable[[str], None]) -> str:
        """Submits the job, or adopts the one that is there, and returns its name in the cluster.

        Raises:
          UserError, RunFailed: the cluster refuses; the message has its words and the remedy.
        """

    @abc.abstractmethod
    def look(self, job: Job) -> Sight:
        """Returns how the job is.

        Raises:
          RunFailed: the cluster does not answer.
        """

    @abc.abstractmethod
    def cancel(self, job: Job) -> None:
        """Has the workers get SIGTERM, so that they save and end; one that waits for machines is taken back."""

    @abc.abstractmethod
    def remove(self, job: Job) -> list[str]:
        """Ends the job at once and removes all that was made for it; returns what is left, in words."""

    def notes(self, job: Job) -> list[str]:
        """Returns what one should know of a submission, for --dry-run and before it is submitted."""
        return []

    def console(self, job: Job, worker: int) -> str:
        """Returns what the cluster itself has kept of a worker's output, for one that wrote no log."""
        return ""

    def shell(self, job: Job, worker: int) -> list[str] | None:
        """Returns the command that opens a shell beside a worker; None where there is no way."""
        return None
