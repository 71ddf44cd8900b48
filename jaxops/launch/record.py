"""The durable record of a launch, on the machine that launches: what there is is always found again.

It is written before anything that it names is made. So whoever reads it after the launcher was killed knows each place
where something may be. Tested in tests/launch/test_kill_launcher.py.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from jaxops.core.cache import state_root
from jaxops.core.failures import UserError, nearest
from jaxops.core.small_files import read_text
from jaxops.core.whole_files import replace_file

VERSION = 1
State = Literal["preparing", "running", "ended"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The run, its hosts and how they are used; two launches of one spec are the same launch.

    Attributes:
      name: the run's name.
      run_dir: the folder of runs, absolute or a URL.
      backend: the name of a module in jaxops/launch/backends.
      hosts: the names of the hosts, one for each worker.
      type: the accelerator, such as `cpu-8`.
      argv: the arguments of `jaxops` on a worker, such as `train my.yaml run.dir=/runs`.
      devices: the number of virtual CPU devices of a worker; None where there are chips.
      mesh: the size of each mesh axis.
      secrets: environment variables that workers get, as NAME, whose value is handed to them, or as NAME=SOURCE, which
        says where they find it.
      python: the interpreter on the hosts; empty where an environment is made from the lock file.
      lock: the lock file below the code.
      wheelhouse: a folder of wheels on the hosts; empty where they reach a package index.
      coordinator: the address at which the workers reach the first host; empty takes the one that ssh's config has.
      options: the backend's own, by name.
      price: the price class: `spot`, `flex`, `reservation` or `on demand`; empty where nothing is bought.
    """

    name: str
    run_dir: str
    backend: str
    hosts: tuple[str, ...]
    type: str
    argv: tuple[str, ...]
    devices: int | None
    mesh: dict[str, int]
    secrets: tuple[str, ...] = ()
    python: str = ""
    lock: str = "requirements.lock"
    wheelhouse: str = ""
    coordinator: str = ""
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    price: str = ""

    @property
    def id(self) -> str:
        """The name of the launch on every machine: that of the run, and a digest of where its folder is."""
        return launch_id(self.run_dir, self.name)

    def told_apart(self, earlier: "Spec") -> str:
        """Returns, in words, what an earlier launch of the same run has that is another than here."""
        names = [name for name in vars(self) if getattr(self, name) != getattr(earlier, name)]
        return f"run {self.name} in {self.run_dir} was launched with another {', '.join(names)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchRecord:
    """A launch and how far it has come.

    Attributes:
      spec: what is launched.
      state: `preparing` until the workers are started, `running` until their end is known, `ended`.
      roots: each host's folder of this launch; empty until they are known.
      code: the SHA-256 of the code.
      host: the SHA-256 of the host scripts and worker.json; empty where the launcher drives the hosts.
      inside: the folder in the code in which the workers run.
      python: the interpreter of each worker.
      attempt: the number of the attempt, from 1; 0 before the first.
      coordinator: where the workers of this attempt meet, as `host:port`.
      started: Unix time of the first attempt since the launch began.
      deadline: Unix time at which the hours are used up.
      machines: whether machines were asked for, which are there until they are removed.
      hours: how long it may last, retries included.
      submitted: Unix time at which the present attempt was submitted.
      handle: the name of the submission in the cluster; empty where there is none.
      grace: seconds between SIGTERM and SIGKILL.
      retries: the most attempts after the first.
      retried: attempts so far after the first.
      status: the exit status of what has ended.
      why: the reason of the end, in words.
    """

    spec: Spec
    state: State = "preparing"
    roots: tuple[str, ...] = ()
    code: str = ""
    host: str = ""
    inside: str = "."
    python: tuple[str, ...] = ()
    attempt: int = 0
    coordinator: str = ""
    started: float = 0.0
    deadline: float = 0.0
    machines: bool = False
    hours: float = 0.0
    submitted: float = 0.0
    handle: str = ""
    grace: float = 120.0
    retries: int = 10
    retried: int = 0
    status: int | None = None
    why: str = ""

    @property
    def made(self) -> bool:
        """Whether anything was made for it that may be there yet, on hosts or in a cluster."""
        return bool(self.roots or self.machines or self.host)

    def folder(self, worker: int) -> str:
        """Returns the folder of a worker's present attempt on its host."""
        return f"{self.roots[worker]}/worker-{worker}/attempt-{self.attempt}"


def launch_id(run_dir: str, name: str) -> str:
    """Returns the name of the launch of a run on every machine."""
    return f"{name[:80]}-{hashlib.sha256(f'{run_dir}/{name}'.encode()).hexdigest()[:8]}"


class LaunchFolder:
    """The folder of a launch on this machine: its record, its lock, and the wish that it stop."""

    def __init__(self, id: str):
        self.id, self.path = id, state_root() / "launch" / id

    def load(self) -> LaunchRecord | None:
        """Returns the record; None where there is none.

        Raises:
          UserError: it is damaged, or of a newer jaxops.
        """
        file = self.path / "record.json"
        try:
            values = json.loads(read_text(file))
            if values.pop("version") != VERSION:
                raise UserError(f"{file}: it was written by another version of jaxops; use that one to stop the launch")
            lists = {name: tuple(values[name]) for name in ("roots", "python")}
            spec: dict[str, Any] = {
                n: tuple(one) if isinstance(one, list) else one for n, one in values["spec"].items()
            }
            return LaunchRecord(**{**values, **lists, "spec": Spec(**spec)})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file}: this record of a launch cannot be read: {error}") from None

    def save(self, record: LaunchRecord) -> LaunchRecord:
        """Writes the record, whole, and returns it."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = json.dumps({"version": VERSION, **dataclasses.asdict(record)}, indent=1)
        replace_file(self.path / "record.json", [text.encode()])
        return record

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the right to change this launch; the kernel gives it back when this process ends, however it ends.

        Raises:
          UserError: another process of this machine has it.
        """
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self.path / "lock", "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"run {self.id} is being launched by process {self.owner()} of this machine; `jaxops job logs"
                    f" {self.id}` shows its workers, `jaxops job stop {self.id}` ends them, and another run needs"
                    " another run.name"
                ) from None
            (self.path / "owner").write_text(str(os.getpid()))
            yield

    def owner(self) -> str:
        """Returns the process id of the launcher that has this launch, or had it last."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return read_text(self.path / "owner")
        return "?"

    def supervised(self) -> bool:
        """Returns whether a launcher of this machine is at work on this launch."""
        try:
            with open(self.path / "lock", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except BlockingIOError:
            return True
        except OSError:
            return False

    def ask_to_stop(self) -> None:
        """Notes the wish that the launch stop: no launcher tries again after it."""
        (self.path / "stop").touch()

    def stop_wanted(self) -> bool:
        """Returns whether the launch is to stop."""
        return (self.path / "stop").exists()

    def forget_stop(self) -> None:
        """Takes the wish back, as a new launch does."""
        (self.path / "stop").unlink(missing_ok=True)

    @property
    def log(self) -> Path:
        """The file in which a detached launcher writes its messages."""
        return self.path / "launcher.log"

    def remove(self) -> None:
        """Removes all that this machine holds of the launch."""
        shutil.rmtree(self.path, ignore_errors=True)


def launches() -> list[LaunchFolder]:
    """Returns the launches that this machine knows of, by name."""
    root = state_root() / "launch"
    return [LaunchFolder(path.parent.name) for path in sorted(root.glob("*/record.json"))]


def find_launch(name: str) -> tuple[LaunchFolder, LaunchRecord]:
    """Finds a launch by its id, its run's name or its run's folder.

    Raises:
      UserError: there is none, or several runs have this name.
    """
    found = [(folder, record) for folder in launches() if (record := folder.load()) is not None]
    place = name.rstrip("/")
    places = {place, os.path.abspath(os.path.expanduser(place))}
    exact = [one for one in found if one[0].id == name or f"{one[1].spec.run_dir}/{one[1].spec.name}" in places]
    fitting = exact or [one for one in found if one[1].spec.name == name]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"several launches are called {name!r}: say {', '.join(folder.id for folder, _ in fitting)}")
    known = [word for folder, record in found for word in (record.spec.name, folder.id)]
    listed = ", ".join(record.spec.name for _, record in found) or "none"
    raise UserError(f"no launch of a run {name!r} is known on this machine{nearest(name, known)} (known: {listed})")
