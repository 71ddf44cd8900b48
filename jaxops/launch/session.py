"""The talk of the launcher with its hosts: one object for a launch, whose requests may all be repeated.

With `dry` nothing is asked and nothing touched: each command is printed, and the answer that would be is made up.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from jaxops.core.cache import state_root
from jaxops.core.failures import RunFailed
from jaxops.launch.backends.protocol import Driven
from jaxops.launch.backends.table import find_backend
from jaxops.launch.hosts import Host, Output, each
from jaxops.launch.record import LaunchFolder, LaunchRecord
from jaxops.launch.scripts import script

_PUT = (
    'umask 077; root="${JAXOPS_STATE:-$HOME/.local/state/jaxops}/launch/hosts/$1"; mkdir -p "$root" && cd "$root"'
    ' && cat >"$2.$$" && mv "$2.$$" "$2" && pwd'
)
"""Puts stdin into a file of the host's folder of the launch, whole, and prints the folder."""


@dataclasses.dataclass
class Session:
    """A launch as it goes on: what is recorded of it, its hosts, and where its words go."""

    folder: LaunchFolder
    record: LaunchRecord
    say: Callable[[str], None]
    dry: bool = False

    def __post_init__(self) -> None:
        spec, backend = self.record.spec, find_backend(self.record.spec.backend)
        assert isinstance(backend, Driven)
        self.backend = backend
        self.hosts: list[Host] = [backend.host(name, spec) for name in spec.hosts]

    @property
    def deadline(self) -> float:
        """The Unix time at which the hours are used up; 0 before the first attempt."""
        return self.record.deadline

    def note(self, **changes: Any) -> None:
        """Changes the record, durably; call it before the change is made on a host."""
        self.record = dataclasses.replace(self.record, **changes)
        if not self.dry:
            self.folder.save(self.record)

    def run(
        self, host: Host, argv: list[str], *, stdin: bytes = b"", source: str = "", timeout: float = 60, dry: str = "{}"
    ) -> Output:
        """Runs a command on a host, or prints it in a dry run.

        Args:
          host: the host.
          argv: the command and its arguments.
          stdin: bytes that the command reads.
          source: the name of the file that they come from, for the printed command.
          timeout: seconds after which the host counts as not answering.
          dry: the output of the command in a dry run.
        """
        if self.dry:
            # In one piece: hosts are asked from several threads.
            print(f"{host.shown(argv)}{f' < {source}' if source else ''}\n", end="")
            return Output(0, dry, "")
        return host.run(argv, stdin=stdin, timeout=timeout)

    def put(self, host: Host, name: str) -> str:
        """Puts a host script into the host's folder of the launch, and returns that folder.

        Raises:
          RunFailed: it cannot be written there.
        """
        id, path = self.record.spec.id, script(name)
        argv = ["sh", "-c", _PUT, "sh", id, name]
        state = str(state_root()) if self.backend.on_this_machine else "~/.local/state/jaxops"
        dry = f"{state}/launch/hosts/{id}"
        done = self.run(host, argv, stdin=path.read_bytes(), source=str(path), dry=dry)
        if done.code:
            raise RunFailed(f"{host.name}: cannot write into its state folder: {done.last_words}")
        return done.out.strip().splitlines()[-1]

    def ask(
        self, worker: int, verb: str, *args: str, stdin: bytes = b"", source: str = "", timeout: float = 60, **dry: Any
    ) -> Mapping[str, Any]:
        """Asks the host of a worker for something that `launch/worker.py` does, and returns its answer.

        Args:
          worker: the number of the worker.
          verb: the command of `launch/worker.py`.
          *args: its arguments.
          stdin: bytes that it reads.
          source: the name of the file that they come from, for the printed command of a dry run.
          timeout: seconds after which the host counts as not answering.
          **dry: the answer of a dry run.

        Raises:
          RunFailed: the host refuses; the message names it.
        """
        host = self.hosts[worker]
        # -S: it needs no packages, and starts in half of the time without a look at them.
        argv = [self._python(), "-S", f"{self.record.roots[worker]}/worker.py", verb, *args]
        done = self.run(host, argv, stdin=stdin, source=source, timeout=timeout, dry=json.dumps(dry))
        try:
            answer = json.loads(done.out.strip().splitlines()[-1])
        except (ValueError, IndexError):
            raise RunFailed(f"{host.name}: {verb} failed: {done.last_words}") from None
        if "error" in answer:
            raise RunFailed(f"{host.name}: {verb} failed: {answer['error']}")
        return answer

    def _python(self) -> str:
        """Returns the interpreter of the host script, which any Python 3 can be."""
        spec = self.record.spec
        return sys.executable if self.backend.on_this_machine else spec.python or "python3"

    def poll(self, worker: int, offset: int = 0) -> Mapping[str, Any]:
        """Returns how a worker is, as `launch/worker.py poll` has it.

        The state is `unreachable` where nobody knows: its host does not answer, or has lost its disk.
        """
        if not self.record.roots or not self.record.attempt:
            return {"state": "absent", "code": None, "why": "", "text": "", "offset": 0}
        try:
            return self.ask(worker, "poll", self.record.folder(worker), str(offset))
        except RunFailed as error:
            return {"state": "unreachable", "code": None, "why": str(error), "text": "", "offset": offset}

    def remove_folder(self, worker: int) -> None:
        """Removes the folder of the launch on a worker's host.

        Raises:
          RunFailed: a worker is alive there, or the host does not answer.
        """
        host, root = self.hosts[worker], self.record.roots[worker]
        # Without its script it has been removed before, if not to the end: no worker was alive then.
        lines = 'if [ -e "$2/worker.py" ]; then "$1" -S "$2/worker.py" remove "$2"; else rm -rf "$2"; fi'
        done = self.run(host, ["sh", "-c", lines, "sh", self._python(), root], timeout=300)
        if done.code or "error" in done.out:
            raise RunFailed(f"{host.name}: {root} could not be removed: {done.last_words}")

    def polls(self) -> list[Mapping[str, Any]]:
        """Returns how every worker is, without what it said."""
        return each(lambda worker, _: self.poll(worker, -1), self.hosts)

    def stop(self, name: str, workers: list[int] | None = None) -> list[int]:
        """Sends TERM or KILL to these workers, or to all, and returns those that it did not reach.

        A worker is not reached where it has ended, where it is only being started, or where its host does not answer.
        """
        chosen = list(range(len(self.hosts))) if workers is None else workers

        def tell(worker: int, host: Host) -> bool:
            if worker not in chosen:
                return True
            try:
                return bool(self.ask(worker, "stop", self.record.folder(worker), name, stopped=True)["stopped"])
            except RunFailed as error:
                self.say(str(error))
                return False

        if not self.record.roots or not self.record.attempt:
            return chosen
        return [worker for worker, reached in enumerate(each(tell, self.hosts)) if not reached]
