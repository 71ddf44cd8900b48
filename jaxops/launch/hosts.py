"""The seam between the launch engine and machines: run a command on a host, give it input, get its output.

`LocalHost` is this machine; `SshHost` is the user's own `ssh`, with whatever their ssh config says of keys, jumps and
agents. A further way to reach machines is one more class here. Tested in tests/launch/test_hosts.py.
"""

import dataclasses
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from jaxops.core.failures import RunFailed, UserError
from jaxops.core.secret_text import printable

MOST_AT_ONCE = 16
"""The number of hosts that are talked to at one time."""
_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_:][A-Za-z0-9_.:%-]*")
_SSH_FAILED = 255

T = TypeVar("T")


def at_port(address: str, port: object) -> str:
    """Returns `address:port`, with an IPv6 address in the brackets that it needs there."""
    return f"[{address.strip('[]')}]:{port}" if ":" in address else f"{address}:{port}"


class Unreachable(RunFailed):
    """A host did not answer, or not in time; the message names it."""


@dataclasses.dataclass(frozen=True)
class Output:
    """The exit status, stdout and stderr of a command on a host."""

    code: int
    out: str
    err: str

    @property
    def last_words(self) -> str:
        """The last lines of its stderr, else of its stdout, for messages."""
        lines = [line for line in printable(self.err.strip() or self.out.strip()).splitlines() if line.strip()]
        return " | ".join(lines[-6:])[-900:] or f"exit status {self.code}"


class Host(Protocol):
    """A machine that runs one worker."""

    @property
    def name(self) -> str:
        """Its name for people."""
        ...

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Output:
        """Runs a command there and returns what it left.

        Raises:
          Unreachable: the host does not answer, or the command does not end within `timeout` seconds.
        """
        ...

    def shown(self, argv: Sequence[str]) -> str:
        """Returns the command as one would type it here."""
        ...

    def address(self) -> str:
        """Returns the address at which the other workers reach this host."""
        ...


@dataclasses.dataclass(frozen=True)
class LocalHost:
    """This machine, as the host of one of the workers."""

    name: str

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Output:
        """Runs a command on this machine."""
        return _run(self.name, argv, stdin, timeout)

    def shown(self, argv: Sequence[str]) -> str:
        """Returns the command as one would type it."""
        return shlex.join(argv)

    def address(self) -> str:
        """Returns the loopback address."""
        return "127.0.0.1"


@dataclasses.dataclass(frozen=True)
class SshHost:
    """A machine that `ssh NAME` reaches without asking anything."""

    name: str

    def _ssh(self, argv: Sequence[str]) -> list[str]:
        # BatchMode: a password prompt, or a question about a host key, would wait for nobody.
        options = ["BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4"]
        flags = [word for option in options for word in ("-o", option)]
        return ["ssh", "-T", *flags, "--", self.name, shlex.join(argv)]

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Output:
        """Runs a command on the host."""
        found = _run(self.name, self._ssh(argv), stdin, timeout)
        if found.code == _SSH_FAILED:
            raise Unreachable(f"{self.name}: ssh failed: {found.last_words} (try: ssh {shlex.quote(self.name)} true)")
        return found

    def shown(self, argv: Sequence[str]) -> str:
        """Returns the ssh command as one would type it."""
        return shlex.join(self._ssh(argv))

    def address(self) -> str:
        """Returns the host name that ssh's config has for the host."""
        found = _run(self.name, ["ssh", "-G", "--", self.name], b"", 15)
        names = [line.split(None, 1)[1] for line in found.out.splitlines() if line.startswith("hostname ")]
        return names[0] if names else self.name.rpartition("@")[2]


def _run(name: str, argv: Sequence[str], stdin: bytes, timeout: float) -> Output:
    try:
        # In a session of its own: Ctrl-C is for the launcher, which stops the workers in order.
        done = subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout, start_new_session=True)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{name}: no answer within {timeout:.0f} s to: {shlex.join(argv)[:300]}") from None
    except FileNotFoundError as error:
        raise UserError(f"{name}: {error.filename} is not installed on this machine") from None
    return Output(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


def parse_hosts(text: str) -> list[str]:
    """Reads `HOST,HOST` or `@FILE`, a file with a host a line.

    Raises:
      UserError: the file cannot be read, there is no host, one is there twice, or one is no name of a host.
    """
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--hosts {text}: cannot read the list of hosts: {error}") from None
        names = [line.partition("#")[0].strip() for line in lines]
    else:
        names = [name.strip() for name in text.split(",")]
    names = [name for name in names if name]
    if not names:
        raise UserError(f"--hosts {text!r}: no host in it; expected HOST,HOST or @FILE with one a line")
    for name in names:
        if not _HOST.fullmatch(name):
            raise UserError(
                f"--hosts: {printable(name)[:80]!r} is no name of a host; expected one for `ssh`: [USER@]NAME"
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--hosts: {', '.join(twice)} is there twice; each host runs one worker")
    return names


def each(fn: Callable[[int, Host], T], hosts: Sequence[Host]) -> list[T]:
    """Calls `fn(worker, host)` for all hosts, several at a time, and returns the results in their order.

    Where some fail, all that failed are named in one error.
    """
    with ThreadPoolExecutor(max_workers=min(MOST_AT_ONCE, len(hosts))) as pool:
        futures = [pool.submit(fn, worker, host) for worker, host in enumerate(hosts)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, UserError | RunFailed):
            raise error
    if errors:
        first = next((error for error in errors if isinstance(error, UserError)), errors[0])
        raise type(first)("\n  ".join(dict.fromkeys(map(str, errors))))
    return [future.result() for future in futures]
