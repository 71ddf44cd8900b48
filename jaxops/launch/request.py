"""From the arguments of `jaxops launch` to what is launched: all that can be wrong without a host is said here."""

import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxops.config.files import find_config, shipped_configs
from jaxops.core import stores
from jaxops.core.failures import UserError, nearest
from jaxops.core.home import expand_home
from jaxops.launch.accelerators import Accelerator, find_accelerator
from jaxops.launch.code import Code
from jaxops.launch.hosts import Host, LocalHost, SshHost, parse_hosts
from jaxops.launch.record import Spec

BACKENDS = ("local", "ssh")
_SECRET_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `jaxops launch`, as they are given; see the command's help for each."""

    config: str
    overrides: Sequence[str]
    on: str
    backend: str
    hosts: str | None = None
    workers: int | None = None
    max_hours: float | None = None
    grace: float = 120.0
    retries: int = 10
    python: str | None = None
    lock: str = "requirements.lock"
    wheelhouse: str | None = None
    coordinator: str | None = None
    secrets: Sequence[str] = ()
    accept_code: bool = False

    def check(self) -> Accelerator:
        """Checks what needs no config, and returns the accelerator.

        Raises:
          UserError: a value is missing, unknown, out of range, or does not go with the backend.
        """
        if self.backend not in BACKENDS:
            raise UserError(
                f"--backend {self.backend}: no such backend{nearest(self.backend, BACKENDS)} (known:"
                f" {', '.join(BACKENDS)})"
            )
        accelerator = find_accelerator(self.on)
        if self.max_hours is None:
            raise UserError("--max-hours is missing: after how many hours must the hosts be free, at the latest?")
        if not (math.isfinite(self.max_hours) and 0 < self.max_hours <= 24 * 366):
            raise UserError(f"--max-hours {self.max_hours:g}: expected a number of hours above zero (a year at most)")
        if not 1 <= self.grace <= 3600:
            raise UserError(f"--grace {self.grace:g}: expected seconds for a save, from 1 to 3600")
        if not 0 <= self.retries <= 1000:
            raise UserError(f"--retries {self.retries}: expected a number from 0 to 1000")
        for name in self.secrets:
            if not _SECRET_NAME.fullmatch(name):
                raise UserError(
                    f"--secret {name.partition('=')[0][:60]!r}: expected the name of an environment variable, without"
                    " its value, which would be seen in the list of processes"
                )
            if name not in os.environ:
                raise UserError(f"--secret {name}: there is no environment variable of that name here")
        if self.coordinator is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.coordinator):
            raise UserError(
                f"--coordinator {self.coordinator[:80]!r}: expected a host name or an address, without a port"
            )
        if self.backend == "local" and self.hosts is not None:
            raise UserError("--hosts goes with --backend ssh; --backend local takes --workers N")
        if self.backend == "ssh" and self.hosts is None:
            raise UserError("--backend ssh needs --hosts HOST[,HOST], or --hosts @FILE with one a line")
        if self.backend == "ssh" and self.workers is not None:
            raise UserError("--workers goes with --backend local; over ssh each host of --hosts runs one worker")
        return accelerator


def make_spec(request: Request, loaded: Any, code: Code) -> Spec:
    """Returns what is launched, once the config is read.

    Raises:
      UserError: workers, devices and mesh do not fit each other; the run's folder or the config is not for all to see.
    """
    accelerator = request.check()
    hosts = _hosts(request, accelerator)
    run = loaded.config.run
    local = request.backend == "local"
    if run.name == "code":
        raise UserError("run.name=code: `code` in run.dir is where launches keep their code; name the run otherwise")
    run_dir = _run_dir(run.dir, local)
    if accelerator.devices % len(hosts):
        raise UserError(
            f"--on {request.on}: {accelerator.devices} devices cannot be shared out over {len(hosts)} workers"
        )
    config = _config_inside(request.config, code)
    # Overrides of one's own come first, since the folder as all see it must hold.
    argv = ["train", config, *request.overrides, f"run.dir={run_dir}"]
    if request.accept_code:
        argv.append("--accept-code")
    devices = accelerator.devices // len(hosts) if accelerator.chip is None else None
    if devices is not None:
        argv += ["--cpu-devices", str(devices)]
    python = request.python or (sys.executable if local else "")
    if not python and request.lock not in code.files:
        raise UserError(
            f"--lock {request.lock}: the code in {code.folder} has no such file, from which hosts would make their"
            " environment; add one (uv pip compile), or name a Python that the hosts have: --python PATH"
        )
    return Spec(
        name=run.name,
        run_dir=run_dir,
        backend=request.backend,
        hosts=tuple(hosts),
        type=accelerator.type,
        argv=tuple(argv),
        devices=devices,
        mesh=loaded.config.mesh.sizes(accelerator.devices),
        secrets=tuple(dict.fromkeys(request.secrets)),
        python=python,
        lock=request.lock,
        wheelhouse=request.wheelhouse or "",
        coordinator=request.coordinator or "",
    )


def hosts_of(spec: Spec) -> list[Host]:
    """Returns the hosts of a launch."""
    kind: Callable[[str], Host] = LocalHost if spec.backend == "local" else SshHost
    return [kind(name) for name in spec.hosts]


def _hosts(request: Request, accelerator: Accelerator) -> list[str]:
    if request.backend == "ssh":
        hosts = parse_hosts(str(request.hosts))
        if accelerator.chip is not None and len(hosts) != accelerator.hosts:
            raise UserError(f"--hosts: {len(hosts)} given, and {accelerator}")
        return hosts
    workers = 1 if request.workers is None else request.workers
    if not 1 <= workers <= 64:
        raise UserError(f"--workers {workers}: expected from 1 to 64 processes on this machine")
    if accelerator.chip is not None and (accelerator.hosts > 1 or workers > 1):
        raise UserError(
            f"--on {request.on} --backend local: this machine is one host with one worker, and {accelerator}"
        )
    return [f"local-{worker}" for worker in range(workers)]


def _run_dir(given: str, local: bool) -> str:
    if stores.is_url(given):
        return given.rstrip("/")
    if local:
        return os.path.abspath(expand_home(given, "run.dir"))
    if not given.startswith("/"):
        raise UserError(
            f"run.dir={given}: over ssh it must be one place that all hosts see, whatever folder they start in: an"
            " absolute path on a file system that they share, or an object store (gs://BUCKET/..., s3://BUCKET/...)"
        )
    return os.path.normpath(given)


def _config_inside(given: str, code: Code) -> str:
    """Returns the config as the workers name it: below the folder that they start in, or a shipped one.

    Raises:
      UserError: the file is not part of the code.
    """
    path = find_config(given).resolve()
    if path.is_relative_to(shipped_configs().resolve()) and not Path(given).exists():
        return given
    name = path.relative_to(code.folder).as_posix() if path.is_relative_to(code.folder) else ""
    if name not in code.files:
        where = f"is ignored by git in {code.folder}" if name else f"lies outside of the repository {code.folder}"
        raise UserError(f"{given}: it {where}, so the hosts would not get it; keep the config beside the code")
    return os.path.relpath(path, code.folder / code.inside)
