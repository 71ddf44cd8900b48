"""From the arguments of `jaxops launch` to what is launched: all that can be wrong without a host is said here."""

import ipaddress
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from jaxops.config.files import find_config, shipped_configs
from jaxops.core import stores
from jaxops.core.failures import UserError, nearest
from jaxops.core.home import expand_home
from jaxops.core.secret_text import printable
from jaxops.launch.accelerators import Accelerator, find_accelerator
from jaxops.launch.arguments import Request
from jaxops.launch.backends.protocol import Backend, Scheduler
from jaxops.launch.backends.table import find_backend
from jaxops.launch.code import Code
from jaxops.launch.record import Spec

_SECRET_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_PLACE = re.compile(r"[A-Za-z0-9_~/][A-Za-z0-9_./~-]*")
_SOURCES = {"file": "file:PATH (0600, on the hosts)", "sm": "sm:SECRET (Secret Manager)", "k8s": "k8s:SECRET/KEY"}
"""Where workers find secrets, by the word before the colon."""


def check(request: Request) -> Accelerator:
    """Checks what needs no config, and returns the accelerator.

    Raises:
      UserError: a value is missing, unknown, out of range, or does not go with the backend.
    """
    backend = find_backend(request.backend)
    accelerator = find_accelerator(request.on)
    if request.max_hours is None:
        raise UserError("--max-hours is missing: after how many hours must the hosts be free, at the latest?")
    if not (math.isfinite(request.max_hours) and 0 < request.max_hours <= 24 * 366):
        raise UserError(f"--max-hours {request.max_hours:g}: expected a number of hours above zero (a year at most)")
    if not 1 <= request.grace <= 3600:
        raise UserError(f"--grace {request.grace:g}: expected seconds for a save, from 1 to 3600")
    if not 0 <= request.retries <= 1000:
        raise UserError(f"--retries {request.retries}: expected a number from 0 to 1000")
    for given in request.secrets:
        _check_secret(given, backend)
    if request.coordinator is not None and not _is_address(request.coordinator):
        raise UserError(
            f"--coordinator {request.coordinator[:80]!r}: expected a host name or an address, without a port"
        )
    _check_options(request, backend)
    _check_price(request, backend)
    if problems := backend.problems(request, accelerator):
        raise UserError("\n  ".join(problems))
    return accelerator


def _is_address(text: str) -> bool:
    """Returns whether this is a host name or an address of either kind, without a port."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", text):
        return True
    try:
        return ipaddress.ip_address(text.removeprefix("[").removesuffix("]")).version == 6
    except ValueError:
        return False


def _check_options(request: Request, backend: Backend) -> None:
    for given in request.options:
        key, equals, value = given.partition("=")
        known = ", ".join(f"{name} ({what})" for name, what in backend.options.items()) or "none"
        if key not in backend.options:
            raise UserError(
                f"--option {key[:60]}: --backend {backend.name} has no such option{nearest(key, backend.options)}"
                f" (it has: {known})"
            )
        if not equals or not value or not printable(value) == value or "\n" in value:
            raise UserError(f"--option {key}: expected {key}=VALUE ({backend.options[key]})")


def _check_price(request: Request, backend: Backend) -> None:
    asked = [
        flag
        for flag, given in (("--spot", request.spot), ("--flex", request.flex), ("--reservation", request.reservation))
        if given
    ]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: expected one price class")
    if asked and request.price not in backend.prices:
        has = ", ".join(backend.prices) or "none: nothing is bought there"
        raise UserError(f"{asked[0]}: --backend {backend.name} has no such price class (it has: {has})")
    if request.detach and request.price == "spot" and not backend.tries_again:
        raise UserError(
            f"--detach --spot: with --backend {backend.name} the launcher tries again after a preemption, and one"
            " in the background of this machine is gone when the machine sleeps. Launch without --detach on a"
            " machine that stays awake (a small VM of the same project, under tmux or systemd); or have cron there"
            " give the same `jaxops launch` every few minutes, which adopts or resumes; or use a backend whose"
            " cluster tries again by itself (gke, slurm)"
        )


def _check_secret(given: str, backend: Backend) -> None:
    name, equals, source = given.partition("=")
    kind, _, place = source.partition(":")
    if not _SECRET_NAME.fullmatch(name) or (equals and kind not in _SOURCES):
        raise UserError(
            f"--secret {name[:60]!r}: expected the name of an environment variable, without"
            " its value, which would be seen in the list of processes"
        )
    if (kind or "env") not in backend.secrets:
        ways = " or ".join(f"NAME={_SOURCES[way]}" if way != "env" else "NAME" for way in backend.secrets)
        raise UserError(f"--secret {name}: with --backend {backend.name} say where workers find it: {ways}")
    if not equals and name not in os.environ:
        raise UserError(f"--secret {name}: there is no environment variable of that name here")
    if equals and not _SECRET_PLACE.fullmatch(place):
        raise UserError(f"--secret {name}: expected {name}={_SOURCES[kind]}")


def make_spec(request: Request, loaded: Any, code: Code) -> Spec:
    """Returns what is launched, once the config is read.

    Raises:
      UserError: workers, devices and mesh do not fit each other; the run's folder or the config is not for all to see.
    """
    accelerator = check(request)
    backend = find_backend(request.backend)
    hosts = backend.workers(request, accelerator)
    run = loaded.config.run
    local = backend.on_this_machine
    if run.name == "code":
        raise UserError("run.name=code: `code` in run.dir is where launches keep their code; name the run otherwise")
    run_dir = _run_dir(run.dir, local)
    if isinstance(backend, Scheduler) and (problem := backend.folder_problem(run_dir)):
        raise UserError(problem)
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
        options=dict(one.split("=", 1) for one in request.options)
        | ({"reservation": request.reservation} if request.reservation else {}),
        price=request.price if backend.prices else "",
    )


def _run_dir(given: str, local: bool) -> str:
    if stores.is_url(given):
        return given.rstrip("/")
    if local:
        return os.path.abspath(expand_home(given, "run.dir"))
    if not given.startswith("/"):
        raise UserError(
            f"run.dir={given}: it must be one place that all hosts see, whatever folder they start in: an absolute"
            " path on a file system that they share, or an object store (gs://BUCKET/..., s3://BUCKET/...)"
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
